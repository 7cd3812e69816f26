"""Launchers of column sums and LayerNorm; :mod:`mila_mm.ops.rows.kernels` states what they compute."""

import torch
from torch import Tensor

from mila_mm.ops.rows import kernels as row_kernels
from mila_mm.ops.triton import configs
from mila_mm.ops.triton.kept import Launch, start
from mila_mm.ops.triton.tensors import aligned, as_rows, fp32_like, on_device, readable


def column_parts_launch(rows: int, channels: int, row_stride: int, matrices: int = 1) -> tuple[Launch, int]:
    """For matrices (rows, channels) one behind the other; takes x and parts, of which there are so many a matrix."""
    setting = configs.COLUMN_SUM
    run = configs.column_rows_per_split(rows, channels)
    splits = -(-rows // run)
    # Where rows begin anywhere, channels are loaded one by one: half as many at a time, or registers spill.
    block = setting.rows if aligned(row_stride) else setting.rows // 2
    launch = Launch(
        row_kernels, 'column_parts_kernel', (-(-channels // setting.columns), splits, matrices),
        (row_stride, channels, rows, run), BLOCK=block, CHANNELS=setting.columns, **setting.options(),
    )  # fmt: skip
    return launch, splits


def norm_backward_launch(
    batch: int,
    tokens: int,
    channels: int,
    strides: tuple[int, ...],
    residual: bool,
    sums: int = 2,
    scaled: bool = False,
) -> tuple[Launch, int]:
    """For dx, dy, x of ``strides`` (B, N, B, N, B, N); takes these, mean, rstd, gamma, scale, g and parts.

    There are so many parts, of ``sums`` vectors each.
    """
    run = configs.norm_tokens_per_split(channels)
    splits = -(-tokens // run)
    launch = Launch(
        row_kernels, 'norm_backward_kernel', (splits, 1, batch), (*strides, tokens, run),
        RESIDUAL=residual, SUMS=sums, HAS_SCALE=scaled, **_norm_options(channels),
    )  # fmt: skip
    return launch, batch * splits


def column_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum x (..., C) over all but its last axis in fp32, rounded once, to ``dtype``; returns (C,)."""
    channels = x.shape[-1]
    if x.numel() == 0:
        return torch.zeros(channels, dtype=dtype, device=x.device)
    x = as_rows(x)
    launch, splits = column_parts_launch(x.shape[0], channels, x.stride(0))
    parts = fp32_like(x, splits, channels)
    with on_device(x):
        launch(x, parts)
        total = torch.empty(channels, dtype=dtype, device=x.device)
        reduce_parts(parts, total, total)
    return total


def reduce_parts(parts: Tensor, first: Tensor, second: Tensor) -> None:
    """Sum contiguous fp32 parts (P, C + D) over P, always in one order, into ``first`` (C,) and ``second`` (D,)."""
    count, channels = parts.shape
    setting = configs.COLUMN_REDUCE
    start(
        row_kernels.column_reduce_kernel, (-(-channels // setting.columns),),
        parts, first, second, channels, first.shape[0], count,
        BLOCK=setting.rows, CHANNELS=setting.columns, **setting.options(),
    )  # fmt: skip


def _norm_options(channels: int) -> dict[str, int]:
    """What the kernels with all channels of a token in one program share."""
    setting = configs.norm_launch(channels)
    return {
        'CHANNELS': channels,
        'PADDED': configs.padded_width(channels),
        'BLOCK': setting.rows * setting.columns,
        'ALIGNED': aligned(channels),
        **setting.options(),
    }


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel of :func:`mila_mm.ops.layer_norm`.

    Args:
        x: (B, N, C), any strides. weight, bias: (C,) of any float dtype. eps: Added to the variance. dtype: Of y.

    Returns:
        y (B, N, C) in ``dtype``, contiguous; mean and rstd (B, N) of x, fp32.
    """
    batch, tokens, channels = x.shape
    y = torch.empty((batch, tokens, channels), dtype=dtype, device=x.device)
    mean, rstd = fp32_like(x, batch, tokens), fp32_like(x, batch, tokens)
    if x.numel() == 0:
        return y, mean, rstd
    x = readable(x, 64)
    options = _norm_options(channels)
    with on_device(x):
        start(
            row_kernels.layer_norm_kernel, (-(-tokens // options['BLOCK']), 1, batch),
            x, weight.contiguous(), bias.contiguous(), y, mean, rstd, x.stride(0), x.stride(1), tokens, eps, **options,
        )  # fmt: skip
    return y, mean, rstd


def layer_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad_x: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels of the gradients.

    Args:
        grad_y: Gradient of y, (B, N, C), any strides. x, mean, rstd: What was normed, (B, N, C), and its statistics.
        weight, bias: As in the forward pass. grad_x: Gradient of another use of x, (B, N, C), added; or None.
        dtype: Of the gradient of x.

    Returns:
        Gradients of x (B, N, C) in ``dtype``, weight and bias, contiguous, the last two in their dtypes.
    """
    batch, tokens, channels = x.shape
    grad = torch.empty((batch, tokens, channels), dtype=dtype, device=x.device)
    if x.numel() == 0:
        return grad, torch.zeros_like(weight), torch.zeros_like(bias)
    grad_y, x = readable(grad_y, 64), readable(x, 64)
    other = grad_y if grad_x is None else readable(grad_x, 64)
    strides = *other.stride()[:2], *grad_y.stride()[:2], *x.stride()[:2]
    launch, count = norm_backward_launch(batch, tokens, channels, strides, grad_x is not None)
    parts = fp32_like(x, count, 2 * channels)
    grad_weight = torch.empty(channels, dtype=weight.dtype, device=x.device)
    grad_bias = torch.empty(channels, dtype=bias.dtype, device=x.device)
    with on_device(x):
        gamma = weight.contiguous()
        launch(other, grad_y, x, mean.contiguous(), rstd.contiguous(), gamma, gamma, grad, parts)
        reduce_parts(parts, grad_weight, grad_bias)
    return grad, grad_weight, grad_bias
