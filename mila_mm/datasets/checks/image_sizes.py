"""Whether images have the size that their annotations are for, as OpenCV loads them: turned by EXIF."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2

from mila_mm.datasets.checks.findings import Finding, error, note, warning

# Of the images looked at, more than this share with a wrong size is an error, less a warning.
_MANY = 0.05


def judge_sizes(
    key: str, wrong: Sequence[tuple[Any, Sequence[int], Sequence[int]]], seen: int, total: int
) -> list[Finding]:
    """Say what is wrong with the sizes of a sample of images.

    Args:
        key: Where the data set stands in the config.
        wrong: Path, size as loaded and size that is told, both (height, width), of those that differ.
        seen: Images looked at.
        total: Images of the data set.
    """
    findings = []
    if wrong:
        path, got, told = wrong[0]
        turned = ''
        if tuple(got) == tuple(told)[::-1]:
            by_exif = _is_turned(path, got)
            turned = '; turned by its EXIF orientation' if by_exif else '; width and height are swapped there'
        text = (
            f'image {path} is {got[1]} x {got[0]} (width x height) as loaded, its annotations are for '
            f'{told[1]} x {told[0]}{turned} ({len(wrong)} of {seen} images looked at)'
        )
        findings.append((error if len(wrong) > _MANY * seen else warning)(key, text))
    if 0 < seen < total:
        findings.append(note(key, f'sizes of {seen} of {total} images were looked at'))
    return findings


def _is_turned(path: Any, got: Sequence[int]) -> bool:
    """Tell whether an image is loaded turned, as its EXIF orientation bids."""
    stored = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return stored is not None and stored.shape[:2] != tuple(got)
