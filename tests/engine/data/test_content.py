"""What a data set holds is told from what another holds, wherever either lies."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from torch.utils.data import Dataset

from mila_mm.datasets.shapes import write_shapes
from mila_mm.engine.data import content
from mila_mm.engine.data.content import content_of


@pytest.fixture(scope='module')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('content')
    write_shapes(folder / 'shapes', num_train=4, num_val=1, size=32, seed=0)
    return folder / 'shapes'


def boxes(root: Path, **options: Any) -> Any:
    from mmdet.datasets import CocoDataset

    places = dict(
        data_root=str(root), ann_file='annotations/instances_train.json', data_prefix=dict(img='images/training')
    )
    return CocoDataset(**places, metainfo=dict(classes=('circle', 'square')), pipeline=[], **options)


def maps(root: Path) -> Any:
    from mmseg.datasets import BaseSegDataset

    places = dict(
        data_root=str(root), data_prefix=dict(img_path='images/training', seg_map_path='annotations/training')
    )
    return BaseSegDataset(**places, metainfo=dict(classes=('a', 'b')), pipeline=[], img_suffix='.png')


@pytest.fixture
def copy(shapes: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shapes, tmp_path / 'elsewhere'))


KINDS = pytest.mark.parametrize('kind', [boxes, maps])


@KINDS
def test_the_same_elsewhere(shapes, copy, kind) -> None:
    found = content_of(kind(shapes))
    assert found == content_of(kind(copy))
    assert found.keys() == {'classes', 'names', 'sizes'} | ({'annotations'} if kind is boxes else set())
    assert json.loads(json.dumps(found)) == found


def other_label(root: Path) -> None:
    path = root / 'annotations/instances_train.json'
    content = json.loads(path.read_text())
    content['annotations'][-1]['bbox'][0] += 1
    path.write_text(json.dumps(content))


def other_image(root: Path) -> None:
    path = sorted((root / 'images/training').iterdir())[2]
    path.write_bytes(path.read_bytes() + b' ')


def other_map(root: Path) -> None:
    path = sorted((root / 'annotations/training').iterdir())[3]
    path.write_bytes(path.read_bytes() + b' ')


def other_name(root: Path) -> None:
    for kind in ('images', 'annotations'):
        path = sorted((root / kind / 'training').iterdir())[1]
        path.rename(path.with_stem(f'{path.stem}x'))


@pytest.mark.parametrize(
    ('kind', 'change', 'part'),
    [
        (boxes, other_label, 'annotations'),
        (boxes, other_image, 'sizes'),
        (maps, other_image, 'sizes'),
        (maps, other_map, 'sizes'),
        (maps, other_name, 'names'),
    ],
)
def test_another_with_as_many_images(shapes, copy, kind, change: Callable, part) -> None:
    before = content_of(kind(shapes))
    change(copy)
    after = content_of(kind(copy))
    assert [name for name in before if before[name] != after[name]] == [part]


@KINDS
def test_wrappers_are_looked_into(shapes, kind) -> None:
    inner = kind(shapes)
    for wrapper in (RepeatDataset(inner, 2), ConcatDataset([inner, inner])):
        found = content_of(wrapper)
        assert found.keys() == content_of(inner).keys() and found['classes'] == content_of(inner)['classes']


def test_large_ones_are_looked_at_evenly(tmp_path, shapes, monkeypatch) -> None:
    """Of a file as large as the limit each byte counts, of a larger one some of each part."""
    monkeypatch.setattr(content, '_BLOCK', 10)
    path = tmp_path / 'annotations.json'
    sizes = {size: range(size) for size in (640, 639, 5)} | {6400: [part * 6390 // 63 for part in range(64)]}
    for size, places in sizes.items():
        seen = set()
        for place in places:
            path.write_bytes(bytes(place) + b'x' + bytes(size - place - 1))
            seen.add(content._file(str(path), math.inf))
        assert len(seen) == len(places)
    monkeypatch.setattr(content, '_NAMED', 2)
    assert content_of(boxes(shapes)) != content_of(boxes(shapes, indices=[0, 2]))
    for length in range(1, 20):
        places = list(content._spread(length, 7))
        assert places[0] == 0 and places[-1] == length - 1 and len(set(places)) == min(length, 7)
    assert not list(content._spread(0, 7))


def test_what_says_nothing() -> None:
    class Bare(Dataset):
        def __len__(self) -> int:
            return 3

    assert content_of(Bare()) == {}


class Stored(BaseDataset):
    """A data set of samples that are given, whose class a test alters."""

    def __init__(self, infos: list[dict], **options: Any) -> None:
        self.infos = infos
        super().__init__(**options)

    def load_data_list(self) -> list[dict]:
        return [*self.infos]


def on_disk(root: Path) -> list[dict]:
    return [dict(img_path=str(path)) for path in sorted((root / 'images/training').iterdir())]


def test_images_that_move_to_a_store(shapes) -> None:
    """Names are compared, sizes no longer."""
    disk, store = on_disk(shapes), [dict(img_path=f's3://b/{Path(i["img_path"]).name}') for i in on_disk(shapes)]
    before, after = content_of(Stored(disk)), content_of(Stored(store))
    assert before.keys() == {'names', 'sizes'} and after == {'names': before['names']}
    assert content_of(Stored(store[::-1])) != after
    assert content_of(ConcatDataset([Stored(disk), Stored(store)])).keys() == {'names'}


@pytest.mark.parametrize('fault', [OSError(5, 'Input/output error'), ValueError('embedded null byte')])
def test_a_file_system_that_fails_once(shapes, monkeypatch, fault) -> None:
    dataset, look, asked = Stored(on_disk(shapes)), os.stat, []

    def failing(path: Any, **options: Any) -> os.stat_result:
        asked.append(path)
        if len(asked) == 2:
            raise fault
        return look(path, **options)

    before = content_of(dataset)
    monkeypatch.setattr(content.os, 'stat', failing)
    assert content_of(dataset) == {'names': before['names']}


def test_annotations_of_which_one_cannot_be_read(shapes, tmp_path) -> None:
    """Those of the others alone would be another data set's."""
    (tmp_path / 'a.txt').write_text('x')
    (tmp_path / 'b.txt').write_text('y')
    read = [Stored(on_disk(shapes), ann_file=str(tmp_path / name)) for name in ('a.txt', 'b.txt')]
    assert 'annotations' in content_of(ConcatDataset(read))
    for other in ('s3://bucket/x.json', str(tmp_path), str(tmp_path / 'none'), 'a\0b'):
        unread = Stored(on_disk(shapes), ann_file=other)
        assert content_of(ConcatDataset([read[0], unread])).keys() == {'names', 'sizes'}


def test_tiles_of_images(shapes) -> None:
    class Tiles(Stored):
        def __len__(self) -> int:
            return 4 * super().__len__()

        def get_data_info(self, idx: int) -> dict:
            raise IndexError(f'{idx} is none of this class')

    assert content_of(Tiles(on_disk(shapes))) == content_of(Stored(on_disk(shapes)))


def test_samples_that_are_drawn(shapes) -> None:
    class Drawn(Stored):
        def get_data_info(self, idx: int) -> dict:
            return dict(img_path=os.urandom(8).hex())

    assert content_of(Drawn(on_disk(shapes))) == content_of(Drawn(on_disk(shapes)))


def test_a_class_that_leaves_its_own_beginning_out() -> None:
    class Own(BaseDataset):
        def __init__(self) -> None:
            self.items = [1, 2, 3]

        def __len__(self) -> int:
            return len(self.items)

        def load_data_list(self) -> list[dict]:
            raise AssertionError('nothing is loaded for a description')

    assert content_of(Own()) == {}

    class Failing(Own):
        @property
        def metainfo(self) -> dict:
            raise RuntimeError('none')

    assert content_of(Failing()) == {}


def test_time_is_limited(shapes, monkeypatch) -> None:
    monkeypatch.setattr(content, '_SECONDS', -1.0)
    assert content_of(boxes(shapes)).keys() == {'classes'}
