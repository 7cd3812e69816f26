"""Where the names of classes stand on a drawn label map: inside of the picture, and none on another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np


class NamePlaces:
    """What mmseg's visualizer asks for the place of a name, which it gives its class's centre by itself.

    Args:
        centre: Takes the mask (H, W) of a class, gives [x, y] in pixels.
        labels: The label map (H, W).
        names: Class names.
    """

    def __init__(self, centre: Callable[[np.ndarray], Any], labels: np.ndarray, names: Sequence[str]) -> None:
        self._centre, self._labels, self._names = centre, labels, names
        self.taken: list[tuple[int, int, int, int]] = []

    def __call__(self, mask: np.ndarray) -> np.ndarray:
        """Return the upper left corner [x, y] of the name of a mask's class."""
        x, y = (int(value) for value in self._centre(mask))
        width, height = self._size(str(self._names[int(self._labels[y, x])]))
        right, lowest = self._labels.shape[1] - width, self._labels.shape[0] - height
        x, y = max(0, min(x, right)), max(0, min(y, lowest))
        free = (top for top in _nearest(y, lowest) if not self._meets(x, top, width, height))
        y = next(free, y)
        self.taken.append((x, y, width, height))
        return np.array([x, y])

    def _size(self, name: str) -> tuple[int, int]:
        """Return width and height of a name in its frame, as mmseg draws it."""
        sides = self._labels.shape[:2]
        line = 1 if min(sides) < 300 else 2
        (width, height), baseline = cv2.getTextSize(name, cv2.FONT_HERSHEY_SIMPLEX, min(sides) / 500, line)
        return width + baseline + line, height + baseline + line

    def _meets(self, x: int, y: int, width: int, height: int) -> bool:
        return any(x < u + w and u < x + width and y < v + h and v < y + height for u, v, w, h in self.taken)


def _nearest(start: int, last: int) -> Iterator[int]:
    """Yield the rows from 0 to ``last``, the nearest first."""
    yield from sorted(range(max(last, 0) + 1), key=lambda row: abs(row - start))
