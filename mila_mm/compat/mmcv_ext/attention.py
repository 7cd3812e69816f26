"""Multi-scale deformable attention (Zhu et al., 2021) as weighted sums of gathered rows.

Every sample of a query and head is four rows of the value table, the corners around its point. No loop
runs over levels or points, and memory is bounded: queries are handled in runs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mila_mm.compat.mmcv_ext.common import widen
from mila_mm.compat.mmcv_ext.sampling import weighted_sum

# (point, corner) pairs at a time: what stays in cache on CPU, what is worth a launch on CUDA.
CPU_SAMPLES_AT_ONCE = 1 << 16
CUDA_SAMPLES_AT_ONCE = 1 << 21


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """Sum bilinear samples of the value maps, zero outside, with attention weights.

    Args:
        value: (B, S, heads, D), the levels' cells one after the other.
        spatial_shapes: (L, 2) int64, height and width of each level.
        level_start_index: (L,) int64, first cell of each level.
        sampling_loc: (B, Q, heads, L, P, 2), x and y, 0 .. 1 over the map.
        attn_weight: (B, Q, heads, L, P).
        im2col_step: Images handled at once in mmcv; unused here.

    Returns:
        (B, Q, heads * D).
    """
    batch, _, heads, width = value.shape
    table = widen(value).reshape(-1, width)
    output = value.new_empty((batch, sampling_loc.shape[1], heads, width))
    for run in _runs(sampling_loc):
        corners = _corners(value, spatial_shapes, level_start_index, sampling_loc[:, run], table.dtype)
        weight = corners.weight * widen(attn_weight[:, run]).to(table.dtype).flatten(3)[..., None, :]
        summed = weighted_sum(table, corners.row.flatten(3).flatten(0, 2), weight.flatten(3).flatten(0, 2))
        output[:, run] = summed.view(batch, -1, heads, width).to(output.dtype)
    return output.flatten(2)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Gradients of ``ms_deform_attn_forward``.

    The arguments that are not named here are those of the forward.

    Args:
        grad_output: (B, Q, heads * D).
        grad_value: Output, like ``value``; added to.
        grad_sampling_loc: Output, like ``sampling_loc``.
        grad_attn_weight: Output, like ``attn_weight``.
    """
    width = value.shape[-1]
    table = widen(value).reshape(-1, width)
    total = torch.zeros_like(table)
    grad_output = grad_output.to(table.dtype).view(*sampling_loc.shape[:3], width)
    size = spatial_shapes.to(table.dtype).repeat_interleave(sampling_loc.shape[4], 0)  # of the map of every point
    for run in _runs(sampling_loc):
        corners = _corners(value, spatial_shapes, level_start_index, sampling_loc[:, run], table.dtype)
        attention = widen(attn_weight[:, run]).to(table.dtype).flatten(3)
        grad = grad_output[:, run].reshape(-1, width, 1)
        row, weight = corners.row.flatten(), corners.weight
        total.index_add_(0, row, ((weight * attention[..., None, :]).view(len(grad), -1, 1) * grad.mT).view(-1, width))
        by_sample = torch.bmm(table.index_select(0, row).view(len(grad), -1, width), grad).view(weight.shape)
        by_y, by_x = corners.slopes(by_sample)
        by_location = torch.stack((by_x * attention * size[:, 1], by_y * attention * size[:, 0]), -1)
        grad_sampling_loc[:, run] = by_location.view(grad_sampling_loc[:, run].shape).to(grad_sampling_loc.dtype)
        by_attention = (by_sample * weight).sum(-2).view(grad_attn_weight[:, run].shape)
        grad_attn_weight[:, run] = by_attention.to(grad_attn_weight.dtype)
    grad_value.add_(total.view(grad_value.shape))


@dataclass
class _Corners:
    """The four corners around every point; n = L * P points per query and head.

    Attributes:
        row: (B, q, heads, 4, n) int64 rows of the value table (B * S * heads, D).
        weight: (B, q, heads, 4, n) bilinear weights, 0 outside the map.
        x: Weights (B, q, heads, n) of the left and the right column, and whether these are inside.
        y: Likewise of the upper and the lower row.
    """

    row: Tensor
    weight: Tensor
    x: tuple[Tensor, Tensor, Tensor, Tensor]
    y: tuple[Tensor, Tensor, Tensor, Tensor]

    def slopes(self, corner: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives by y and x (B, q, heads, n) of the weighted sum of values (B, q, heads, 4, n) at the corners."""
        upper_left, upper_right, lower_left, lower_right = corner.unbind(-2)
        left, right, left_inside, right_inside = self.x
        upper, lower, upper_inside, lower_inside = self.y
        by_y = lower_inside * (left * lower_left + right * lower_right)
        by_y -= upper_inside * (left * upper_left + right * upper_right)
        by_x = right_inside * (upper * upper_right + lower * lower_right)
        by_x -= left_inside * (upper * upper_left + lower * lower_left)
        return by_y, by_x


def _corners(value: Tensor, shapes: Tensor, starts: Tensor, location: Tensor, dtype: torch.dtype) -> _Corners:
    batch, _, heads, _ = value.shape
    points = location.shape[4]
    height, width = shapes.repeat_interleave(points, 0).unbind(-1)  # (n,), of the map of every point
    left, right, x_parts = _axis(location[..., 0].flatten(3).to(dtype), width)
    top, bottom, y_parts = _axis(location[..., 1].flatten(3).to(dtype), height)
    weight = torch.stack([a * b for a in y_parts[:2] for b in x_parts[:2]], -2)
    image = torch.arange(batch, device=value.device).view(-1, 1, 1, 1) * value.shape[1]
    head = torch.arange(heads, device=value.device).view(-1, 1)
    base = image + starts.repeat_interleave(points)
    # Corners outside their map have no weight; they read the nearest cell instead.
    cells = [base + row * width + column for row in (top, bottom) for column in (left, right)]
    return _Corners(torch.stack(cells, -2) * heads + head[..., None], weight, x_parts, y_parts)


def _axis(place: Tensor, size: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Along one axis: the cells before and after each place, clamped, and their weights and whether they are inside."""
    place = place * size - 0.5
    low = place.floor()
    part = place - low
    low_inside, high_inside = (low >= 0) & (low < size), (low >= -1) & (low < size - 1)
    last = (size - 1).to(low.dtype)
    low.nan_to_num_(nan=0.0)  # the weight stays NaN; the cell must be one of the map
    first = torch.minimum(low.clamp(min=0), last).long()
    second = torch.minimum(low.add(1).clamp_(min=0), last).long()
    return first, second, ((1 - part) * low_inside, part * high_inside, low_inside, high_inside)


def _runs(sampling_loc: Tensor) -> list[slice]:
    """Consecutive queries, few enough at a time."""
    queries = sampling_loc.shape[1]
    per_query = max(4 * sampling_loc[:, :1, ..., 0].numel(), 1)
    step = max((CUDA_SAMPLES_AT_ONCE if sampling_loc.is_cuda else CPU_SAMPLES_AT_ONCE) // per_query, 1)
    return [slice(begin, begin + step) for begin in range(0, queries, step)]
