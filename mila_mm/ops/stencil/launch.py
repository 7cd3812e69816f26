"""Launchers of the block's stencils; the docstring of :mod:`mila_mm.ops.stencil.kernels` states what they compute."""

import torch
from torch import Tensor

from mila_mm.ops.rows import launch as row_launch
from mila_mm.ops.stencil import down_kernels, lepe_kernels
from mila_mm.ops.stencil import kernels as stencil_kernels
from mila_mm.ops.triton import configs
from mila_mm.ops.triton.kept import Launch, start
from mila_mm.ops.triton.tensors import aligned, fp32_like, on_device, readable


def _runs(setting: configs.Strip, batch: int, blocks: int, height: int, width: int) -> tuple[tuple[int, int, int], int]:
    """Grid of a kernel that walks down strips, and the rows of its runs."""
    side = blocks * setting.strips(width)
    rows = configs.rows_per_run(height, side * batch)
    return (side, -(-height // rows), batch), rows


def _blocks(channels: int) -> int:
    """Blocks of channels of the kernels that need no sum over channels."""
    return -(-channels // configs.STENCIL_CHANNELS)


def _options(setting: configs.Strip, channels: int) -> dict[str, object]:
    """Constants of the same kernels."""
    return {'CHANNELS': configs.STENCIL_CHANNELS, 'ALIGNED': aligned(channels), **setting.options()}


def cpe_norm_launch(batch: int, channels: int, height: int, width: int, strides: tuple[int, ...], eps: float) -> Launch:
    """For x of ``strides`` (B, N); takes x, weight, bias, gamma, beta, x', y, mean, rstd."""
    setting = configs.norm_strip(channels)
    grid, rows = _runs(setting, batch, 1, height, width)
    return Launch(
        stencil_kernels, 'cpe_norm_kernel', grid, (*strides, height, width, rows, eps),
        CHANNELS=channels, PADDED=configs.padded_width(channels), ALIGNED=aligned(channels), **setting.options(),
    )  # fmt: skip


def dwc_silu_launch(
    batch: int, channels: int, height: int, width: int, strides: tuple[int, ...], dtype: torch.dtype, backward: bool
) -> Launch:
    """For x and then du, of ``strides`` (B, N, B, N) in ``dtype``; takes x, weight, bias, du, and u or g."""
    setting, blocks = configs.strip(dtype, aligned(channels), backward), _blocks(channels)
    grid, rows = _runs(setting, batch, blocks, height, width)
    return Launch(
        stencil_kernels, 'dwc_silu_kernel', grid, (*strides, channels, height, width, blocks, rows),
        BACKWARD=backward, ACCURATE=dtype == torch.float32, **_options(setting, channels),
    )  # fmt: skip


def stencil_backward_launch(
    batch: int, channels: int, height: int, width: int, strides: tuple[int, ...], residual: bool
) -> tuple[Launch, int]:
    """For ``strides`` (B, N) of x and (N,) of dx; takes g, x, weight, dx, parts, of which there are so many."""
    setting, blocks = configs.STRIP_BACKWARD, _blocks(channels)
    grid, rows = _runs(setting, batch, blocks, height, width)
    launch = Launch(
        stencil_kernels, 'stencil_backward_kernel', grid, (*strides, channels, height, width, blocks, rows),
        RESIDUAL=residual, **_options(setting, channels),
    )  # fmt: skip
    return launch, grid[0] // blocks * grid[1] * grid[2]


def depthwise_weight_launch(
    batch: int, channels: int, height: int, width: int, strides: tuple[int, ...], dtype: torch.dtype
) -> tuple[Launch, int]:
    """For g and then x, of ``strides`` (B, N, B, N) in ``dtype``; takes g, x, parts, of which there are so many."""
    setting, blocks = configs.strip(dtype, aligned(channels)), _blocks(channels)
    grid, rows = _runs(setting, batch, blocks, height, width)
    launch = Launch(
        lepe_kernels, 'lepe_backward_kernel', grid, (*strides, channels, height, width, blocks, rows),
        **_options(setting, channels),
    )  # fmt: skip
    return launch, grid[0] // blocks * grid[1] * grid[2]


def cpe_norm_forward(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    height: int,
    width: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel of :func:`mila_mm.ops.cpe_norm`.

    Args:
        x: (B, N, C), any strides. conv_weight: (C, 1, 3, 3). conv_bias, norm_weight, norm_bias: (C,); of any float
            dtype.
        height, width: The map, N = height * width. eps: Of the LayerNorm. dtype: Of y.

    Returns:
        x' (B, N, C) in x's dtype and y (B, N, C) in ``dtype``, contiguous; mean and rstd (B, N) of x', fp32.
    """
    batch, tokens, channels = x.shape
    out = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    y = torch.empty((batch, tokens, channels), dtype=dtype, device=x.device)
    mean, rstd = fp32_like(x, batch, tokens), fp32_like(x, batch, tokens)
    if x.numel() == 0:
        return out, y, mean, rstd
    x = readable(x, width)
    launch = cpe_norm_launch(batch, channels, height, width, x.stride()[:2], eps)
    with on_device(x):
        launch(
            x, conv_weight.contiguous(), conv_bias.contiguous(), norm_weight.contiguous(), norm_bias.contiguous(),
            out, y, mean, rstd,
        )  # fmt: skip
    return out, y, mean, rstd


def cpe_norm_backward(
    grad_out: Tensor,
    grad_y: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the kernels of the gradients.

    Args:
        grad_out, grad_y: Gradients of x' and y, (B, N, C), any strides. out, mean, rstd: x' and its statistics, as the
            forward pass returned them. The rest as there.

    Returns:
        Gradients of x, conv_weight, conv_bias, norm_weight and norm_bias, contiguous, each in the dtype of its input.
    """
    if x.numel() == 0:
        grad_conv = torch.zeros_like(conv_weight), torch.zeros_like(conv_bias)
        return torch.empty_like(x), *grad_conv, torch.zeros_like(norm_weight), torch.zeros_like(norm_bias)
    norm = row_launch.layer_norm_backward(grad_y, out, mean, rstd, norm_weight, norm_bias, grad_out, x.dtype)
    return *_stencil_backward(norm[0], x, conv_weight, conv_bias, height, width, residual=True), *norm[1:]


def dwc_silu_forward(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Run the kernel of :func:`mila_mm.ops.dwc_silu`.

    Args:
        x: (B, N, C), any strides. weight: (C, 1, 3, 3) and bias (C,) of any float dtype.
        height, width: The map, N = height * width.

    Returns:
        (B, N, C) contiguous in x's dtype.
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        x = readable(x, width)
        _convolve_silu(x, weight, bias, x, y, height, width, backward=False)
    return y


def dwc_silu_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels of the gradients of x, weight and bias, from grad_y (B, N, C) of any strides."""
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    x, grad_y = readable(x, width), readable(grad_y, width)
    grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _convolve_silu(x, weight, bias, grad_y, grad, height, width, backward=True)
    return _stencil_backward(grad, x, weight, bias, height, width, residual=False)


def _convolve_silu(
    x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor, y: Tensor, height: int, width: int, backward: bool
) -> None:
    """Fill y with silu(p), or ``backward`` with grad_y silu'(p); p is the convolution of x."""
    strides = *x.stride()[:2], *grad_y.stride()[:2]
    launch = dwc_silu_launch(x.shape[0], x.shape[2], height, width, strides, x.dtype, backward)
    with on_device(x):
        launch(x, weight.contiguous(), bias.contiguous(), grad_y, y)


def _stencil_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from g (B, N, C), contiguous, the gradient of the convolution's result."""
    batch, _, channels = x.shape
    x = readable(x, width)
    launch, count = stencil_backward_launch(batch, channels, height, width, (*x.stride()[:2], channels), residual)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = fp32_like(x, count, 10, channels)
    with on_device(x):
        launch(grad, x, weight.contiguous(), grad_x, parts)
        return grad_x, *reduce_weight_parts(parts, weight, bias)


def depthwise_weight_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight (C, 1, 3, 3) and bias (C,) of a depthwise 3x3 of x (B, N, C), in their dtypes.

    From grad, the gradient of its result; both as :func:`mila_mm.ops.triton.tensors.readable` returns them.
    """
    strides = *grad.stride()[:2], *x.stride()[:2]
    launch, count = depthwise_weight_launch(x.shape[0], x.shape[2], height, width, strides, x.dtype)
    parts = fp32_like(x, count, 10, x.shape[2])
    with on_device(x):
        launch(grad, x, parts)
        return reduce_weight_parts(parts, weight, bias)


def reduce_weight_parts(parts: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Sum parts (P, 10, C): the gradients of a depthwise weight (C, 1, 3, 3) and bias (C,), in their dtypes."""
    count, _, channels = parts.shape
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    grad_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    start(
        lepe_kernels.lepe_reduce_kernel, (10 * -(-channels // configs.LEPE_CHANNELS),),
        parts, grad_weight, grad_bias, channels, count,
        ROWS=configs.REDUCE_ROWS, CHANNELS=configs.LEPE_CHANNELS, num_warps=configs.REDUCE_WARPS,
    )  # fmt: skip
    return grad_weight, grad_bias


def relu_dwc_relu_forward(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Run the kernel of :func:`mila_mm.ops.relu_dwc_relu`.

    Args:
        x: (B, N, C), any strides. weight: (C, 1, 3, 3) and bias (C,) of any float dtype.
        height, width: The map of x, N = height * width.

    Returns:
        (B, ceil(height / 2) * ceil(width / 2), C) contiguous in x's dtype.
    """
    batch, _, channels = x.shape
    out_height, out_width = -(-height // 2), -(-width // 2)
    y = torch.empty((batch, out_height * out_width, channels), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x = readable(x, width)
    setting, blocks = configs.STRIP_DOWN, _blocks(channels)
    grid, rows = _runs(setting, batch, blocks, out_height, out_width)
    with on_device(x):
        start(
            down_kernels.relu_dwc_relu_kernel, grid,
            x, weight.contiguous(), bias.contiguous(), y, x.stride(0), x.stride(1),
            channels, height, width, out_height, out_width, blocks, rows,
            CHANNELS=configs.STENCIL_CHANNELS, ALIGNED=aligned(channels), **setting.options(),
        )  # fmt: skip
    return y


def relu_dwc_relu_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels of the gradients of x, weight and bias, from grad_y (B, N', C) of any strides and y."""
    batch, tokens, channels = x.shape
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    out_height, out_width = -(-height // 2), -(-width // 2)
    x, y, grad_y = readable(x, width), readable(y, width), readable(grad_y, width)
    setting = configs.STRIP_DOWN_BACKWARD if aligned(channels) else configs.STRIP_DOWN_BACKWARD_UNALIGNED
    blocks = _blocks(channels)
    grid, rows = _runs(setting, batch, blocks, out_height, out_width)
    grad_x = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    parts = fp32_like(x, grid[0] // blocks * grid[1] * grid[2], 10, channels)
    with on_device(x):
        start(
            down_kernels.relu_dwc_relu_backward_kernel, grid,
            grad_y, y, x, weight.contiguous(), grad_x, parts, grad_y.stride(0), grad_y.stride(1),
            y.stride(0), y.stride(1), x.stride(0), x.stride(1),
            channels, height, width, out_height, out_width, blocks, rows,
            CHANNELS=configs.STENCIL_CHANNELS, ALIGNED=aligned(channels), **setting.options(),
        )  # fmt: skip
        return grad_x, *reduce_weight_parts(parts, weight, bias)
