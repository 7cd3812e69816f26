"""Label maps against the truth: confusion, IoU by class, IoU image by image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def confusion_of(truth: np.ndarray, found: np.ndarray, num_classes: int) -> np.ndarray:
    """Count pixels: (C, C) int, rows the truth, columns the prediction; labels of no class are left out."""
    valid = (truth >= 0) & (truth < num_classes) & (found >= 0) & (found < num_classes)
    pairs = num_classes * truth[valid].astype(np.int64) + found[valid].astype(np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def intersection_over_union(confusion: np.ndarray) -> np.ndarray:
    """Return the IoU of each class, (C,) float in 0 .. 1, NaN for one that occurs in neither."""
    hits = np.diag(confusion).astype(float)
    union = confusion.sum(0) + confusion.sum(1) - hits
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=union > 0)


def per_class(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return class to ``iou``, ``accuracy`` (share of its pixels that are found) and ``pixels``."""
    iou, pixels = intersection_over_union(confusion), confusion.sum(1)
    accuracy = np.divide(np.diag(confusion), pixels, out=np.full(len(iou), np.nan), where=pixels > 0)
    return {
        name: {'iou': float(iou[i]), 'accuracy': float(accuracy[i]), 'pixels': int(pixels[i])}
        for i, name in enumerate(classes)
    }
