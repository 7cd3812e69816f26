"""What the first look refuses the whole check refuses too: sound sets that are laid out or loaded otherwise pass."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.fileio import list_from_file
from PIL import Image

from mila_mm.datasets.checks.label_maps import MapSummary, judge_maps
from mila_mm.engine.data import map_folders
from mila_mm.engine.data.first_look import first_look
from mila_mm.engine.data.splits import Split
from mila_mm.errors import UserError

STAGES = ['train']
LOADING = "load = train_dataloader['dataset']['pipeline']\n"


def as_it_is(labels: np.ndarray, _: int) -> np.ndarray:
    return labels


def arrays(folder: Path) -> str:
    for path in (folder / 'img/train').iterdir():
        np.save(path.with_suffix('.npy'), cv2.imread(str(path)))
        path.unlink()
    return (
        f"{LOADING}train_dataloader['dataset']['img_suffix'] = '.npy'\n"
        "train_dataloader['dataset']['pipeline'] = [dict(type='LoadImageFromNpyFile'), *load[1:]]\n"
    )


def linked_folders(folder: Path) -> str:
    for sub in ('img', 'ann'):
        (folder / sub / 'train').rename(folder / sub / 'elsewhere')
        (folder / sub / 'train').mkdir()
        (folder / sub / 'train/city').symlink_to(folder / sub / 'elsewhere')
    return ''


def listed_classes(folder: Path) -> str:
    (folder / 'classes.txt').write_text('back\nroad\ncar\n')
    return f"train_dataloader['dataset']['metainfo'] = dict(classes={str(folder / 'classes.txt')!r})\n"


def stored_turned(folder: Path) -> str:
    """Let images bid a quarter turn that OpenCV makes and the pipeline does not; maps are as the images are stored."""
    for path in (folder / 'img/train').iterdir():
        with Image.open(path) as image:
            exif = image.getexif()
            exif[0x0112] = 6
            image.resize((64, 48)).save(path, exif=exif)
        label_map = folder / 'ann/train' / path.name
        cv2.imwrite(str(label_map), cv2.imread(str(label_map), cv2.IMREAD_UNCHANGED)[:48].copy())
    return LOADING


SOUND: dict[str, Callable[[Path], str]] = {
    'arrays': arrays,
    'folders that are links': linked_folders,
    'a list of classes': listed_classes,
    'not turned': lambda f: stored_turned(f) + "load[0]['color_type'] = 'color_ignore_orientation'\n",
}


@pytest.mark.parametrize('name', SOUND)
def test_sound_sets_of_another_kind_pass(refusals, segmentor_of, maps, tmp_path, name) -> None:
    folder = maps(tmp_path / 'maps', as_it_is)
    more = SOUND[name](folder) + '\nload = None\n'
    assert refusals(segmentor_of(folder, more=more), STAGES) == ('', [])


def test_maps_of_images_that_opencv_turns(refusals, segmentor_of, maps, tmp_path) -> None:
    folder = maps(tmp_path / 'maps', as_it_is)
    stored_turned(folder)
    first, whole = refusals(segmentor_of(folder), STAGES)
    assert 'is 64 x 48 (width x height), its image' in first and whole


def test_images_that_another_library_decodes_are_left_to_the_whole_check(
    refusals, segmentor_of, maps, tmp_path
) -> None:
    folder = maps(tmp_path / 'maps', as_it_is)
    more = stored_turned(folder) + "load[0]['imdecode_backend'] = 'pillow'\nload = None\n"
    first, whole = refusals(segmentor_of(folder, more=more), STAGES)
    assert first == '' and 'is 64 x 48 (width x height), its image' in whole[0]


@pytest.mark.parametrize('name', ['img/train/1.png', 'ann/train/1.png'])
@pytest.mark.parametrize(
    ('content', 'words'), [(b'', 'is empty (0 bytes)'), (b'no image', 'cannot be decoded: 8 bytes')]
)
def test_files_that_are_broken(refusals, segmentor_of, maps, tmp_path, name, content, words) -> None:
    folder = maps(tmp_path / 'maps', as_it_is)
    (folder / name).write_bytes(content)
    first, whole = refusals(segmentor_of(folder), STAGES)
    assert f'{name} {words}' in first
    assert first.splitlines()[0] == whole[0]


def test_classes_are_read_from_a_file_as_the_data_set_reads_them(tmp_path) -> None:
    path = tmp_path / 'classes.txt'
    for content in ('a\nb\n', 'a\nb', 'a\n\nb\n', 'a\r\nb\r\n'):
        path.write_bytes(content.encode())
        split = Split('train', '', {'type': 'CocoDataset', 'metainfo': {'classes': str(path)}}, None)
        assert split.classes == tuple(list_from_file(path))


def test_one_ignored_map_of_many_is_a_warning(segmentor_of, maps, tmp_path, monkeypatch) -> None:
    folder = maps(tmp_path / 'maps', lambda labels, number: labels if number else np.full_like(labels, 255))
    monkeypatch.setattr(map_folders, '_files', lambda _: ['0.png', '1.png', '2.png'])
    monkeypatch.setattr(map_folders, '_SECONDS', -1.0)  # time is up after one map
    first_look(str(segmentor_of(folder)), (), STAGES)


@pytest.mark.parametrize(('seen', 'level'), [(1, 'warning'), (16, 'warning'), (20, 'error')])
def test_maps_that_are_ignored_are_an_error_where_all_were_seen(seen, level) -> None:
    summary = MapSummary(total=20)
    ignored = np.full((2, 3), 255)
    for _ in range(seen):
        summary.add(ignored, ignored)
    (finding,) = judge_maps('train', summary, ('a', 'b'), (255,), False)
    assert finding.level == level and 'every pixel is ignored' in finding.message


def test_a_folder_that_takes_long_is_left_alone(segmentor_of, maps, tmp_path, monkeypatch) -> None:
    folder = maps(tmp_path / 'maps', lambda labels, _: np.full_like(labels, 77))
    with pytest.raises(UserError, match='has value 77'):
        first_look(str(segmentor_of(folder)), (), STAGES)
    monkeypatch.setattr(map_folders, '_SECONDS', -1.0)
    first_look(str(segmentor_of(folder)), (), STAGES)
    first_look(str(segmentor_of(folder, more="train_dataloader['dataset']['img_suffix'] = '.jpg'")), (), STAGES)
