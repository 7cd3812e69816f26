"""RoIAlign and RoIPool: torchvision's kernels, and plain PyTorch for what they lack or do slowly."""

import torch
from torch import Tensor

from mila_mm.compat.mmcv_ext.common import hand_over, kernels, widen
from mila_mm.compat.mmcv_ext.roi_taps import roi_align_average_backward
from mila_mm.compat.mmcv_ext.sampling import bilinear_corners, roi_grid_points

MAX, AVERAGE = 0, 1
POINTS_AT_ONCE = 1 << 22  # sampled values held at a time by the max mode


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (He et al., 2017): average or maximum of bilinear samples in every bin of every box.

    Args:
        input: (B, C, H, W).
        rois: (R, 5): image index, x1, y1, x2, y2 in image coordinates.
        output: (R, C, aligned_height, aligned_width).
        argmax_y: Output of the max mode, like ``output``: y of the largest sample, -1 where a bin has none.
        argmax_x: Likewise x.
        spatial_scale: Feature cells per image pixel.
        sampling_ratio: Samples per bin and side; 0 for one per feature cell.
        pool_mode: 0 maximum, 1 average.
        aligned: Shift the boxes by half a cell, so that cell centres lie at integers.
    """
    if pool_mode == MAX:
        value, y, x = _roi_align_max(
            widen(input), widen(rois), aligned_height, aligned_width, spatial_scale, sampling_ratio, aligned
        )
        hand_over(argmax_y, y)
        hand_over(argmax_x, x)
        hand_over(output, value)
        return
    features = widen(input, half_on_cuda=True)
    boxes, lost = _finite(rois.to(features.dtype))
    pooled = kernels.roi_align(features, boxes, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned)
    hand_over(output, pooled if lost is None else pooled.masked_fill_(lost[:, None, None, None], torch.nan))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of ``roi_align_forward`` by its features.

    The arguments that are not named here are those of the forward.

    Args:
        grad_output: (R, C, aligned_height, aligned_width).
        rois: (R, 5), as in the forward.
        argmax_y: As the forward left it (max mode).
        argmax_x: As the forward left it (max mode).
        grad_input: (B, C, H, W), output.
    """
    if pool_mode == MAX:
        hand_over(grad_input, _roi_align_max_backward(grad_output, rois, argmax_y, argmax_x, grad_input.shape))
        return
    if not grad_output.is_cuda or torch.are_deterministic_algorithms_enabled():
        grad, boxes = widen(grad_output), widen(rois)
        boxes, _ = _finite(boxes.to(grad.dtype))
        result = roi_align_average_backward(grad, boxes, grad_input.shape, spatial_scale, sampling_ratio, aligned)
        hand_over(grad_input, result)
        return
    grad = widen(grad_output, half_on_cuda=True)
    result = kernels._roi_align_backward(
        grad,
        rois.to(grad.dtype),
        spatial_scale,
        aligned_height,
        aligned_width,
        *grad_input.shape,
        sampling_ratio,
        aligned,
    )
    hand_over(grad_input, result)


def _finite(rois: Tensor) -> tuple[Tensor, Tensor | None]:
    """Boxes that the CPU kernel survives: it crashes the process on NaN and infinity.

    Returns:
        The boxes, those that are not finite emptied; and which (R,) these are, or None for none.
    """
    if rois.is_cuda or rois.isfinite().all():
        return rois, None
    lost = ~rois.isfinite().all(1)
    return rois.masked_fill(lost[:, None], 0.0), lost


def _roi_align_max(
    features: Tensor, rois: Tensor, height: int, width: int, scale: float, ratio: int, aligned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum (R, C, height, width) of every bin's samples, and the y and x of the first largest one."""
    rois, _ = _finite(rois.to(features.dtype))
    _, channels, *size = features.shape
    shape = (len(rois), channels, height, width)
    value, at_y, at_x = features.new_zeros(shape), features.new_full(shape, -1), features.new_full(shape, -1)
    table = features.permute(0, 2, 3, 1).reshape(-1, channels)
    grid = roi_grid_points(rois, height, width, scale, ratio, aligned)
    # Boxes are handled in runs of bounded size: the samples of all channels at once would not fit.
    for run in grid.runs(max(POINTS_AT_ONCE // max(channels, 1), 1)):
        y, x, bag, image = run.points()
        index, weight = bilinear_corners(y, x, image * (size[0] * size[1]), size)
        sampled = (table[index] * weight[..., None]).sum(dim=1)  # (points, channels)
        slot = bag[:, None].expand(-1, channels)
        top = sampled.new_full((run.bags, channels), -torch.inf).scatter_reduce_(0, slot, sampled, 'amax')
        order = torch.arange(len(y), device=y.device)[:, None].expand(-1, channels)
        order = torch.where(sampled == top[bag], order, len(y))
        first = order.new_full((run.bags, channels), len(y)).scatter_reduce_(0, slot, order, 'amin')
        found = first < len(y)
        first.clamp_(max=max(len(y) - 1, 0))
        for target, source in ((value, top), (at_y, y[first] if len(y) else top), (at_x, x[first] if len(y) else top)):
            kept = torch.where(found, source, source.new_tensor(0.0 if target is value else -1.0))
            target[run.rows] = kept.view(-1, height, width, channels).permute(0, 3, 1, 2)
    return value, at_y, at_x


def _roi_align_max_backward(grad: Tensor, rois: Tensor, at_y: Tensor, at_x: Tensor, shape: torch.Size) -> Tensor:
    """Give every bin's gradient to the four cells around its largest sample."""
    _, channels, height, width = shape
    grad, y, x = widen(grad), widen(at_y), widen(at_x)
    plane = rois[:, 0].long()[:, None] * channels + torch.arange(channels, device=grad.device)
    first_cell = (plane * (height * width))[..., None, None].expand_as(y)
    index, weight = bilinear_corners(y.flatten(), x.flatten(), first_cell.flatten(), (height, width))
    weight = weight * (grad * (y != -1)).flatten()[:, None]
    result = grad.new_zeros(shape)
    result.view(-1).index_add_(0, index.flatten(), weight.flatten())
    return result


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """RoIPool (Girshick, 2015) as mmcv defines it: boxes end at (x2 + 1, y2 + 1) and are not rounded.

    torchvision rounds the boxes. Here every bin is given to its kernel as a box of its own, of whole
    cells, with a single bin: the kernel then takes the maximum over just these cells.

    Args:
        input: (B, C, H, W).
        rois: (R, 5): image index, x1, y1, x2, y2 in image coordinates.
        output: (R, C, pooled_height, pooled_width); 0 for a bin without cells.
        argmax: int32, like ``output``: y * W + x of the largest cell, -1 for none.
        spatial_scale: Feature cells per image pixel.
    """
    features = widen(input, half_on_cuda=True)
    count, channels = len(rois), features.shape[1]
    height, width = features.shape[2:]
    boxes = widen(rois)
    start = boxes[:, 1:3] * spatial_scale
    extent = (boxes[:, 3:5] + 1) * spatial_scale - start
    x1, x2 = _bin_cells(start[:, 0], extent[:, 0], pooled_width, width)
    y1, y2 = _bin_cells(start[:, 1], extent[:, 1], pooled_height, height)
    shape = (count, pooled_height, pooled_width)
    cells = torch.stack([v.expand(shape) for v in (x1[:, None], y1[..., None], x2[:, None] - 1, y2[..., None] - 1)], -1)
    empty = (cells[..., 2:] < cells[..., :2]).any(-1) | (extent <= 0).any(-1)[:, None, None]
    cells = torch.where(empty[..., None], cells.new_tensor(2.0 * max(height, width)), cells)  # beyond the map
    image = boxes[:, 0, None, None, None].expand(*shape, 1)
    bins = torch.cat((image, cells), -1).view(-1, 5)
    pooled, at = kernels.roi_pool(features, bins.to(features.dtype), 1.0, 1, 1)
    hand_over(output, pooled.view(*shape, channels).permute(0, 3, 1, 2))
    hand_over(argmax, at.view(*shape, channels).permute(0, 3, 1, 2))


def _bin_cells(start: Tensor, extent: Tensor, bins: int, size: int) -> tuple[Tensor, Tensor]:
    """First and one-past-last cell (R, bins) of every bin along one axis of ``size`` cells."""
    step = (extent / bins)[:, None]
    number = torch.arange(bins + 1, device=start.device, dtype=start.dtype)
    edges = number * step + start[:, None]
    return edges[:, :-1].floor().clamp_(0, size), edges[:, 1:].ceil().clamp_(0, size)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of ``roi_pool_forward``: every bin's gradient goes to its largest cell.

    The arguments that are not named here are those of the forward.

    Args:
        grad_output: (R, C, pooled_height, pooled_width).
        rois: (R, 5), as in the forward.
        argmax: int32, as the forward left it.
        grad_input: (B, C, H, W), output.
    """
    grad = widen(grad_output, half_on_cuda=True)
    result = kernels._roi_pool_backward(
        grad, rois.to(grad.dtype), argmax, spatial_scale, pooled_height, pooled_width, *grad_input.shape
    )
    hand_over(grad_input, result)
