"""Non-maximum suppression of lane lines (CLRNet, Zheng et al., 2022)."""

import torch
from torch import Tensor

from mila_mm.compat.mmcv_ext.common import widen

_OFFSETS = 72  # rows at which a line gives its x
_ROWS_AT_ONCE = 64


def line_nms_forward(boxes: Tensor, scores: Tensor, overlap: float, top_k: int) -> list[Tensor]:
    """Keep the best lines that are not too near to a better one.

    The distance of two lines is the mean of \\|dx\\| over the rows that both cover.

    Args:
        boxes: (N, 5 + 72): column 2 is the start, 0 .. 1 of the height; column 4 the number of rows;
            from column 5 on x at every row.
        scores: (N,).
        overlap: Lines nearer than this to a better kept one go.
        top_k: At most so many are kept.

    Returns:
        int64 indices (N,) of which the first K are kept lines, best first, and the rest 0; the number K;
        and for every line (N,) the number from 1 of the kept line that claimed it last, or 0.

    Raises:
        ValueError: If the lines have another number of columns.
    """
    if boxes.shape[1:] != (5 + _OFFSETS,):
        raise ValueError(f'expected lines of shape (N, {5 + _OFFSETS}), got {tuple(boxes.shape)}')
    order = scores.argsort(descending=True)
    near = _near(widen(boxes)[order], overlap).cpu()
    count = len(order)
    alive = torch.ones(count, dtype=torch.bool)
    claimed_by = torch.zeros(count, dtype=torch.long)
    kept: list[int] = []
    while len(kept) < top_k and alive.any():  # one step per kept line, of which there are few
        best = int(alive.to(torch.uint8).argmax())
        kept.append(best)
        claims = near[best].clone()
        claims[: best + 1] = False
        alive &= ~claims
        claims[best] = True
        alive[best] = False
        claimed_by[claims] = len(kept)
    keep = torch.zeros_like(order)
    keep[: len(kept)] = order[torch.tensor(kept, dtype=torch.long, device=order.device)]
    parent = torch.empty_like(order)
    parent[order] = claimed_by.to(order.device)
    return [keep, torch.tensor(len(kept), device=order.device), parent]


def _near(lines: Tensor, limit: float) -> Tensor:
    """Which pairs of lines (N, N) are nearer than ``limit``."""
    start = (lines[:, 2] * (_OFFSETS - 1) + 0.5).to(torch.int64)  # truncated, as in mmcv
    end = start + lines[:, 4].to(torch.int64) - 1
    row = torch.arange(_OFFSETS, device=lines.device)
    rows = []
    for part in torch.arange(len(lines), device=lines.device).split(_ROWS_AT_ONCE):
        first = torch.maximum(start[part, None], start[None])
        last = torch.minimum(end[part, None], end[None]).clamp(max=_OFFSETS - 1)
        shared = (row >= first[..., None]) & (row <= last[..., None])
        distance = ((lines[part, None, 5:] - lines[None, :, 5:]).abs() * shared).sum(-1)
        rows.append((distance < limit * (last - first + 1)) & (last >= first) & (first >= 0))
    return torch.cat(rows) if rows else lines.new_zeros((0, 0), dtype=torch.bool)
