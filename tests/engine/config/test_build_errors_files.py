"""Naming the file that cannot be read."""

import cv2
import numpy as np
import pytest
from mmcv.transforms import Compose, LoadImageFromFile
from mmengine.dataset import BaseDataset, ConcatDataset
from torch.utils.data import DataLoader

from mila_mm.cli import user_message
from mila_mm.engine.config.build_errors import name_unreadable_files
from mila_mm.errors import UserError


class Images(BaseDataset):
    """A dataset of image files."""

    def __init__(self, files: list[str], transforms: list) -> None:
        self.files = files
        super().__init__(pipeline=transforms)

    def load_data_list(self) -> list[dict]:
        return [dict(img_path=file) for file in self.files]


def fail(results: dict) -> dict:
    raise ZeroDivisionError


class LoadNothing:
    """A loading transform with a bug."""

    def __call__(self, results: dict) -> dict:
        return fail(results)


@pytest.fixture
def image(tmp_path) -> str:
    path = str(tmp_path / 'image.png')
    cv2.imwrite(path, np.zeros((4, 5, 3), np.uint8))
    return path


def test_sound_images_load_as_before(image) -> None:
    dataset = Images([image], [LoadImageFromFile()])
    before = dataset[0]['img']
    name_unreadable_files(dataset)
    assert np.array_equal(dataset[0]['img'], before)


@pytest.mark.parametrize('workers', [0, 1])
def test_names_the_file_through_wrappers_and_workers(image, tmp_path, workers) -> None:
    (tmp_path / 'bad.jpg').write_bytes(b'no image')
    inner = Images([image, str(tmp_path / 'bad.jpg')], [LoadImageFromFile()])
    dataset = ConcatDataset([inner])
    name_unreadable_files(dataset)
    name_unreadable_files(dataset)  # a second call changes nothing
    with pytest.raises(UserError) as caught:
        list(DataLoader(dataset, num_workers=workers, collate_fn=list))
    message = f'image {tmp_path / "bad.jpg"} cannot be decoded: 8 bytes that are no image that OpenCV knows'
    assert user_message(caught.value) == message


def test_an_error_that_is_not_the_files_passes(image) -> None:
    dataset = Images([image], [LoadNothing()])
    name_unreadable_files(dataset)
    with pytest.raises(ZeroDivisionError):
        dataset[0]


def test_only_loading_is_watched(image) -> None:
    dataset = Images([image], [LoadImageFromFile()])
    dataset.pipeline = Compose([LoadImageFromFile(), fail])
    name_unreadable_files(dataset)
    assert dataset.pipeline.transforms[1] is fail


@pytest.mark.parametrize(
    'name', ['a\n2026/01/01 - mmengine - INFO - all is well.png', '\x1b[2J\x1b]0;title\x07.png', '\u202e.png']
)
def test_a_name_out_of_an_annotation_file_cannot_forge_a_line(tmp_path, name) -> None:
    """COCO's JSON may name an image in any characters."""
    dataset = Images([str(tmp_path / name)], [LoadImageFromFile()])
    name_unreadable_files(dataset)
    with pytest.raises(UserError, match='cannot be read') as caught:
        dataset[0]
    assert str(caught.value).isprintable()
