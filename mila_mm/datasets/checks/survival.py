"""What becomes of annotations on their way through a loader of COCO's kind: which survive, which do not, and why."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from mila_mm.datasets.checks.findings import Finding, error, note, warning

# Share of the boxes of a split above which their loss is worth a line that a person sees.
_MUCH = 0.05
# Pixels by which boxes may reach over their image, and the share above which those that do are likely to be corners.
_EDGE, _MANY_OVER = 2, 0.2

_REASONS = {
    'ignore': 'marked "ignore"',
    'outside': 'outside of the image',
    'area': 'area 0',
    'thin': 'less than a pixel wide or high',
    'other': 'of categories that are no class',
    'small': 'on images below filter_cfg.min_size',
}


@dataclass(frozen=True)
class Filter:
    """What a data set keeps, after mmdet's ``CocoDataset``.

    Attributes:
        classes: Class names.
        min_size: Least shorter side of an image, in pixels.
        filter_empty: Whether images without an annotation of the classes go.
        drop_images: Whether images are filtered at all (not in ``test_mode``).
    """

    classes: tuple[str, ...]
    min_size: float = 0
    filter_empty: bool = False
    drop_images: bool = True


def loaded_images(data: dict[str, Any], keep: Filter) -> list[dict[str, Any]]:
    """Return the images of a well-formed file that a loader of COCO's kind keeps, in the file's order."""
    small, empty = _images_left_out(data, keep)
    return [image for image in data['images'] if image['id'] not in small | empty]


def _images_left_out(data: dict[str, Any], keep: Filter) -> tuple[set[Any], set[Any]]:
    """Return the ids of images that are too small and of those without an annotation of the classes."""
    if not keep.drop_images:
        return set(), set()
    wanted = {category['id'] for category in data['categories'] if category['name'] in set(keep.classes)}
    annotated = {item['image_id'] for item in data.get('annotations', []) if item['category_id'] in wanted}
    small = {image['id'] for image in data['images'] if min(image['width'], image['height']) < keep.min_size}
    empty = {image['id'] for image in data['images'] if keep.filter_empty and image['id'] not in annotated}
    return small, empty


def count_survivors(data: dict[str, Any], keep: Filter) -> dict[str, Any]:
    """Count what a loader of COCO's kind keeps of a file.

    Args:
        data: Content of a well-formed file.
        keep: What it keeps.

    Returns:
        ``images``, ``images_loaded``, ``images_small``, ``images_empty``, ``boxes``, ``boxes_loaded``, ``crowd``,
        ``dropped`` (reason to number), ``over_the_edge`` and ``relative`` (boxes that look
        like corners and like shares of the image), ``per_class`` (name to boxes) and ``smallest_side`` of the images.
    """
    wanted = set(keep.classes)
    names = {category['id']: category['name'] for category in data['categories'] if category['name'] in wanted}
    sizes = {image['id']: (image['width'], image['height']) for image in data['images']}
    small, empty = _images_left_out(data, keep)
    gone = small | empty
    dropped: Counter[str] = Counter()
    per_class: Counter[str] = Counter()
    crowd = over = relative = 0
    for item in data.get('annotations', []):
        reason = _reason(item, sizes, names)
        x, y, w, h = item['bbox']
        width, height = sizes.get(item['image_id'], (math.inf, math.inf))
        over += x + w > width + _EDGE or y + h > height + _EDGE
        relative += 0 < w <= 1 and 0 < h <= 1 and x <= 1 and y <= 1
        if reason is None and item['image_id'] in gone:
            reason = 'small'
        if reason is not None:
            dropped[reason] += 1
            continue
        if item.get('iscrowd'):
            crowd += 1
        else:
            per_class[names[item['category_id']]] += 1
    return {
        'images': len(sizes),
        'images_loaded': len(sizes) - len(gone),
        'images_small': len(small),
        'images_empty': len(empty - small),
        'boxes': len(data.get('annotations', [])),
        'boxes_loaded': sum(per_class.values()),
        'crowd': crowd,
        'over_the_edge': over,
        'relative': relative,
        'dropped': dict(dropped),
        'per_class': {name: per_class.get(name, 0) for name in keep.classes},
        'smallest_side': min((min(size) for size in sizes.values()), default=0),
    }


def _reason(item: dict[str, Any], sizes: dict[Any, tuple[int, int]], names: dict[Any, str]) -> str | None:
    """Return why mmdet's loader passes an annotation over, in its order, None where it does not."""
    if item.get('ignore', False):
        return 'ignore'
    width, height = sizes.get(item['image_id'], (0, 0))
    x, y, w, h = item['bbox']
    if max(0, min(x + w, width) - max(x, 0)) * max(0, min(y + h, height) - max(y, 0)) == 0:
        return 'outside' if w > 0 and h > 0 else 'thin'
    if item.get('area', w * h) <= 0:
        return 'area'
    if w < 1 or h < 1:
        return 'thin'
    return None if item['category_id'] in names else 'other'


def judge_survivors(where: str, path: str, counts: dict[str, Any], training: bool) -> list[Finding]:
    """Say what is wrong with the share that survives.

    Args:
        where: Key of the data set in the config.
        path: Its annotation file.
        counts: As :func:`count_survivors` returns them.
        training: Whether a model learns from it.
    """
    findings = []
    reasons = counts['dropped']
    told = ', '.join(f'{number} {_REASONS[reason]}' for reason, number in sorted(reasons.items(), key=lambda i: -i[1]))
    wanted = counts['boxes'] - reasons.get('other', 0) - reasons.get('ignore', 0)
    lost = wanted - counts['boxes_loaded'] - counts['crowd']
    if not counts['images']:
        return [error(where, f'{path} has no image')]
    if not counts['images_loaded']:
        return [error(where, f'no image of {path} is left: {_images_gone(counts)}{_and(told)}')]
    if not counts['boxes']:
        text = f'{path} has no annotation'
        return [error(where, f'{text}: there is nothing to learn') if training else warning(where, text)]
    if counts['relative'] > wanted / 2:
        text = f'{counts["relative"]} of {counts["boxes"]} boxes of {path} lie between 0 and 1'
        return [error(where, f'{text}: relative coordinates? Expected [x, y, width, height] in pixels')]
    if not counts['boxes_loaded']:
        text = f'no box is left of {counts["boxes"]} in {path}: {told or str(counts["crowd"]) + " crowd"}'
        # A small validation set may lack a rare class; the figures are empty then, and not wrong.
        return [warning(where, text) if set(reasons) == {'other'} and not training else error(where, text)]
    if counts['over_the_edge'] > _MANY_OVER * counts['boxes']:
        text = f'{counts["over_the_edge"]} of {counts["boxes"]} boxes of {path} reach over the edge of their image'
        findings.append(warning(where, f'{text}: corners [x1, y1, x2, y2]? Expected [x, y, width, height]'))
    if lost > _MUCH * wanted:
        share = round(100 * lost / wanted)
        findings.append(warning(where, f'{share} % of the boxes of {path} are not used ({lost} of {wanted}): {told}'))
    elif told:
        findings.append(note(where, f'{path}: {sum(reasons.values())} of {counts["boxes"]} boxes are not used: {told}'))
    if counts['images_small'] > _MUCH * counts['images']:
        findings.append(warning(where, f'{_images_gone(counts)} of {path} are not used'))
    never = [name for name, number in counts['per_class'].items() if not number]
    if never and len(never) < len(counts['per_class']):
        findings.append(note(where, f'{len(never)} of {len(counts["per_class"])} classes have no box in {path}'))
    return findings


def _images_gone(counts: dict[str, Any]) -> str:
    parts = []
    if counts['images_small']:
        parts.append(
            f'{counts["images_small"]} of {counts["images"]} images are below filter_cfg.min_size '
            f'(the smallest side of any is {counts["smallest_side"]})'
        )
    if counts['images_empty']:
        parts.append(f'{counts["images_empty"]} of {counts["images"]} images have no annotation of the classes')
    return '; '.join(parts)


def _and(text: str) -> str:
    return f'; boxes: {text}' if text else ''
