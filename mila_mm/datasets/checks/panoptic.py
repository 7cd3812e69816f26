"""Label maps of panoptic segmentation: a PNG whose colours are ids of segments, R + 256 G + 256² B."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from mila_mm.datasets.checks.findings import Finding, error, shown, warning


def fault_of_panoptic(
    path: str, raw: np.ndarray, segments: Collection[int], image_path: str, image_shape: Sequence[int]
) -> Finding | None:
    """Check one map against the segments that its annotation lists.

    Args:
        path: Its file.
        raw: The decoded file, (H, W) or (H, W, 3) uint8 as BGR.
        segments: Ids in the annotation's ``segments_info``.
        image_path: The file of its image.
        image_shape: Height and width of that image.
    """
    where = f'panoptic map {path}'
    if raw.ndim != 3 or raw.shape[-1] != 3 or raw.dtype != np.uint8:
        kind = f'{raw.dtype} of {raw.shape[-1] if raw.ndim == 3 else 1} channels'
        return error(where, f'is {kind}, expected RGB of 8 bit: each colour is the id of a segment, R + 256 G + 256² B')
    if tuple(raw.shape[:2]) != tuple(image_shape[:2]):
        own, other = (f'{shape[1]} x {shape[0]}' for shape in (raw.shape, image_shape))
        return error(where, f'is {own} (width x height), its image {image_path} is {other}')
    ids = set(np.unique(raw.astype(np.int64) @ np.array([65536, 256, 1])).tolist())
    absent, spare = sorted(set(segments) - ids), sorted(ids - set(segments) - {0})
    if segments and len(absent) == len(segments):
        return error(
            where, f'holds none of the segments that its annotation lists: {shown(absent)}, but {shown(spare)}'
        )
    if absent:
        return warning(where, f'lacks {shown(absent)}, which its annotation lists')
    if spare:
        return warning(where, f'holds {shown(spare)}, which its annotation does not list: those pixels are ignored')
    return None
