"""Faults of a COCO file are said before the first step, each by a small set with that fault."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from mila_mm.engine.config.load import load_config
from mila_mm.engine.data.check import check_everything

TRAIN = 'train.py'


def each(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Set fields of every annotation; None takes the field away."""

    def change(content: dict[str, Any]) -> None:
        for annotation in content['annotations']:
            for name, value in fields.items():
                annotation.pop(name, None)
                if value is not None:
                    annotation[name] = value

    return change


def one(**fields: Any) -> Callable[[dict[str, Any]], None]:
    """Set fields of the annotation at position 1."""
    return lambda content: content['annotations'][1].update(fields)


def rename(content: dict[str, Any]) -> None:
    content['categories'][2]['name'] = 'Triangle '


def reverse(content: dict[str, Any]) -> None:
    content['categories'].reverse()


def fewer(content: dict[str, Any]) -> None:
    del content['categories'][3:]


def from_zero(content: dict[str, Any]) -> None:
    for annotation in content['annotations']:
        annotation['category_id'] -= 1


def as_text(content: dict[str, Any]) -> None:
    for annotation in content['annotations']:
        annotation['image_id'] = str(annotation['image_id'])


def half_the_size(content: dict[str, Any]) -> None:
    for image in content['images']:
        image.update(width=image['width'] // 2, height=image['height'] // 2)
    each(segmentation=[[5, 5, 20, 5, 20, 20]], bbox=[5, 5, 15, 15], area=100)(content)


ENTRIES = {
    'no masks': (each(segmentation=None), ['annotations[0].segmentation', 'missing', 'masks']),
    'an empty mask': (one(segmentation=[]), ['annotations[1].segmentation', '[]']),
    'a flat polygon': (one(segmentation=[1, 1, 9, 1, 9, 9]), ['annotations[1].segmentation', 'flat list']),
    'a polygon of text': (one(segmentation=[['1', '1', '9', '1', '9', '9']]), ['annotations[1].segmentation[0]']),
    'a mask of another size': (one(segmentation={'size': [9, 9], 'counts': [81]}), ['segmentation.size', '[9, 9]']),
    'runs that do not add up': (one(segmentation={'size': [64, 64], 'counts': [7]}), ['add up to 7', '64 * 64']),
    'text that is no runs': (one(segmentation={'size': [64, 64], 'counts': 'abc'}), ['counts', 'run-length']),
    'a polygon between 0 and 1': (
        each(segmentation=[[0.1, 0.1, 0.5, 0.1, 0.5, 0.5]]),
        ['annotations[0].segmentation lies between 0 and 1', 'in pixels'],
    ),
    'an empty box': (one(bbox=[]), ['annotations[1].bbox', '[]']),
    'a box of three': (one(bbox=[1, 2, 3]), ['annotations[1].bbox']),
    'a box of text': (one(bbox=['1', '2', '3', '4']), ['annotations[1].bbox']),
    'a box with NaN': (one(bbox=[1.0, float('nan'), 9.0, 9.0]), ['annotations[1].bbox', 'nan']),
    'an area of text': (one(area='big'), ['annotations[1].area']),
    'areas of 0': (each(area=0), ['no box is left', 'area 0']),
    'iscrowd of text': (one(iscrowd='no'), ['annotations[1].iscrowd']),
    'boxes outside': (each(bbox=[900, 900, 5, 5]), ['no box is left', 'outside']),
    'thin boxes': (each(bbox=[5, 5, 0.5, 0.5]), ['no box is left', 'less than a pixel']),
    'ids twice': (one(id=1), ['annotations[1].id 1']),
    'ids as text': (as_text, ["image_id '", 'of type int', 'of type str']),
    'categories from 0': (from_zero, ['].category_id', 'ids 0', 'shifted by one']),
    'size 0': (
        lambda content: [image.update(width=0, height=0) for image in content['images']],
        ['images[0]', 'width 0'],
    ),
    'size as text': (lambda content: content['images'][0].update(width='64'), ['images[0]', "'64'"]),
    'half the size': (half_the_size, ['64 x 64', '32 x 32', 'images/']),
    'images twice': (lambda content: content['images'].append(content['images'][0]), ['.id', 'another image']),
    'a renamed class': (rename, ["'triangle'", "nearest: 'Triangle '"]),
    'categories in another order': (reverse, ['another order', "'circle' here"]),
    'fewer categories': (fewer, ['3 of 6 classes', "'star'"]),
    'no categories': (lambda content: content.update(categories=[]), ["'categories' is empty"]),
    'other files': (
        lambda content: [image.update(file_name=f'{image["file_name"][:-4]}.jpg') for image in content['images']],
        ['does not exist', '.png'],
    ),
}


@pytest.mark.parametrize('fault', ENTRIES)
def test_annotation_files(command, refused, detector_of, own, edit, look, fault) -> None:
    change, words = ENTRIES[fault]
    edit(own, change)
    refused(command(TRAIN, detector_of(own)), *words, lines=(1, 2, 3))


@pytest.mark.parametrize('fault', ['an empty box', 'fewer categories', 'areas of 0', 'half the size'])
def test_annotation_files_of_the_validation_alone(command, refused, detector_of, own, fault, edit) -> None:
    change, words = ENTRIES[fault]
    edit(own, change, ('val',))
    refused(command(TRAIN, detector_of(own)), *words, 'val', lines=(1, 2, 3))


def test_absent_areas_and_crowds_are_computed_and_told(command, detector_of, own, edit) -> None:
    edit(own, each(iscrowd=None, area=None))
    ended = command(TRAIN, detector_of(own))
    assert ended.status == 0, ended.err
    for words in ('annotations[0] has no "area"', 'annotations[0] has no "iscrowd"', 'instances_val.json'):
        assert words in ended.out
    assert 'coco/bbox_mAP' in ended.out  # the evaluation, which reads both


def test_a_byte_order_mark(command, refused, detector_of, own) -> None:
    path = own / 'annotations/instances_train.json'
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())
    refused(command(TRAIN, detector_of(own)), str(path), 'byte order mark', lines=(1, 2, 3))


def test_images_turned_by_exif(command, refused, detector_of, own, edit) -> None:
    from PIL import Image

    for path in (own / 'images').rglob('*.png'):
        image = Image.open(path).resize((64, 48)).convert('RGB')
        exif = image.getexif()
        exif[274] = 6
        image.save(path, exif=exif)
    edit(own, lambda content: [image.update(width=64, height=48) for image in content['images']])
    edit(own, each(segmentation=[[5, 5, 20, 5, 20, 20]], bbox=[5, 5, 15, 15], area=100))
    refused(command(TRAIN, detector_of(own)), '48 x 64', '64 x 48', 'EXIF', lines=(1, 2, 3))


def test_lost_boxes_are_a_warning_that_says_how_many(command, detector_of, own, edit) -> None:
    def half(content: dict[str, Any]) -> None:
        for annotation in content['annotations'][::2]:
            annotation['area'] = 0

    edit(own, half)
    ended = command(TRAIN, detector_of(own))
    assert ended.status == 0
    assert '% of the boxes' in ended.out
    assert 'area 0' in ended.out


def test_images_below_min_size_are_a_warning(command, detector_of, own, edit) -> None:
    def shrink(content: dict[str, Any]) -> None:
        content['images'].append({**content['images'][0], 'id': 99, 'width': 64, 'height': 64})
        content['images'].append({**content['images'][0], 'id': 98, 'width': 20, 'height': 20})

    edit(own, shrink, ('train',))
    config = detector_of(own, "train_dataloader['dataset']['filter_cfg'] = dict(min_size=32)")
    assert 'filter_cfg.min_size (the smallest side of any is 20)' in command(TRAIN, config).out


@pytest.mark.parametrize(('share', 'behind'), [(0.5, b''), (0.9, b''), (1.0, b''), (1.0, bytes(9000))])
def test_a_jpeg_that_is_cut_short(detector_of, own, edit, share, behind) -> None:
    """OpenCV reads some of them and leaves the rest grey; what stands behind a whole one is no matter."""
    path = next((own / 'images/training').iterdir())
    other = path.with_suffix('.jpg')
    cv2.imwrite(str(other), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    content = other.read_bytes()
    other.write_bytes(content[: int(share * len(content))] + behind)

    def rename(content: dict[str, Any]) -> None:
        image = next(image for image in content['images'] if image['file_name'] == path.name)
        image['file_name'] = other.name

    edit(own, rename, ('train',))
    report = check_everything(load_config(str(detector_of(own))), ['train'], 'mmdet')
    found = [str(finding) for finding in report.of('error')]
    assert len(found) == (share < 1)
    assert all(str(other) in line and ('is cut short' in line or 'cannot be decoded' in line) for line in found)


def test_what_the_first_look_refuses_the_whole_check_refuses(refusals, detector_of, shapes, edit, tmp_path) -> None:
    refused = 0
    for fault, (change, _) in ENTRIES.items():
        own = Path(shutil.copytree(shapes, tmp_path / fault))
        edit(own, change)
        refused += bool(refusals(detector_of(own), ['train', 'val'])[0])
    assert refused > len(ENTRIES) / 2
