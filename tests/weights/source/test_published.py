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
