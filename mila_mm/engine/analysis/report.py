"""Test a checkpoint and write what it comes to: tables, figures, the worst images, one page."""

from __future__ import annotations

import colorsys
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from mila_mm.engine.analysis.collect import CollectHook
from mila_mm.engine.analysis.detections import KINDS, Image, Objects, summarise
from mila_mm.engine.analysis.label_maps import per_class
from mila_mm.engine.config.checks import check_work_dir
from mila_mm.engine.testing import test
from mila_mm.errors import UserError
from mila_mm.visualization.error_report import save_bars, save_confusion, save_curves, write_page
from mila_mm.visualization.predictions import Labels, Sample, save_predictions

# Inches of a picture of one image: small objects must stay visible.
_PANEL = 4.6


def analyze(
    config: str, checkpoint: str, out: Path, *, worst: int = 20, score_thr: float = 0.3, cfg_options: Sequence[str] = ()
) -> dict[str, Any]:
    """Test a checkpoint and write figures, tables and a page.

    Args:
        config: As for :func:`mila_mm.engine.test`.
        checkpoint: As there.
        out: Folder to write to.
        worst: Images to draw, truth beside prediction. Defaults to 20.
        score_thr: Score from which a detection counts as one. Defaults to 0.3.
        cfg_options: Overrides as ``key.of.entry=value``.

    Returns:
        The metrics of the test and the tables, as JSON can hold them.

    Raises:
        UserError: If the test fails, or there is no truth to compare with.
    """
    check_work_dir(out, '--out')
    hook = CollectHook()
    options = [*cfg_options, f'work_dir={out / "test"}']
    metrics = test(config, checkpoint, cfg_options=options, hooks=[hook])
    out.mkdir(parents=True, exist_ok=True)
    if hook.images:
        tables, pictures, notes = _detections(hook, out, worst, score_thr)
    elif hook.confusion is not None:
        tables, pictures, notes = _label_maps(hook, out, worst)
    else:
        raise UserError(f'{config}: there are no boxes, masks or label maps with a truth to compare with')
    result = {'metrics': {key: float(value) for key, value in metrics.items()}, **tables}
    (out / 'analysis.json').write_text(json.dumps(result, indent=2) + '\n')
    first = ', '.join(f'{key} {value:.3f}' for key, value in list(result['metrics'].items())[:6])
    for heading, rows in tables.items():
        if absent := len(rows) - len(occurring(rows)):
            notes.append(f'{heading}: {absent} of {len(rows)} do not occur.')
    shown = {heading: occurring(rows) for heading, rows in tables.items()}
    write_page(out / 'index.html', f'{Path(config).stem}: what the test came to', shown, pictures, [first, *notes])
    return result


def occurring(rows: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Return a table without the rows of what is neither in the truth nor found: no figure, and all counts are 0."""

    def occurs(row: Mapping[str, float]) -> bool:
        figures = [value for value in row.values() if isinstance(value, float)]
        counts = [value for value in row.values() if isinstance(value, int)]
        return not figures or any(counts) or not all(math.isnan(value) for value in figures)

    return {name: row for name, row in rows.items() if occurs(row)}


def _detections(hook: CollectHook, out: Path, worst: int, score_thr: float) -> tuple[dict, list, list[str]]:
    masks = hook.has_masks and all(image.truth.masks is not None for image in hook.images)
    summary = summarise(hook.images, hook.classes, score_thr, masks)
    what = 'masks' if masks else 'boxes'
    save_curves(summary.curves, out / 'precision_recall.png', f'Precision over recall, {what}, IoU 0.5')
    save_confusion(
        summary.confusion, [*hook.classes, '(nothing)'], out / 'confusion.png', f'Boxes of score {score_thr} and above'
    )
    save_bars(summary.kinds_by_size, KINDS, out / 'errors.png', f'Errors by kind and size, score {score_thr} and above')
    pictures = [
        ('precision_recall.png', f'Precision over recall of each class, {what}, IoU 0.5.'),
        ('confusion.png', 'Rows are the truth, columns the prediction; (nothing) is background or a missed object.'),
        (
            'errors.png',
            'Kinds after TIDE (Bolya et al., ECCV 2020): right place but wrong class; wrong place (IoU 0.1 to 0.5); '
            'both; found twice; background; missed. By size of the box: small below 32 x 32 pixels, large from 96.',
        ),
    ]
    order = sorted(range(len(hook.images)), key=lambda index: -summary.errors[index])[:worst]
    for rank, index in enumerate(order):
        image = hook.images[index]
        name = f'worst/{rank + 1:02}_{Path(image.path).stem}.png'
        _draw(_sample(image, score_thr), hook, out / name, f'{Path(image.path).name}: {summary.errors[index]} errors')
        pictures.append((name, f'{image.path}: {summary.errors[index]} errors'))
    kinds = {kind: {'errors': summary.kinds.get(kind, 0)} for kind in KINDS}
    sizes = {size: {'AP': value} for size, value in summary.by_size.items()}
    tables = {'AP by class': summary.per_class, 'AP by size': sizes, 'Errors by kind': kinds}
    return tables, pictures, [f'{len(hook.images)} images; AP of {what}.']


def _label_maps(hook: CollectHook, out: Path, worst: int) -> tuple[dict, list, list[str]]:
    assert hook.confusion is not None
    save_confusion(hook.confusion, hook.classes, out / 'confusion.png', 'Pixels')
    pictures = [('confusion.png', 'Rows are the truth, columns the prediction, in percent of the pixels of the truth.')]
    known = [index for index, (_, mean, *_) in enumerate(hook.scores) if np.isfinite(mean)]
    for rank, index in enumerate(sorted(known, key=lambda i: hook.scores[i][1])[: min(worst, 20)]):
        path, mean, truth, found = hook.scores[index]
        name = f'worst/{rank + 1:02}_{Path(path).stem}.png'
        sample = Sample(_read(path, truth.shape), _as_labels(truth, hook.classes), _as_labels(found, hook.classes))
        _draw(sample, hook, out / name, f'{Path(path).name}: mIoU {mean:.3f}')
        pictures.append((name, f'{path}: mIoU {mean:.3f}'))
    return {'IoU by class': per_class(hook.confusion, hook.classes)}, pictures, [f'{len(hook.scores)} images.']


def _as_labels(labels: np.ndarray, classes: Sequence[str]) -> Labels:
    present = [int(label) for label in np.unique(labels) if label < len(classes)]
    masks = np.stack([labels == label for label in present]) if present else np.zeros((0, *labels.shape), bool)
    return Labels(masks=masks, classes=np.asarray(present, int))


def _sample(image: Image, score_thr: float) -> Sample:
    kept = np.flatnonzero(image.found.scores >= score_thr)
    picture = _read(image.path, image.size)
    return Sample(picture, _drawn(image.truth, None, image.size), _drawn(image.found, kept, image.size))


def _drawn(objects: Objects, kept: np.ndarray | None, size: tuple[int, int]) -> Labels:
    index = np.arange(len(objects.boxes)) if kept is None else kept[np.argsort(objects.scores[kept])]
    if objects.masks is None:
        masks = np.zeros((len(index), *size), bool)
    else:
        masks = np.stack([coco_mask.decode(objects.masks[i]).astype(bool) for i in index] or [np.zeros(size, bool)])
        masks = masks[: len(index)]
    scores = None if kept is None else objects.scores[index]
    return Labels(masks, objects.labels[index], objects.boxes[index], scores)


def _read(path: str, size: Sequence[int]) -> np.ndarray:
    # as the pipeline does, EXIF orientation included
    image = cv2.imread(path, cv2.IMREAD_COLOR)
    if image is None:
        return np.zeros((*size, 3), np.uint8)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _draw(sample: Sample, hook: CollectHook, path: Path, title: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    present = sorted({int(label) for labels in (sample.truth, sample.prediction) for label in labels.classes})
    palette = _palette(hook)
    place = {label: index for index, label in enumerate(present)}
    truth, found = (_renumbered(labels, place) for labels in (sample.truth, sample.prediction))
    names = [hook.classes[label] for label in present] or ['(nothing)']
    colours = [palette[label] for label in present] or [(128, 128, 128)]
    save_predictions([Sample(sample.image, truth, found)], names, colours, path, title=title, panel_inches=_PANEL)


def _renumbered(labels: Labels, place: dict[int, int]) -> Labels:
    classes = np.asarray([place[int(label)] for label in labels.classes], int)
    return Labels(labels.masks, classes, labels.boxes, labels.scores)


def _palette(hook: CollectHook) -> list[Sequence[int]]:
    own = hook.palette
    if isinstance(own, (list, tuple)) and len(own) >= len(hook.classes):
        return list(own)
    # hues a golden section apart: neighbours differ, however many there are
    hues = [colorsys.hsv_to_rgb(0.02 + 0.618034 * index, 0.8, 0.95) for index in range(len(hook.classes))]
    return [[round(255 * part) for part in hue] for hue in hues]
