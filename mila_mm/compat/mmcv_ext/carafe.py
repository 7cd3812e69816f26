"""CARAFE (Wang et al., 2019), content-aware upsampling, tap by tap of its kernel in plain PyTorch."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mila_mm.compat.mmcv_ext.common import hand_over, widen


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Reassemble: every output cell is a weighted sum over a window around its source cell.

    Args:
        features: (B, C, H, W).
        masks: (B, group_size * kernel_size^2, H * scale_factor, W * scale_factor), the weights.
        output: (B, C, H * scale_factor, W * scale_factor).
        kernel_size: Side of the window, odd.
        group_size: Channel groups with weights of their own.
        scale_factor: Upsampling ratio.
    """
    source, weight = widen(features).contiguous(), widen(masks).contiguous()
    result = source.new_zeros(output.shape)
    cells = _by_source_cell(result, group_size, scale_factor)
    weight = _by_source_cell(weight, group_size, scale_factor)
    for tap, feature, place in _taps(source, kernel_size, group_size):
        cells[(..., *place)].addcmul_(feature, weight[:, :, None, tap][(..., *place)])
    hand_over(output, result)


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Gradients of the reassembly by features and weights.

    The arguments that are not named here are those of the forward.

    Args:
        bottom_grad: Output, like ``features``.
        mask_grad: Output, like ``masks``.
    """
    source, weight, grad = (widen(t).contiguous() for t in (features, masks, top_grad))
    by_feature, by_mask = torch.zeros_like(source), torch.zeros_like(weight)
    grad = _by_source_cell(grad, group_size, scale_factor)
    weight = _by_source_cell(weight, group_size, scale_factor)
    by_mask_cells = _by_source_cell(by_mask, group_size, scale_factor)
    targets = _taps(by_feature, kernel_size, group_size)
    for (tap, feature, place), (_, target, _) in zip(_taps(source, kernel_size, group_size), targets, strict=True):
        here = grad[(..., *place)]
        by_mask_cells[:, :, tap][(..., *place)] = (here * feature).sum(2)
        target.add_((here * weight[:, :, None, tap][(..., *place)]).sum((-3, -1), keepdim=True))
    hand_over(bottom_grad, by_feature)
    hand_over(mask_grad, by_mask)


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As ``carafe_naive_forward``; the buffers carry mmcv's rearranged copies, of which one goes to the backward.

    Args:
        features: (B, C, H, W).
        masks: (B, group_size * kernel_size^2, H * scale_factor, W * scale_factor), the weights.
        rfeatures: Output: the features, for ``carafe_backward``.
        routput: Unused here.
        rmasks: Unused here.
        output: (B, C, H * scale_factor, W * scale_factor).
        kernel_size: Side of the window, odd.
        group_size: Channel groups with weights of their own.
        scale_factor: Upsampling ratio.
    """
    hand_over(rfeatures, features.detach())
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """As ``carafe_naive_backward``.

    The arguments that are not named here are those of the forward.

    Args:
        rfeatures: The features, as ``carafe_forward`` left them.
        rtop_grad: Unused here.
        rbottom_grad_hs: Unused here.
        rbottom_grad: Unused here.
        rmask_grad: Unused here.
        bottom_grad: Output, like the features.
        mask_grad: Output, like ``masks``.
    """
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


def _by_source_cell(maps: Tensor, groups: int, scale: int) -> Tensor:
    """View (B, C, H * s, W * s) as (B, groups, C / groups, H, s, W, s)."""
    batch, channels, height, width = maps.shape
    return maps.view(batch, groups, channels // groups, height // scale, scale, width // scale, scale)


def _taps(features: Tensor, kernel: int, groups: int) -> Iterator[tuple[int, Tensor, tuple[slice, ...]]]:
    """Walk over the window: its number, the features it reads there, and the output cells that read them.

    Cells whose window reaches over the border are left out at the taps beyond it.

    Yields:
        The tap; a view (B, groups, C / groups, h, 1, w, 1) of ``features``; the slices (h, s, w, s) of
        the output seen by source cell.
    """
    height, width = features.shape[2:]
    cells = _by_source_cell(features, groups, 1)
    radius = kernel // 2
    for dy in range(-radius, kernel - radius):
        for dx in range(-radius, kernel - radius):
            down, across = slice(max(-dy, 0), height - max(dy, 0)), slice(max(-dx, 0), width - max(dx, 0))
            shifted_down = slice(max(dy, 0), height - max(-dy, 0))
            shifted_across = slice(max(dx, 0), width - max(-dx, 0))
            if abs(dy) >= height or abs(dx) >= width:
                continue
            tap = (dy + radius) * kernel + dx + radius
            read = cells[..., shifted_down, :, shifted_across, :]
            yield tap, read, (down, slice(None), across, slice(None))
