"""Deformable convolution, v1 (Dai et al., 2017) and v2 (Zhu et al., 2019), over torchvision's kernel.

mmcv's Python gives tensors by position and everything else by name; so must a call from elsewhere.
"""

import torch
from torch import Tensor

from mila_mm.compat.mmcv_ext.common import hand_over, kernels, widen


def deform_conv_forward(
    input: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **geometry: int
) -> None:
    """Deformable convolution v1.

    Args:
        input: (B, C, H, W).
        weight: (O, C / group, kH, kW).
        offset: (B, 2 * deformable_group * kH * kW, OH, OW), y before x.
        output: (B, O, OH, OW).
        columns: Scratch, unused here.
        ones: Scratch, unused here.
        **geometry: See :func:`_geometry_v1`.
    """
    hand_over(output, _convolve(input, weight, offset, None, None, _geometry_v1(**geometry)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Gradients of the deformable convolution v1 by its input and offsets, in the shapes of the forward.

    torchvision's kernel yields the gradient of the weight in the same pass. It is left in the scratch
    buffer ``columns``, which mmcv passes on to ``deform_conv_backward_parameters``.
    """
    by_input, by_weight, by_offset, _, _ = _gradients(gradOutput, input, weight, offset, None, _geometry_v1(**geometry))
    hand_over(gradInput, by_input)
    hand_over(gradOffset, by_offset)
    columns.resize_(by_weight.shape).copy_(by_weight)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    *,
    scale: float,
    **geometry: int,
) -> None:
    """Add ``scale`` times the gradient of the deformable convolution v1 by its weight to ``gradWeight``.

    ``columns`` is what ``deform_conv_backward_input`` left, if it ran before; it is emptied. The other arguments are
    those of the forward.
    """
    if columns.shape == gradWeight.shape:
        gradWeight.add_(columns, alpha=scale)
        columns.resize_(0)
        return
    # The gradient by the weight does not depend on the weight's values.
    weight = torch.zeros_like(gradWeight)
    by_weight = _gradients(gradOutput, input, weight, offset, None, _geometry_v1(**geometry))[1]
    gradWeight.add_(by_weight, alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    *,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Deformable convolution v2: every sample also has a factor.

    Args:
        input: (B, C, H, W).
        weight: (O, C / group, kernel_h, kernel_w).
        bias: (O,), or empty.
        ones: Scratch, unused here.
        offset: (B, 2 * deformable_group * kernel_h * kernel_w, OH, OW), y before x. Larger maps are read as
            mmcv's kernel reads them, see ``_as_kernel_reads``.
        mask: (B, deformable_group * kernel_h * kernel_w, OH, OW), the factors. Likewise.
        output: (B, O, OH, OW).
        columns: Scratch, unused here.
        with_bias: Whether ``bias`` counts.
        **geometry: See :func:`_geometry_v2`.
    """
    offset, mask = (_as_kernel_reads(t, output.shape[2:]) for t in (offset, mask))
    bias_or_none = bias if with_bias else None
    hand_over(output, _convolve(input, weight, offset, mask, bias_or_none, _geometry_v2(**geometry)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    *,
    with_bias: bool,
    **geometry: int,
) -> None:
    """All gradients of the deformable convolution v2, in the shapes of the forward; by the bias if ``with_bias``."""
    offset, mask = (_as_kernel_reads(t, grad_output.shape[2:]) for t in (offset, mask))
    by_input, by_weight, by_offset, by_mask, by_bias = _gradients(
        grad_output, input, weight, offset, mask, _geometry_v2(**geometry)
    )
    hand_over(grad_input, by_input)
    hand_over(grad_weight, by_weight)
    for buffer, gradient in ((grad_offset, by_offset), (grad_mask, by_mask)):
        if buffer.shape == gradient.shape:
            hand_over(buffer, gradient)
        else:  # what the kernel did not read has no gradient
            buffer.zero_().view(len(buffer), -1)[:, : gradient[0].numel()] = gradient.flatten(1)
    if with_bias:
        hand_over(grad_bias, by_bias)


def _geometry_v1(
    *,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> tuple[int, ...]:
    """Bring mmcv's names for v1 into torchvision's order.

    ``k`` is the kernel's size, ``d`` the stride, W across and H down; ``group`` counts the channel groups of the
    convolution, ``deformable_group`` those that share offsets. torchvision reads the kernel's size off the weight and
    chooses itself how many images it handles at once (``im2col_step``).
    """
    return dH, dW, padH, padW, dilationH, dilationW, group, deformable_group


def _geometry_v2(
    *,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
) -> tuple[int, ...]:
    """Bring mmcv's names for v2 into torchvision's order, as :func:`_geometry_v1` does."""
    return stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group


def _as_kernel_reads(maps: Tensor, size: torch.Size) -> Tensor:
    """Read offsets or factors whose maps are larger than the output as mmcv's kernel does.

    It takes the numbers of an image in the order in which they lie in memory, as if the maps had the
    output's size. DyHead relies on it: it convolves the next smaller level with the offsets of this one.

    Args:
        maps: (B, K, H, W).
        size: (OH, OW) of the output.

    Returns:
        (B, K, OH, OW).

    Raises:
        ValueError: If there are too few numbers.
    """
    if maps.shape[2:] == size:
        return maps
    wanted = maps.shape[1] * size.numel()
    if maps.shape[1:].numel() < wanted:
        raise ValueError(f'expected offsets and masks of at least {tuple(size)} cells, got {tuple(maps.shape[2:])}')
    return maps.flatten(1)[:, :wanted].reshape(len(maps), maps.shape[1], *size)


def _without_nan(offset: Tensor) -> tuple[Tensor, Tensor | None]:
    """Offsets that the CPU kernel survives: it crashes the process on NaN.

    Returns:
        The offsets, NaN replaced by a place far outside; and which output cells (B, 1, OH, OW) must
        therefore be NaN, or None where there was none.
    """
    if offset.is_cuda or not (lost := offset.isnan()).any():
        return offset, None
    return offset.masked_fill(lost, -30000.0), lost.any(1, keepdim=True)


def _operands(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five tensors of torchvision's op in one dtype; an unused mask or bias is there, but ignored."""
    input = widen(input, half_on_cuda=True)
    weight, offset = weight.to(input.dtype), offset.to(input.dtype)
    mask = input.new_zeros((len(input), 1)) if mask is None else mask.to(input.dtype)
    bias = input.new_zeros(len(weight)) if bias is None else bias.to(input.dtype)
    return input, weight, offset, mask, bias


def _convolve(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, geometry: tuple[int, ...]
) -> Tensor:
    offset, lost = _without_nan(offset)
    operands = _operands(input, weight, offset, mask, bias)
    output = kernels.deform_conv2d(*operands, *geometry, mask is not None)
    return output if lost is None else output.masked_fill_(lost, torch.nan)


def _gradients(
    grad: Tensor, input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, geometry: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by input, weight, offset, mask and bias."""
    operands = _operands(input, weight, _without_nan(offset)[0], mask, None)
    grad = grad.to(operands[0].dtype).contiguous()
    return kernels._deform_conv2d_backward(grad, *operands, *geometry, mask is not None)
