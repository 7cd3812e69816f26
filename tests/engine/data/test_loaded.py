"""Data sets of a class of one's own are judged by what they loaded, whatever their length and their samples are."""

import json
from pathlib import Path
from typing import Any

import pytest
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmseg.datasets import BaseSegDataset

from mila_mm.datasets.shapes import write_shapes
from mila_mm.engine.data.built import Effort, check_built
from mila_mm.engine.data.loaded import info_of, length_of
from mila_mm.engine.data.packed import try_pipeline

CLASSES = ('circle', 'square', 'triangle', 'star', 'cross', 'ring')
TILES = 4


class Tiles(CocoDataset):
    """Each image counts several times, and its samples cannot be had before a training asks for them."""

    def __len__(self) -> int:
        return TILES * super().__len__()

    def get_data_info(self, idx: int) -> dict[str, Any]:
        raise RuntimeError('no tile yet')


class Endless(CocoDataset):
    def __len__(self) -> int:
        raise TypeError('has no length')


class MapTiles(BaseSegDataset):
    def __len__(self) -> int:
        return TILES * super().__len__()

    def get_data_info(self, idx: int) -> dict[str, Any]:
        return {**super().get_data_info(idx // TILES), 'tile': idx % TILES}


@pytest.fixture(scope='module')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp('data') / 'shapes', num_train=3, num_val=1, size=64, seed=0)


def detector_set(kind: type, folder: Path, ann_file: str = 'annotations/instances_train.json') -> Any:
    return kind(
        data_root=str(folder),
        ann_file=ann_file,
        data_prefix=dict(img='images/training'),
        metainfo=dict(classes=CLASSES),
        pipeline=[dict(type='LoadImageFromFile')],
    )


@pytest.mark.parametrize('kind', [CocoDataset, Tiles, Endless])
def test_boxes_are_counted_as_loaded(shapes, kind) -> None:
    looked = check_built(detector_set(kind, shapes), 'train', 'train', Effort())
    assert looked.findings == []
    assert looked.counts['images'] == 3


@pytest.mark.parametrize('kind', [Tiles, Endless])
def test_faults_are_found_all_the_same(shapes, kind) -> None:
    content = json.loads((shapes / 'annotations/instances_train.json').read_text())
    content['images'][1]['file_name'] = 'absent.png'
    (shapes / 'annotations/absent.json').write_text(json.dumps(content))
    looked = check_built(detector_set(kind, shapes, 'annotations/absent.json'), 'train', 'train', Effort())
    assert 'absent.png does not exist (1 of 3 looked for)' in looked.findings[0].message


def test_label_maps(shapes) -> None:
    dataset = MapTiles(
        data_root=str(shapes),
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        img_suffix='.png',
        reduce_zero_label=True,
        metainfo=dict(classes=(*CLASSES, 'ground')),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='mmseg.LoadAnnotations')],
    )
    looked = check_built(dataset, 'train', 'train', Effort())
    assert not looked.has_errors()
    assert looked.counts['label_maps_seen'] == looked.counts['label_maps'] == 3


def test_a_sample_that_cannot_be_had_yet_is_left_to_the_first_batch(shapes) -> None:
    cfg = Config(dict(model=dict(type='RetinaNet')))
    assert try_pipeline(detector_set(Tiles, shapes), 'train', cfg, 'train', 'mmdet') is None


def test_a_class_of_the_libraries_has_the_length_that_it_says(shapes) -> None:
    dataset = detector_set(CocoDataset, shapes)
    assert length_of(dataset) == len(dataset) and info_of(dataset, 1) == dataset.get_data_info(1)
    assert length_of(detector_set(Tiles, shapes)) == 3
