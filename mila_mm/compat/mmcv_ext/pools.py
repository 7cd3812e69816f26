"""Poolings over boxes beyond RoIAlign: deformable RoI pooling and BorderAlign, in plain PyTorch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mila_mm.compat.mmcv_ext.common import hand_over, widen
from mila_mm.compat.mmcv_ext.sampling import RoIGrid, bilinear_corners, roi_grid_points, weighted_sum

SAMPLES_AT_ONCE = 1 << 22  # sampling points held at a time


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Deformable RoI pooling (Dai et al., 2017): RoIAlign's average with every bin shifted.

    Args:
        input: (B, C, H, W).
        rois: (R, 5): image index, x1, y1, x2, y2 in image coordinates.
        offset: (R, 2, pooled_height, pooled_width), x then y, in units of ``gamma`` box sizes; or empty.
        output: (R, C, pooled_height, pooled_width).
        spatial_scale: Feature cells per image pixel.
        sampling_ratio: Samples per bin and side; 0 for one per feature cell.
        gamma: Scale of the offsets.
    """
    table = _table(widen(input))
    grid = roi_grid_points(
        widen(rois).to(table.dtype), pooled_height, pooled_width, spatial_scale, sampling_ratio, True
    )
    shift = widen(offset).to(table.dtype) if offset.numel() else None
    result = table.new_zeros((len(rois), pooled_height, pooled_width, table.shape[1]))
    for run in grid.runs(SAMPLES_AT_ONCE):
        result[run.rows] = _shifted_means(table, run, shift, gamma, input.shape[2:])
    hand_over(output, result.permute(0, 3, 1, 2))


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Gradients of ``deform_roi_pool_forward`` by features and offsets, by autograd over the same sums.

    The arguments that are not named here are those of the forward.

    Args:
        grad_output: (R, C, pooled_height, pooled_width).
        grad_input: Output, like ``input``.
        grad_offset: Output, like ``offset``.
    """
    table = _table(widen(input)).detach().requires_grad_()
    grid = roi_grid_points(
        widen(rois).to(table.dtype), pooled_height, pooled_width, spatial_scale, sampling_ratio, True
    )
    shift = widen(offset).to(table.dtype).detach().requires_grad_() if offset.numel() else None
    wanted = (table,) if shift is None else (table, shift)
    totals = [torch.zeros_like(t) for t in wanted]
    grad = grad_output.to(table.dtype).permute(0, 2, 3, 1)
    for run in grid.runs(SAMPLES_AT_ONCE):
        with torch.enable_grad():
            pooled = _shifted_means(table, run, shift, gamma, input.shape[2:])
        for total, part in zip(totals, torch.autograd.grad(pooled, wanted, grad[run.rows]), strict=True):
            total.add_(part)
    batch, channels, height, width = input.shape
    hand_over(grad_input, totals[0].view(batch, height, width, channels).permute(0, 3, 1, 2))
    if shift is not None:
        hand_over(grad_offset, totals[1])


def _table(features: Tensor) -> Tensor:
    """The cells (B * H * W, C) of feature maps (B, C, H, W)."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def _shifted_means(table: Tensor, run: RoIGrid, shift: Tensor | None, gamma: float, size: torch.Size) -> Tensor:
    """Mean (boxes, bins down, bins across, C) of the samples of every bin."""
    y, x, bag, image = run.points()
    if shift is not None:
        extent = run.bin_size * run.bin_size.new_tensor(run.bins)
        moved = gamma * shift[run.rows] * extent.flip(-1)[:, :, None, None]
        y, x = y + moved[:, 1].flatten()[bag], x + moved[:, 0].flatten()[bag]
    index, weight = bilinear_corners(y, x, image * (size[0] * size[1]), size)
    count = run.per_bin.repeat_interleave(run.bins[0] * run.bins[1])
    weight = weight / count[bag][:, None]
    starts = (count.cumsum(0) - count) * 4
    return weighted_sum(table, index.flatten(), weight.flatten(), starts).view(len(run.image), *run.bins, -1)


def border_align_forward(input: Tensor, boxes: Tensor, output: Tensor, argmax_idx: Tensor, pool_size: int) -> None:
    """BorderAlign (Qiu et al., 2020): the largest of ``pool_size + 1`` samples along each side of every box.

    Args:
        input: (B, 4C, H, W): C channels each for the top, left, bottom and right side.
        boxes: (B, N, 4), x1, y1, x2, y2 in feature cells.
        output: (B, C, N, 4).
        argmax_idx: int32, like ``output``: number of the first largest sample, counted from (x1, y1) for
            top and left, from (x2, y2) for bottom and right.
        pool_size: Steps along a side.
    """
    best = at = None
    for step, value in enumerate(_border_samples(widen(input), widen(boxes), pool_size)):
        if best is None or at is None:
            best, at = value, torch.zeros_like(value, dtype=torch.int32)
            continue
        larger = value > best
        best, at = torch.where(larger, value, best), torch.where(larger, step, at)
    assert best is not None and at is not None
    hand_over(output, best.permute(0, 2, 3, 1))
    hand_over(argmax_idx, at.to(torch.int32).permute(0, 2, 3, 1))


def border_align_backward(
    grad_output: Tensor, boxes: Tensor, argmax_idx: Tensor, grad_input: Tensor, pool_size: int
) -> None:
    """Gradient of ``border_align_forward``: to the four cells around each largest sample.

    Args:
        grad_output: (B, C, N, 4).
        boxes: (B, N, 4), as in the forward.
        argmax_idx: As the forward left it.
        grad_input: (B, 4C, H, W), output.
    """
    batch, channels, count, _ = grad_output.shape
    height, width = grad_input.shape[2:]
    grad = widen(grad_output).permute(0, 3, 1, 2)  # (B, 4, C, N)
    start, stride = _border_lines(widen(boxes).to(grad.dtype), pool_size)
    step = argmax_idx.permute(0, 3, 1, 2)[..., None]
    x, y = (start[:, :, None] + stride[:, :, None] * step).unbind(-1)
    plane = torch.arange(batch * 4 * channels, device=grad.device).repeat_interleave(count)
    index, weight = bilinear_corners(y.flatten(), x.flatten(), plane * (height * width), (height, width))
    result = grad.new_zeros(grad_input.shape)
    result.view(-1).index_add_(0, index.flatten(), (weight * grad.flatten()[:, None]).flatten())
    hand_over(grad_input, result)


def _border_lines(boxes: Tensor, pool_size: int) -> tuple[Tensor, Tensor]:
    """First point and step, both (B, 4, N, 2) as x, y, of the top, left, bottom and right side of each box."""
    first, last = boxes[..., :2], boxes[..., 2:]
    across, down = ((last - first) / pool_size).unbind(-1)
    still = torch.zeros_like(across)
    steps = ((across, still), (still, down), (-across, still), (still, -down))
    stride = torch.stack([torch.stack(step, -1) for step in steps], 1)
    return torch.stack((first, first, last, last), 1), stride


def _border_samples(features: Tensor, boxes: Tensor, pool_size: int) -> Iterator[Tensor]:
    """Samples (B, 4, C, N) at one step along all sides after the other, ``pool_size + 1`` times."""
    batch, channels, height, width = features.shape
    start, stride = _border_lines(boxes.to(features.dtype), pool_size)
    sides = features.reshape(batch, 4, channels // 4, height * width)
    for step in range(pool_size + 1):
        x, y = (start + stride * step).unbind(-1)
        index, weight = bilinear_corners(
            y.flatten(), x.flatten(), torch.zeros_like(y.flatten()).long(), (height, width)
        )
        index, weight = index.view(batch, 4, 1, -1, 4), weight.view(batch, 4, 1, -1, 4)
        corners = (
            sides.gather(3, index[..., corner].expand(-1, -1, channels // 4, -1)) * weight[..., corner]
            for corner in range(4)
        )
        yield sum(corners, start=torch.zeros((), device=features.device))
