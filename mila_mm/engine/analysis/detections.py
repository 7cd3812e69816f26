"""Detections against the truth: AP by class, precision over recall, and what kind each error is."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# The kinds of Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors" (ECCV 2020), with its
# thresholds: a box overlaps enough for a hit, or still so little that it is background.
FOREGROUND, BACKGROUND = 0.5, 0.1
KINDS = ('class', 'location', 'class and location', 'duplicate', 'background', 'missed')
# Areas in pixels that part small, medium and large, as COCO has them.
SIZES = {'small': (0, 32**2), 'medium': (32**2, 96**2), 'large': (96**2, 1e10)}


@dataclass
class Objects:
    """Objects of one image.

    Attributes:
        boxes: (N, 4) float as x1, y1, x2, y2 in pixels.
        labels: (N,) int.
        scores: (N,) float; ones for the truth.
        ignored: (N,) bool, crowds of the truth.
        masks: N run-length encodings, or None for boxes alone.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    ignored: np.ndarray
    masks: list[dict[str, Any]] | None = None


@dataclass
class Image:
    """One tested image: its file, size (height, width), truth and prediction."""

    path: str
    size: tuple[int, int]
    truth: Objects
    found: Objects


@dataclass
class Summary:
    """What comes of a set of images.

    Attributes:
        per_class: Class to ``ap``, ``ap50``, ``truth`` (objects) and ``found`` (detections above the threshold).
        by_size: 'small', 'medium', 'large' to AP.
        curves: Class to precision at 101 recalls from 0 to 1, IoU 0.5.
        kinds: Kind of error to number.
        kinds_by_size: Size to kind to number.
        confusion: (C + 1, C + 1) int: rows are the truth, columns the prediction, the last of each is nothing.
        errors: Errors of each image.
    """

    per_class: dict[str, dict[str, float]]
    by_size: dict[str, float]
    curves: dict[str, np.ndarray]
    kinds: Counter[str] = field(default_factory=Counter)
    kinds_by_size: dict[str, Counter[str]] = field(default_factory=lambda: {size: Counter() for size in SIZES})
    confusion: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), int))
    errors: list[int] = field(default_factory=list)


def summarise(images: Sequence[Image], classes: Sequence[str], score_thr: float, masks: bool) -> Summary:
    """Evaluate detections as COCO does, and sort the errors.

    Args:
        images: The tested images.
        classes: Class names.
        score_thr: Detections below it are no errors and stand in no confusion matrix; AP takes all.
        masks: Whether masks are compared; else boxes.
    """
    summary = _average_precision(images, classes, masks)
    summary.confusion = np.zeros((len(classes) + 1, len(classes) + 1), int)
    for image in images:
        kept = image.found.scores >= score_thr
        summary.errors.append(_sort_errors(image, kept, summary, len(classes)))
        for label in image.found.labels[kept]:
            summary.per_class[classes[label]]['found'] += 1
    return summary


def _average_precision(images: Sequence[Image], classes: Sequence[str], masks: bool) -> Summary:
    evaluated = _evaluate(images, len(classes), masks)
    # precision: (IoU thresholds, recalls, classes, areas, numbers of detections); -1 where there is no object
    precision = None if evaluated is None else evaluated.eval['precision'][..., -1]
    per_class, curves = {}, {}
    for index, name in enumerate(classes):
        own = None if precision is None else precision[:, :, index, 0]
        known = own is not None and (own > -1).any()
        truth = sum(int(((image.truth.labels == index) & ~image.truth.ignored).sum()) for image in images)
        per_class[name] = {
            'ap': float(own[own > -1].mean()) if known else float('nan'),
            'ap50': float(own[0][own[0] > -1].mean()) if known else float('nan'),
            'truth': truth,
            'found': 0,
        }
        if known:
            curves[name] = np.clip(own[0], 0, 1)
    by_size = {}
    for area, size in enumerate(SIZES, start=1):
        own = np.zeros(0) if precision is None else precision[:, :, :, area]
        by_size[size] = float(own[own > -1].mean()) if (own > -1).any() else float('nan')
    return Summary(per_class, by_size, curves)


def _evaluate(images: Sequence[Image], num_classes: int, masks: bool) -> Any:
    """Run COCO's evaluation, faster-coco-eval's where it is installed, which gives the same figures in less time."""
    try:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as Evaluation
    except ImportError:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval as Evaluation
    truth, found = COCO(), COCO()
    header = {
        'info': {},
        'images': [{'id': i, 'height': im.size[0], 'width': im.size[1]} for i, im in enumerate(images)],
        'categories': [{'id': index, 'name': str(index)} for index in range(num_classes)],
    }
    truth.dataset = {**header, 'annotations': [a for i, im in enumerate(images) for a in _entries(i, im.truth, masks)]}
    found.dataset = {**header, 'annotations': [a for i, im in enumerate(images) for a in _entries(i, im.found, masks)]}
    for sets in (truth, found):
        for number, entry in enumerate(sets.dataset['annotations']):
            entry['id'] = number + 1
    if not truth.dataset['annotations']:
        return None
    with redirect_stdout(io.StringIO()):
        truth.createIndex()
        found.createIndex()
        evaluation = Evaluation(truth, found, 'segm' if masks else 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def _entries(image_id: int, objects: Objects, masks: bool) -> list[dict[str, Any]]:
    from pycocotools import mask as coco_mask

    entries = []
    for index, (x1, y1, x2, y2) in enumerate(objects.boxes.tolist()):
        entry = {
            'image_id': image_id,
            'category_id': int(objects.labels[index]),
            'bbox': [x1, y1, x2 - x1, y2 - y1],
            'area': (x2 - x1) * (y2 - y1),
            'iscrowd': int(objects.ignored[index]),
            'score': float(objects.scores[index]),
        }
        if masks and objects.masks is not None:
            entry.update(segmentation=objects.masks[index], area=float(coco_mask.area(objects.masks[index])))
        entries.append(entry)
    return entries


def _sort_errors(image: Image, kept: np.ndarray, summary: Summary, num_classes: int) -> int:
    """Give each detection and each missed object of an image its kind, and return how many errors there are."""
    from pycocotools import mask as coco_mask

    truth, found, nothing = image.truth, image.found, num_classes
    order = np.argsort(-found.scores[kept], kind='stable')
    boxes, labels = found.boxes[kept][order], found.labels[kept][order]
    real = ~truth.ignored
    overlap = _overlaps(boxes, truth.boxes, truth.ignored, coco_mask)
    free, rest = _matched(overlap, labels, truth)
    for row in set(range(len(labels))) - set(rest):
        summary.confusion[labels[row], labels[row]] += 1
    # Objects that nothing found, and of these the ones that a detection of a known error was meant for
    named, covered = ~free, ~free
    errors: list[tuple[str, float]] = []
    for row in rest:
        if overlap.shape[1] and (overlap[row] * truth.ignored).max() >= FOREGROUND:
            continue  # in a crowd, where COCO counts nothing
        kind, other = _kind(overlap[row] * real, truth.labels == labels[row])
        errors.append((kind, _area(boxes[row])))
        if kind in ('class', 'location'):
            covered[other] = True
        if kind == 'class' and not named[other]:
            named[other] = True
            summary.confusion[truth.labels[other], labels[row]] += 1
        else:
            summary.confusion[nothing, labels[row]] += 1
    for index in np.flatnonzero(real & ~named):
        summary.confusion[truth.labels[index], nothing] += 1
    errors += [('missed', _area(truth.boxes[index])) for index in np.flatnonzero(real & ~covered)]
    for kind, area in errors:
        summary.kinds[kind] += 1
        size = next(name for name, (least, most) in SIZES.items() if least <= area < most)
        summary.kinds_by_size[size][kind] += 1
    return len(errors)


def _overlaps(found: np.ndarray, truth: np.ndarray, crowd: np.ndarray, coco_mask: Any) -> np.ndarray:
    if not len(found) or not len(truth):
        return np.zeros((len(found), len(truth)))
    both = [
        np.ascontiguousarray(np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], axis=1), float) for b in (found, truth)
    ]
    return np.asarray(coco_mask.iou(both[0], both[1], crowd.astype(np.uint8).tolist()))


def _matched(overlap: np.ndarray, labels: np.ndarray, truth: Objects) -> tuple[np.ndarray, list[int]]:
    """Match the detections, the surest first, and return which objects are left, (N,) bool, and which detections."""
    free, rest = ~truth.ignored, []
    for row, label in enumerate(labels):
        same = overlap[row] * (truth.labels == label) * free
        if same.size and same.max() >= FOREGROUND:
            free[same.argmax()] = False
        else:
            rest.append(row)
    return free, rest


def _kind(overlap: np.ndarray, same: np.ndarray) -> tuple[str, int]:
    """Return the kind of a detection that is no hit, in TIDE's order, and the object it is nearest to.

    Args:
        overlap: (N,) with each object.
        same: (N,) bool, objects of its class.
    """
    if not overlap.size or overlap.max() < BACKGROUND:
        return 'background', -1
    own, other = overlap * same, overlap * ~same
    if BACKGROUND <= own.max() < FOREGROUND:
        return 'location', int(own.argmax())
    if other.max() >= FOREGROUND:
        return 'class', int(other.argmax())
    if own.max() >= FOREGROUND:
        return 'duplicate', int(own.argmax())
    return 'class and location', int(other.argmax())


def _area(box: np.ndarray) -> float:
    return float(max(box[2] - box[0], 0) * max(box[3] - box[1], 0))
