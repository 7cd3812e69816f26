"""Gradient of RoIAlign's average as sums gathered by feature cell.

A mean of bilinear samples over a regular grid is a product: of weights of the rows and weights of the
columns that a bin reads. The pairs of bin and cell with their weights, sorted by cell, make each cell's
gradient one weighted sum over bins. On CPU this takes a fraction of the time of torchvision's (and
mmcv's) kernel, which adds every sample of every channel by itself; and it is deterministic everywhere.
"""

import torch
from torch import Tensor

from mila_mm.compat.mmcv_ext.sampling import RoIGrid, roi_grid_points, weighted_sum

SAMPLES_AT_ONCE = 1 << 20


def roi_align_average_backward(
    grad: Tensor, rois: Tensor, shape: torch.Size, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Gradient of RoIAlign in average mode by its features.

    Args:
        grad: (R, C, bins down, bins across), float32 or float64.
        rois: (R, 5), in the same dtype.
        shape: (B, C, H, W) of the features.
        spatial_scale: Feature cells per image pixel.
        sampling_ratio: Samples per bin and side; 0 for one per feature cell.
        aligned: As in the forward.

    Returns:
        (B, C, H, W), a view of channels-last memory.
    """
    batch, channels, height, width = shape
    down, across = grad.shape[2:]
    total = grad.new_zeros((batch * height * width, channels))
    by_bin = grad.permute(0, 2, 3, 1).reshape(-1, channels)
    grid = roi_grid_points(rois, down, across, spatial_scale, sampling_ratio, aligned)
    for run in grid.runs(SAMPLES_AT_ONCE):
        cell, box_bin, weight = _pairs(run, (height, width))
        cell, order = cell.sort(stable=True)
        starts = torch.searchsorted(cell, torch.arange(len(total), device=cell.device))
        first_bin = run.first * down * across
        total += weighted_sum(by_bin, box_bin[order] + first_bin, weight[order], starts)
    return total.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _pairs(run: RoIGrid, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs (P,) of a cell of the table and a bin that reads it, with their weights."""
    rows, row_weight, high = _axis(run, 0, size[0])
    columns, column_weight, wide = _axis(run, 1, size[1])
    # Boxes read windows of very different sizes: each gets just the pairs that it needs.
    count = run.bins[0] * run.bins[1] * high * wide
    box = torch.arange(len(count), device=count.device).repeat_interleave(count)
    number = torch.arange(len(box), device=count.device) - (count.cumsum(0) - count)[box]
    number, x = number // wide[box], number % wide[box]
    number, y = number // high[box], number % high[box]
    i, j = number // run.bins[1], number % run.bins[1]
    cell = (run.image[box] * size[0] + rows[box, i, y]) * size[1] + columns[box, j, x]
    return cell, (box * run.bins[0] + i) * run.bins[1] + j, row_weight[box, i, y] * column_weight[box, j, x]


def _axis(run: RoIGrid, axis: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cells (R, bins, K) that each bin reads along one axis, their weights, and how many (R,) of the K a box needs."""
    start, step, count = (v[:, axis, None, None] for v in (run.start, run.bin_size, run.samples))
    bins = torch.arange(run.bins[axis], device=start.device)[:, None]
    sample = torch.arange(max(int(count.max()), 1), device=start.device)
    place = start + bins * step + (sample + 0.5) * step / count
    used = (sample < count) & (place >= -1) & (place <= size)
    place = torch.where(used, place, 0).clamp_(0, size - 1)
    low = place.floor()
    first = torch.where(used, low, size - 1).amin(-1, keepdim=True)
    ahead = torch.where(used, low - first, 0).long()
    share = torch.where(used, 1 / count.to(place.dtype), 0)
    part = (place - low) * share
    needed = torch.where(used.any(-1).any(-1), ahead.amax((1, 2)) + 2, 0)
    weight = place.new_zeros((*place.shape[:2], max(int(needed.max()), 2)))
    weight.scatter_add_(-1, ahead, share - part).scatter_add_(-1, ahead + 1, part)
    cells = first + torch.arange(weight.shape[-1], device=start.device)
    return cells.clamp_(max=size - 1).long(), weight, needed
