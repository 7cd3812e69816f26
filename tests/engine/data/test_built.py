"""Looking at a data set that has been built: as much of it as there is time for."""

import time
from typing import Any

import numpy as np
import pytest

from mila_mm.engine.data import built


class Leaf:
    """A data set of images that are told to be 8 x 6."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def get_data_info(self, index: int) -> dict[str, Any]:
        return dict(img_path=f'{index}.png', height=8, width=6)


@pytest.mark.parametrize(('left', 'expected'), [(-1.0, 1), (3600.0, 5)], ids=['no time', 'an hour'])
def test_sizes_are_compared_until_the_time_is_over_but_of_one_image_at_least(left, expected) -> None:
    seen = []

    def load(info: dict[str, Any]) -> dict[str, Any]:
        seen.append(info['img_path'])
        return {**info, 'ori_shape': (8, 6), 'img': np.zeros((8, 6, 3), np.uint8)}

    looked = built.Looked()
    built._check_sizes(Leaf(5), 'train', load, range(5), time.monotonic() + left, looked)
    assert len(seen) == expected and not looked.has_errors()
    notes = [finding.message for finding in looked.findings]
    assert notes == ([] if expected == 5 else ['sizes of 1 of 5 images were looked at'])
