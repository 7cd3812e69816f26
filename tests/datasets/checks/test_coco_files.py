"""Each kind of fault in a file of COCO's layout is told once, with its place, and nothing sound is."""

import copy
import gzip
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from mila_mm.datasets.checks.classes import check_categories
from mila_mm.datasets.checks.coco_annotations import UnreadableError, check_entries, read_coco
from mila_mm.datasets.checks.needs import Needs
from mila_mm.datasets.checks.survival import Filter, count_survivors, judge_survivors

READS_ALL = Needs(masks=True, evaluation=True)
SOUND: dict[str, Any] = dict(
    images=[dict(id=1, file_name='a.jpg', width=64, height=48), dict(id=2, file_name='b.jpg', width=64, height=48)],
    annotations=[
        dict(
            id=n,
            image_id=1 + n % 2,
            category_id=3,
            bbox=[5, 5, 20, 20],
            area=400,
            iscrowd=0,
            segmentation=[[5, 5, 25, 5, 25, 25]],
        )
        for n in range(1, 5)
    ],
    categories=[dict(id=3, name='cat'), dict(id=9, name='dog')],
)


def told(tmp_path: Path, change: Any) -> list[str]:
    content = copy.deepcopy(SOUND)
    change(content)
    path = tmp_path / 'own.json'
    path.write_text(json.dumps(content))
    data = read_coco(path)
    found = check_entries(data, 'own.json', READS_ALL)
    if not any(finding.level == 'error' for finding in found):
        counts = count_survivors(data, Filter(classes=('cat', 'dog'), filter_empty=True))
        found += judge_survivors('train', 'own.json', counts, training=True)
    return [f'{finding.level}: {finding}' for finding in found if finding.level != 'note']


def every(**fields: Any) -> Any:
    return lambda content: [annotation.update(fields) for annotation in content['annotations']]


def one(**fields: Any) -> Any:
    return lambda content: content['annotations'][1].update(fields)


def corners(content: dict[str, Any]) -> None:
    for annotation in content['annotations']:
        annotation['bbox'] = [30, 30, 60, 45]


def text_ids(content: dict[str, Any]) -> None:
    for image in content['images']:
        image['id'] = str(image['id'])
    for annotation in content['annotations']:
        annotation.update(image_id=str(annotation['image_id']), id=str(annotation['id']))


def from_zero(content: dict[str, Any]) -> None:
    for annotation in content['annotations']:
        annotation['category_id'] = 0
    content['categories'][0]['id'] = 0


@pytest.mark.parametrize(
    'change',
    [
        lambda content: None,
        text_ids,
        from_zero,
        every(iscrowd=False),
        one(segmentation=dict(size=[48, 64], counts=[100, 20, 48 * 64 - 120])),
        lambda content: content['categories'].insert(0, dict(id=0, name='background')),
        lambda content: [image.update(file_name=f'sub/{image["file_name"]}') for image in content['images']],
        lambda content: content.pop('info', None),
    ],
)
def test_sound_files_pass(change, tmp_path) -> None:
    assert not told(tmp_path, change)


FAULTS = {
    'five numbers': (
        one(bbox=[1, 2, 3, 4, 5]),
        'annotations[1].bbox is [1, 2, 3, 4, 5], expected [x, y, width, height]',
    ),
    'a boolean': (one(bbox=[1, 2, True, 4]), 'annotations[1].bbox is [1, 2, True, 4]'),
    'an id of 0': (one(id=0), "warning: own.json: annotations[1].id is 0; COCO's evaluation never counts"),
    'an id of text': (one(id='x1'), "annotations[1].id is 'x1', expected a number"),
    'an object': (one(bbox=dict(x=1)), 'annotations[1].bbox'),
    'nested': (one(bbox=[[1, 2, 3, 4]]), 'annotations[1].bbox'),
    'no box': (one(bbox=None), 'annotations[1].bbox is None'),
    'infinite': (one(bbox=[float('inf'), 1, 2, 3]), 'annotations[1].bbox'),
    'relative': (every(bbox=[0.1, 0.2, 0.3, 0.4]), 'lie between 0 and 1: relative coordinates?'),
    'relative polygons': (every(segmentation=[[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]), 'lies between 0 and 1: relative'),
    'corners': (corners, 'warning: train: 4 of 4 boxes of own.json reach over the edge of their image: corners'),
    'negative': (every(bbox=[40, 30, -20, -20]), 'no box is left of 4'),
    'points': (one(segmentation=[[[1, 2], [3, 4], [5, 6]]]), 'annotations[1].segmentation[0]'),
    'pairs': (one(segmentation=[[1, 2], [3, 4], [5, 6]]), 'annotations[1].segmentation[0] has 2 numbers'),
    'two points': (one(segmentation=[[1, 2, 3, 4]]), 'has 4 numbers'),
    'an empty polygon': (one(segmentation=[[]]), 'has 0 numbers'),
    'odd': (
        one(segmentation=[[1, 2, 30, 2, 30, 40, 5]]),
        'warning: own.json: annotations[1].segmentation has no polygon',
    ),
    'a string': (one(segmentation='[[1, 2]]'), "annotations[1].segmentation is '[[1, 2]]'"),
    'far': (
        every(segmentation=[[5, 5, 900, 5, 900, 900]]),
        'annotations[0].segmentation reaches to 900, its image is 64 x 48',
    ),
    'swapped': (one(segmentation=dict(size=[64, 48], counts=[3072])), 'height and width are swapped'),
    'no size': (one(segmentation=dict(counts='abc')), 'expected dict(size='),
    'negative runs': (
        one(segmentation=dict(size=[48, 64], counts=[3080, -8])),
        'annotations[1].segmentation.counts are',
    ),
    'runs of parts': (
        one(segmentation=dict(size=[48, 64], counts=[0.5, 3071.5])),
        'annotations[1].segmentation.counts are',
    ),
    'an area of none': (one(area=None), 'annotations[1].area is None'),
    'an area below 0': (every(area=-1), 'no box is left of 4 in own.json: 4 area 0'),
    'crowds': (every(iscrowd=1), 'no box is left of 4 in own.json: 4 crowd'),
    'iscrowd of none': (one(iscrowd=None), 'annotations[1].iscrowd is None'),
    'ignored': (every(ignore=1), 'no box is left of 4 in own.json: 4 marked "ignore"'),
    'an id that is no whole number': (one(id=1.5), 'annotations[1].id is 1.5'),
    'one id': (every(id=7), 'annotations[1].id 7 has been that of another one already (and 2 more like it)'),
    'a category of none': (one(category_id=None), 'annotations[1].category_id is None, expected a number'),
    'a list of categories': (one(category_id=[3]), 'annotations[1].category_id is [3]'),
    'an unknown category': (
        one(category_id=99),
        'warning: own.json: annotations[1].category_id is the id of no category',
    ),
    'ids of categories as text': (
        lambda c: [item.update(id=str(item['id'])) for item in c['categories']],
        "categories[0].id is '3', expected a whole number (and 1 more like it)",
    ),
    'no images': (lambda c: c.update(images=[]), "error: own.json: 'images' is empty"),
    'an image without id': (lambda c: c['images'][0].pop('id'), "images[0] has no 'id'"),
    'an image twice': (
        lambda c: c['images'].append(dict(c['images'][0], id=3)),
        "warning: own.json: images[2].file_name 'a.jpg' has been that of another image already",
    ),
    'no area': (
        lambda c: [annotation.pop('area') for annotation in c['annotations']],
        'warning: own.json: annotations[0] has no "area" (4 of 4)',
    ),
}


def test_a_mask_of_one_pixel_among_others_is_a_mask(tmp_path) -> None:
    found = told(tmp_path, one(segmentation=[[0, 0, 1, 0, 1, 1, 0, 1]]))
    assert not [line for line in found if 'relative' in line]


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_are_told_once_with_their_place(fault, tmp_path) -> None:
    change, words = FAULTS[fault]
    found = told(tmp_path, change)
    assert len(found) == 1 and words in found[0], found


TEXT = json.dumps(SOUND).encode()


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'', 'is empty (0 bytes)'),
        (b' \n', 'is empty (2 bytes)'),
        (gzip.compress(TEXT), 'is compressed with gzip'),
        (b'PK\x03\x04rest', 'is a zip archive'),
        (b'\xef\xbb\xbf' + TEXT, 'byte order mark'),
        (TEXT.decode().encode('utf-16'), 'UTF-16'),
        (TEXT[:-20], 'is not valid JSON'),
        (b'{"id": 1}\n{"id": 2}\n', 'JSON lines'),
        (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
        (json.dumps(SOUND['annotations']).encode(), 'a list of annotations or results without images'),
        (b'{"data_list": []}', 'is in mmengine'),
        (b'{"images": [], "annotations": []}', "it has no list 'categories'"),
        (b'{"images": [], "categories": {"1": "cat"}}', "it has no list 'categories'"),
    ],
)
def test_files_that_are_something_else(content, words, tmp_path) -> None:
    path = tmp_path / 'own.json'
    path.write_bytes(content)
    with pytest.raises(UnreadableError) as fault:
        read_coco(path)
    assert words in str(fault.value)


@pytest.mark.parametrize(
    ('classes', 'names', 'words'),
    [
        (('cat', 'dog'), ('Cat', 'dog'), "nearest: 'Cat'"),
        (('cat', 'dog'), ('cat ', 'dog'), "nearest: 'cat '"),
        (('cat', 'dog'), ('\ufeffcat', 'dog'), "nearest: '\\ufeffcat'"),
        (('girafé',), (unicodedata.normalize('NFD', 'girafé'),), 'in another Unicode form'),
        (('cat', 'dog'), ('cat', 'dog', 'cat'), "'cat' more than once"),
        (('cat', 'dog'), ('dog', 'cat'), "position 0 is 'cat' here and 'dog' there"),
        (('cat',), (), "'categories' is empty"),
    ],
)
def test_names_of_classes(classes, names, words) -> None:
    found = [str(finding) for finding in check_categories('classes', 'own.json', classes, names)]
    assert len(found) == 1 and words in found[0], found
