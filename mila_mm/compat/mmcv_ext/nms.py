"""Non-maximum suppression: nms over torchvision's kernel, soft-nms and nms_match."""

import numpy as np
import torch
from torch import Tensor

from mila_mm.compat.mmcv_ext.boxes import pairwise_overlaps
from mila_mm.compat.mmcv_ext.common import kernels, widen

NAIVE, LINEAR, GAUSSIAN = 0, 1, 2


def _as_float32(threshold: float) -> float:
    """Round a threshold to float32, as the compiled ops do before they compare.

    0.1 in float32 lies above 0.1 in float64: an overlap of exactly 0.1 would otherwise count as greater.
    """
    return float(np.float32(threshold))


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression: a box goes where its IoU with a better kept box exceeds the threshold.

    Args:
        boxes: (N, 4), x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: Boxes that overlap by more than this go.
        offset: Added to widths and heights: 1 where coordinates are inclusive pixels, else 0.

    Returns:
        int64 indices of what is kept, best score first, on the device of ``boxes``.
    """
    boxes, scores = widen(boxes), widen(scores)
    dtype = torch.promote_types(boxes.dtype, scores.dtype)
    boxes, scores = boxes.to(dtype), scores.to(dtype)
    if offset:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    return kernels.nms(boxes, scores, _as_float32(iou_threshold))


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al., 2017), on the CPU as in mmcv.

    Each step picks the best remaining box, lowers the scores of the others by their overlap with it and
    drops those that fall below ``min_score``. The steps are sequential by nature; within one, all
    remaining boxes are handled at once. Dropped boxes are replaced from the end of the list in the
    order in which mmcv's scan does it, so that ties resolve alike.

    Args:
        boxes: (N, 4), x1, y1, x2, y2.
        scores: (N,).
        dets: (N, 5), output: boxes with their lowered scores, in the order of choice.
        iou_threshold: For the methods 0 and 1: overlaps from here on count.
        sigma: For method 2.
        min_score: Boxes whose score falls below are dropped.
        method: 0 naive (score to 0), 1 linear (times 1 - IoU), 2 gaussian (times exp(-IoU^2 / sigma)).
        offset: Added to widths and heights, 0 or 1.

    Returns:
        int64 indices (K,) of the boxes in ``dets[:K]``.
    """
    dtype = widen(boxes).dtype
    work = torch.cat((boxes.T, scores[None].to(boxes.dtype)), dim=0).to('cpu', dtype, copy=True).numpy()
    x1, y1, x2, y2, score = work
    area = (x2 - x1 + offset) * (y2 - y1 + offset)
    index = np.arange(len(score))
    out = np.zeros((len(score), 5), dtype=work.dtype)
    threshold, variance, lowest = (work.dtype.type(np.float32(v)) for v in (iou_threshold, sigma, min_score))

    count, i = len(score), 0
    while i < count:
        best = i + _first_largest(score[i:count])
        for row in (x1, y1, x2, y2, score, area, index):
            row[i], row[best] = row[best], row[i]
        out[i] = work[:, i]
        rest = slice(i + 1, count)
        width = np.minimum(x2[i], x2[rest]) - np.maximum(x1[i], x1[rest]) + offset
        height = np.minimum(y2[i], y2[rest]) - np.maximum(y1[i], y1[rest]) + offset
        inter = np.maximum(width, 0) * np.maximum(height, 0)
        with np.errstate(invalid='ignore', divide='ignore'):  # two boxes without area: 0 / 0, as in mmcv
            overlap = inter / (area[i] + area[rest] - inter)
            score[rest] *= _decay(overlap, method, threshold, variance)
        keep = ~(score[rest] < lowest)
        kept = int(np.count_nonzero(keep))
        if kept < len(keep):
            holes = i + 1 + np.flatnonzero(~keep[:kept])
            fill = i + 1 + kept + np.flatnonzero(keep[kept:])[::-1]
            for row in (x1, y1, x2, y2, score, area, index):
                row[holes] = row[fill]
        i, count = i + 1, i + 1 + kept
    dets.copy_(torch.from_numpy(out))
    return torch.from_numpy(index[:count])


def _first_largest(score: np.ndarray) -> int:
    """Where a scan that starts at the first and moves on to what is greater ends: never at a later NaN."""
    best = int(score.argmax())
    if not np.isnan(score[best]):
        return best
    return 0 if np.isnan(score[0]) else int(np.nanargmax(score))


def _decay(overlap: np.ndarray, method: int, threshold: np.floating, variance: np.floating) -> np.ndarray:
    one = overlap.dtype.type(1)
    if method == GAUSSIAN:
        return np.exp(-(overlap * overlap) / variance)
    return np.where(overlap >= threshold, one - overlap if method == LINEAR else 0 * one, one)


def nms_match(dets: Tensor, iou_threshold: float, *, chunk: int = 4096) -> list[list[int]]:
    """Group boxes by the better box that suppresses them (an IoU of the threshold or more does).

    Args:
        dets: (N, 5), x1, y1, x2, y2, score.
        iou_threshold: Boxes that overlap by this or more belong together.
        chunk: How many boxes are matched at a time, which bounds the memory.

    Returns:
        One list of indices per kept box, the kept box first, the others by falling score.
    """
    if len(dets) == 0:
        return []
    boxes, scores = widen(dets[:, :4]), widen(dets[:, 4])
    threshold = np.float32(iou_threshold)
    below = float(np.nextafter(threshold, np.float32(-1)))  # 'greater than this' is 'the threshold or more'
    kept = kernels.nms(boxes, scores, below)
    order = scores.argsort(descending=True, stable=True)
    group = torch.empty(len(dets), dtype=torch.long, device=dets.device)
    for part in order.split(chunk):
        overlap = pairwise_overlaps(boxes[kept], boxes[part])
        hit = overlap >= float(threshold)
        # The first that reaches the threshold is the best; the nearest, where rounding hid it from this arithmetic.
        group[part] = torch.where(hit.any(0), hit.to(torch.uint8).argmax(0), overlap.nan_to_num().argmax(0))
    group[kept] = torch.arange(len(kept), device=dets.device)
    by_group = order[group[order].argsort(stable=True)]
    sizes = torch.bincount(group, minlength=len(kept)).tolist()
    return [members.tolist() for members in by_group.split(sizes)]
