"""Overlaps of axis-aligned boxes."""

import torch
from torch import Tensor

from mila_mm.compat.mmcv_ext.common import hand_over, widen

IOU, IOF = 0, 1


def pairwise_overlaps(boxes1: Tensor, boxes2: Tensor, offset: int = 0, mode: int = IOU) -> Tensor:
    """Overlap of every box of one set with every box of another.

    Args:
        boxes1: (M, 4), x1, y1, x2, y2.
        boxes2: (N, 4).
        offset: Added to widths and heights, 0 or 1.
        mode: 0 intersection over union, 1 intersection over the area of ``boxes1``.

    Returns:
        (M, N) overlaps; NaN where 0 is divided by 0.
    """
    return _overlaps(boxes1[:, None], boxes2[None], offset, mode)


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Write the overlaps of two sets of boxes into ``ious``.

    Args:
        bboxes1: (M, 4), x1, y1, x2, y2.
        bboxes2: (N, 4).
        ious: (M, N), or (M,) where ``aligned``.
        mode: 0 intersection over union, 1 intersection over the area of ``bboxes1``.
        aligned: Pair the boxes one to one (M == N).
        offset: Added to widths and heights, 0 or 1.
    """
    boxes1, boxes2 = widen(bboxes1), widen(bboxes2)
    if not aligned:
        boxes1, boxes2 = boxes1[:, None], boxes2[None]
    hand_over(ious, _overlaps(boxes1, boxes2, offset, mode))


def _overlaps(boxes1: Tensor, boxes2: Tensor, offset: int, mode: int) -> Tensor:
    ax1, ay1, ax2, ay2 = boxes1.unbind(-1)
    bx1, by1, bx2, by2 = boxes2.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1) + offset).clamp_(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1) + offset).clamp_(min=0)
    inter = width.mul_(height)
    base = (ax2 - ax1 + offset) * (ay2 - ay1 + offset)
    if mode == IOU:
        base = base + (bx2 - bx1 + offset) * (by2 - by1 + offset) - inter
    return inter / base
