"""Segmentations of COCO's annotations: polygons and run-length encodings of both kinds."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

from mila_mm.datasets.checks.faults import Faults, are_numbers
from mila_mm.datasets.checks.findings import brief
from mila_mm.datasets.checks.needs import Needs

# Share of the longer side of an image by which points may lie outside of it.
_OVER = 0.1
# Side of an image up to which a polygon in the first pixel may be meant.
_FEW_PIXELS = 8


def check_mask(
    index: int, annotation: dict[str, Any], images: dict[Any, tuple[int, int]], needs: Needs, faults: Faults
) -> None:
    """Check the mask of one annotation.

    Args:
        index: Its position in the file.
        annotation: The annotation.
        images: Id to height and width of its images.
        needs: What is done with it.
        faults: Takes what is wrong.
    """
    segmentation = annotation.get('segmentation')
    here = f'annotations[{index}].segmentation'
    if not segmentation:
        if needs.masks and not annotation.get('ignore'):
            what = f'{here} is {brief(segmentation)}' if 'segmentation' in annotation else f'{here} is missing'
            faults.add('no mask', f'{what}, but the config reads masks (with_mask=True, or metric segm)')
        return
    if isinstance(segmentation, dict):
        _check_runs(here, segmentation, _size_of(annotation['image_id'], images), needs, faults)
    elif isinstance(segmentation, list):
        _check_polygons(here, segmentation, _size_of(annotation['image_id'], images), needs, faults)
    elif needs.masks:
        faults.add('mask', f'{here} is {brief(segmentation)}, expected a list of polygons or a run-length encoding')


def _size_of(image_id: Any, images: dict[Any, tuple[int, int]]) -> tuple[int, int]:
    return images.get(image_id, (0, 0)) if isinstance(image_id, (int, str)) else (0, 0)


def _level(needs: Needs) -> str:
    return 'error' if needs.masks else 'warning'


def _check_polygons(here: str, polygons: list[Any], size: tuple[int, int], needs: Needs, faults: Faults) -> None:
    if not isinstance(polygons[0], (list, array)):
        what = 'a flat list of numbers' if are_numbers(polygons) else f'a list of {type(polygons[0]).__name__}'
        faults.add(
            'flat', f'{here} is {what}, expected a list of polygons: [[x0, y0, x1, y1, ...], ...]', _level(needs)
        )
        return
    usable = far = within = 0
    limit = (1 + _OVER) * max(size)
    for position, polygon in enumerate(polygons):
        if not are_numbers(polygon):
            faults.add(
                'polygon', f'{here}[{position}] is {brief(polygon)}, expected [x0, y0, x1, y1, ...]', _level(needs)
            )
            return
        usable += len(polygon) >= 6 and len(polygon) % 2 == 0
        reach = max(polygon, default=0)
        far += bool(limit and reach > limit)
        within += 0 < reach <= 1
    if needs.masks and needs.evaluation and len(polygons[0]) <= 4:
        faults.add(
            'short polygon',
            f'{here}[0] has {len(polygons[0])} numbers, expected a polygon of three points or more: [x0, y0, x1, y1, '
            "x2, y2, ...]; COCO's evaluation does not read it",
        )
    elif not usable and needs.masks:
        faults.add(
            'short polygons',
            f'{here} has no polygon of three points or more (an even count of at least 6 numbers), got '
            f'{len(polygons[0])} numbers: the loader ignores the whole instance',
            'warning',
        )
    if limit > _FEW_PIXELS:
        faults.asked['relative polygons'] += 1  # a few masks of a pixel at the corner are masks
    if within == len(polygons) and limit > _FEW_PIXELS:
        faults.add(
            'relative polygons',
            f'{here} lies between 0 and 1: relative coordinates? Expected [x0, y0, x1, y1, ...] in pixels',
            _level(needs),
        )
    if far and needs.masks:
        faults.add(
            'far polygons',
            f'{here} reaches to {max(max(polygon) for polygon in polygons):g}, its image is {size[1]} x {size[0]} '
            '(width x height): polygons of an image of another size?',
            'warning',
        )


def _check_runs(here: str, runs: dict[str, Any], size: tuple[int, int], needs: Needs, faults: Faults) -> None:
    level = _level(needs)
    counts, own = runs.get('counts'), runs.get('size')
    if not isinstance(counts, (list, str)) or not are_numbers(own) or len(own) != 2:
        faults.add('runs', f'{here} is {brief(runs)}, expected dict(size=[height, width], counts=...)', level)
        return
    if all(size) and list(own) != list(size):
        why = ': height and width are swapped' if list(own) == list(size)[::-1] else ''
        faults.add('runs size', f'{here}.size is {brief(own)}, the image has [height, width] {list(size)}{why}', level)
        return
    if isinstance(counts, list):
        sound = all(type(run) is int and run >= 0 for run in counts)
        if not sound or sum(counts) != own[0] * own[1]:
            said = f'add up to {sum(counts)}, expected {own[0]} * {own[1]}' if sound else f'are {brief(counts)}'
            faults.add('runs sum', f'{here}.counts {said}, expected whole numbers of zeros, ones, zeros, ...', level)
    elif needs.masks and not _decodes(counts, own):
        faults.add('runs text', f'{here}.counts is no compressed run-length encoding of {list(own)}', level)
    if needs.polygons_only:
        faults.add(
            'runs unread', f'{here} is run-length encoded, which poly2mask=False ignores with its instance', 'warning'
        )


def _decodes(counts: str, size: Sequence[int]) -> bool:
    from pycocotools import mask

    decode: Callable[[dict[str, Any]], Any] = mask.decode
    try:
        decode({'size': [int(side) for side in size], 'counts': counts.encode()})
    except (ValueError, TypeError, UnicodeError):
        return False
    return True
