"""Naming the sample that fails, its files and its position."""

import cv2
import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import BaseDataset, ConcatDataset
from torch.utils.data import DataLoader

from mila_mm.cli import user_message
from mila_mm.engine.data.samples import NamedTransform, name_failing_samples
from mila_mm.errors import UserError


class Images(BaseDataset):
    """A dataset of image files."""

    def __init__(self, files: list[str], transforms: list) -> None:
        self.files = files
        super().__init__(pipeline=transforms)

    def load_data_list(self) -> list[dict]:
        return [dict(img_path=file) for file in self.files]


class FailOn:
    """A transform that fails on one file."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __call__(self, results: dict) -> dict:
        if results['img_path'] == self.file:
            raise ZeroDivisionError('no reason')
        return results


class LoadNothing:
    """A loading transform with a bug."""

    def __call__(self, results: dict) -> dict:
        raise ZeroDivisionError


@pytest.fixture
def image(tmp_path) -> str:
    path = str(tmp_path / 'image.png')
    cv2.imwrite(path, np.zeros((4, 5, 3), np.uint8))
    return path


def test_sound_images_load_as_before(image) -> None:
    dataset = Images([image], [LoadImageFromFile()])
    before = dataset[0]['img']
    name_failing_samples(dataset)
    assert np.array_equal(dataset[0]['img'], before)


@pytest.mark.parametrize('workers', [0, 1])
def test_names_the_file_through_wrappers_and_workers(image, tmp_path, workers) -> None:
    (tmp_path / 'bad.jpg').write_bytes(b'no image')
    inner = Images([image, str(tmp_path / 'bad.jpg')], [LoadImageFromFile()])
    dataset = ConcatDataset([inner])
    name_failing_samples(dataset)
    name_failing_samples(dataset)  # a second call changes nothing
    with pytest.raises(UserError) as caught:
        list(DataLoader(dataset, num_workers=workers, collate_fn=list))
    message = f'image {tmp_path / "bad.jpg"} cannot be decoded: 8 bytes that are no image that OpenCV knows'
    assert user_message(caught.value) == message


@pytest.mark.parametrize('workers', [0, 1])
def test_names_sample_and_transform_of_any_error(image, tmp_path, workers) -> None:
    second = str(tmp_path / 'second.png')
    cv2.imwrite(second, np.zeros((4, 5, 3), np.uint8))
    dataset = Images([image, second], [LoadImageFromFile(), FailOn(second)])
    name_failing_samples(dataset)
    with pytest.raises(UserError) as caught:
        list(DataLoader(dataset, num_workers=workers, collate_fn=list))
    message = user_message(caught.value)
    assert message.startswith(f'sample 1 of the data set ({second}): FailOn fails with ZeroDivisionError: no reason')
    assert 'test_samples.py:' in message


def test_a_failing_loader_of_a_sound_file_is_named(image) -> None:
    dataset = Images([image], [LoadNothing()])
    name_failing_samples(dataset)
    with pytest.raises(UserError, match=r'sample 0 .*LoadNothing fails with ZeroDivisionError'):
        dataset[0]


def test_a_watched_transform_answers_as_itself(image) -> None:
    transform = NamedTransform(LoadImageFromFile(color_type='unchanged'))
    assert transform.color_type == 'unchanged'
    assert repr(transform) == repr(transform.transform_itself)


@pytest.mark.parametrize(
    'name', ['a\n2026/01/01 - mmengine - INFO - all is well.png', '\x1b[2J\x1b]0;title\x07.png', '\u202e.png']
)
def test_a_name_out_of_an_annotation_file_cannot_forge_a_line(tmp_path, name) -> None:
    """COCO's JSON may name an image in any characters."""
    dataset = Images([str(tmp_path / name)], [LoadImageFromFile()])
    name_failing_samples(dataset)
    with pytest.raises(UserError, match='cannot be read') as caught:
        dataset[0]
    assert str(caught.value).isprintable()
