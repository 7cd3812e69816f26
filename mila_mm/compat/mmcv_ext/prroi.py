"""Precise RoI pooling (Jiang et al., 2018): the exact mean of the bilinear surface over every bin."""

import torch
from torch import Tensor

from mila_mm.compat.mmcv_ext.common import hand_over, widen
from mila_mm.compat.mmcv_ext.sampling import weighted_sum

_CELLS_AT_ONCE = 1 << 22


def prroi_pool_forward(
    input: Tensor, rois: Tensor, output: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float
) -> None:
    """Write the mean of the bilinear surface, 0 outside the map, over every bin.

    Args:
        input: (B, C, H, W).
        rois: (R, 5): image index, x1, y1, x2, y2 in image coordinates.
        output: (R, C, pooled_height, pooled_width); 0 for a bin without area.
        spatial_scale: Feature cells per image pixel.
    """
    table = _table(input)
    boxes = widen(rois).to(table.dtype)
    bins = (pooled_height, pooled_width)
    result = table.new_zeros((len(rois), *bins, table.shape[1]))
    for run in _runs(boxes, bins, spatial_scale):
        result[run] = _means(table, boxes[run], bins, spatial_scale, input.shape)
    hand_over(output, result.permute(0, 3, 1, 2))


def prroi_pool_backward(
    grad_output: Tensor, rois: Tensor, grad_input: Tensor, pooled_height: int, pooled_width: int, spatial_scale: float
) -> None:
    """Write the gradient by the features.

    The arguments that are not named here are those of the forward.

    Args:
        grad_output: (R, C, pooled_height, pooled_width).
        rois: (R, 5), as in the forward.
        grad_input: (B, C, H, W), output.
    """
    by_table, _ = _gradients(grad_output, grad_input, rois, (pooled_height, pooled_width), spatial_scale)
    batch, channels, height, width = grad_input.shape
    hand_over(grad_input, by_table.view(batch, height, width, channels).permute(0, 3, 1, 2))


def prroi_pool_coor_backward(
    output: Tensor,
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    grad_rois: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the gradient by the boxes.

    The arguments that are not named here are those of the forward.

    Args:
        output: As the forward left it; unused here.
        grad_output: (R, C, pooled_height, pooled_width).
        rois: (R, 5), as in the forward.
        grad_rois: (R, 5), output; 0 in the column of the image index.
    """
    _, by_rois = _gradients(grad_output, input, rois, (pooled_height, pooled_width), spatial_scale)
    hand_over(grad_rois, by_rois)


def _table(features: Tensor) -> Tensor:
    return widen(features).permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def _gradients(
    grad: Tensor, features: Tensor, rois: Tensor, bins: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients by the table of cells and by the boxes."""
    table = _table(features).detach().requires_grad_()
    boxes = widen(rois).to(table.dtype).detach().requires_grad_()
    by_table, by_rois = torch.zeros_like(table), torch.zeros_like(boxes)
    grad = grad.to(table.dtype).permute(0, 2, 3, 1)
    for run in _runs(boxes.detach(), bins, scale):
        with torch.enable_grad():
            means = _means(table, boxes[run], bins, scale, features.shape)
        parts = torch.autograd.grad(means, (table, boxes), grad[run], allow_unused=True)
        for total, part in zip((by_table, by_rois), parts, strict=True):
            if part is not None:
                total.add_(part)
    by_rois[:, 0] = 0
    return by_table, by_rois


def _runs(boxes: Tensor, bins: tuple[int, int], scale: float) -> list[slice]:
    """Consecutive boxes, few enough that their bins' cells fit, judged by the largest box."""
    if len(boxes) == 0:
        return []
    extent = ((boxes[:, 3:] - boxes[:, 1:3]).clamp(min=0) * scale).amax(0)
    per_box = int((extent[0] + 3 * bins[1]).item() * (extent[1] + 3 * bins[0]).item()) + 1
    step = max(_CELLS_AT_ONCE // per_box, 1)
    return [slice(begin, begin + step) for begin in range(0, len(boxes), step)]


def _means(table: Tensor, boxes: Tensor, bins: tuple[int, int], scale: float, shape: torch.Size) -> Tensor:
    """Mean (boxes, bins down, bins across, C) of the surface over every bin."""
    _, _, height, width = shape
    start = boxes[:, 1:3] * scale
    extent = (boxes[:, 3:] * scale - start).clamp(min=0)
    y1, y2 = _edges(start[:, 1], extent[:, 1], bins[0])
    x1, x2 = _edges(start[:, 0], extent[:, 0], bins[1])
    # Cells that carry the surface over a bin: from the one before its start to the one after its end.
    full = (len(boxes), *bins)
    edges = [v.expand(full).flatten() for v in (y1[:, :, None], y2[:, :, None], x1[:, None], x2[:, None])]
    y1, y2, x1, x2 = edges
    area = (y2 - y1) * (x2 - x1)
    top, left = y1.detach().floor(), x1.detach().floor()
    rows, columns = y2.detach().ceil() - top + 1, x2.detach().ceil() - left + 1
    count = (rows * columns * (area.detach() > 0)).long()
    bag = torch.arange(len(count), device=table.device).repeat_interleave(count)
    number = torch.arange(len(bag), device=table.device) - (count.cumsum(0) - count)[bag]
    across = columns[bag].long()
    row, column = top[bag] + number // across.clamp(min=1), left[bag] + number % across.clamp(min=1)
    weight = _hat_integral(row, y1[bag], y2[bag]) * _hat_integral(column, x1[bag], x2[bag]) / area[bag]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    image = boxes[:, 0].detach().long().repeat_interleave(bins[0] * bins[1])[bag]
    cell = (image * height + row.long()) * width + column.long()
    cell = torch.where(inside, cell, 0)
    return weighted_sum(table, cell, weight * inside, count.cumsum(0) - count).view(*full, -1)


def _edges(start: Tensor, extent: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Start and end (R, bins) of every bin along one axis."""
    step = (extent / bins)[:, None]
    first = start[:, None] + step * torch.arange(bins, device=start.device)
    return first, first + step


def _hat_integral(centre: Tensor, begin: Tensor, end: Tensor) -> Tensor:
    """Integral from ``begin`` to ``end`` of the bilinear kernel max(0, 1 - \\|t - centre\\|)."""

    def up_to(t: Tensor) -> Tensor:
        t = (t - centre).clamp(-1, 1)
        return 0.5 + t - 0.5 * t * t.abs()

    return up_to(end) - up_to(begin)
