"""The published files and their names."""

import pytest

from mila_mm.errors import UserError
from mila_mm.weights.source.published import PUBLISHED, find


def test_every_published_file_has_a_name_and_an_https_address():
    assert {
        'tiny-in1k',
        'small-in1k',
        'base-in1k',
        'mask-rcnn-tiny-1x',
        'mask-rcnn-tiny-3x',
        'mask-rcnn-small-1x',
        'mask-rcnn-small-3x',
        'mask-rcnn-base-1x',
        'upernet-base-160k',
    } == set(PUBLISHED)
    assert all(file.url.startswith('https://') for file in PUBLISHED.values())
    assert len({file.url for file in PUBLISHED.values()}) == len(PUBLISHED)
    assert find('mila://tiny-in1k') is PUBLISHED['tiny-in1k']


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match='did you mean mila://tiny-in1k'):
        find('mila://tiny-1k')


def test_results_are_those_of_the_paper() -> None:
    """Figures of arXiv 2405.16605 for the models whose files have been published."""
    assert {name: file.result for name, file in PUBLISHED.items()} == {
        'tiny-in1k': 'ImageNet-1K top-1 83.5',
        'small-in1k': 'ImageNet-1K top-1 84.4',
        'base-in1k': 'ImageNet-1K top-1 85.3',
        'mask-rcnn-tiny-1x': 'COCO box AP 46.8, mask AP 42.1',
        'mask-rcnn-tiny-3x': 'COCO box AP 48.8, mask AP 43.8',
        'mask-rcnn-small-1x': 'COCO box AP 49.2, mask AP 44.2',
        'mask-rcnn-small-3x': 'COCO box AP 50.5, mask AP 44.9',
        'mask-rcnn-base-1x': 'COCO box AP 50.5, mask AP 45.0',
        'upernet-base-160k': 'ADE20K mIoU 51.9',
    }
