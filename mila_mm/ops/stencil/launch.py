"""Launchers of the block's stencils; the docstring of :mod:`mila_mm.ops.stencil.kernels` states what they compute."""

import torch
from torch import Tensor

from mila_mm.ops.attention import lepe_kernels
from mila_mm.ops.rows import launch as row_launch
from mila_mm.ops.stencil import kernels as stencil_kernels
from mila_mm.ops.triton import configs
from mila_mm.ops.triton.kept import start
from mila_mm.ops.triton.tensors import aligned, depthwise_taps, fp32_like, on_device, readable


def _tiles(setting: configs.Launch, height: int, width: int) -> tuple[int, int]:
    """Tiles across an image, and down."""
    return -(-width // setting.columns), -(-height // setting.rows)


def _tile_options(setting: configs.Launch) -> dict[str, int]:
    return {'ROWS': setting.rows, 'COLUMNS': setting.columns, **setting.options()}


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
    setting = configs.norm_launch(channels)
    across, down = _tiles(setting, height, width)
    with on_device(x):
        start(
            stencil_kernels.cpe_norm_kernel, (across, down, batch),
            x, depthwise_taps(conv_weight, x, channels), conv_bias.contiguous(), norm_weight.contiguous(),
            norm_bias.contiguous(), out, y, mean, rstd,
            x.stride(0), x.stride(1), height, width, eps,
            CHANNELS=channels, PADDED=configs.padded_width(channels), ALIGNED=aligned(channels),
            **_tile_options(setting),
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
        params = (conv_weight, conv_bias, norm_weight, norm_bias)
        return torch.empty_like(x), *(torch.zeros_like(p) for p in params)
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
    batch, tokens, channels = x.shape
    y = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    x = readable(x, width)
    setting = configs.STENCIL
    across, down = _tiles(setting, height, width)
    blocks = -(-channels // configs.STENCIL_CHANNELS)
    with on_device(x):
        start(
            stencil_kernels.dwc_silu_kernel, (across * blocks, down, batch),
            x, depthwise_taps(weight, x, configs.STENCIL_CHANNELS), bias.contiguous(), y, x.stride(0), x.stride(1),
            channels, height, width, blocks,
            CHANNELS=configs.STENCIL_CHANNELS, ALIGNED=aligned(channels), ACCURATE=x.dtype == torch.float32,
            **_tile_options(setting),
        )  # fmt: skip
    return y


def dwc_silu_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels of the gradients of x, weight and bias, from grad_y (B, N, C) of any strides."""
    batch, tokens, channels = x.shape
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(bias)
    x, grad_y = readable(x, width), readable(grad_y, width)
    grad = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    setting = configs.STENCIL
    across, down = _tiles(setting, height, width)
    blocks = -(-channels // configs.STENCIL_CHANNELS)
    with on_device(x):
        start(
            stencil_kernels.silu_backward_kernel, (across * blocks, down, batch),
            grad_y, x, depthwise_taps(weight, x, configs.STENCIL_CHANNELS), bias.contiguous(), grad,
            grad_y.stride(0), grad_y.stride(1), x.stride(0), x.stride(1), channels, height, width, blocks,
            CHANNELS=configs.STENCIL_CHANNELS, ALIGNED=aligned(channels), ACCURATE=x.dtype == torch.float32,
            **_tile_options(setting),
        )  # fmt: skip
    return _stencil_backward(grad, x, weight, bias, height, width, residual=False)


def _stencil_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from g (B, N, C), contiguous, the gradient of the convolution's result."""
    batch, tokens, channels = x.shape
    x = readable(x, width)
    setting = configs.STENCIL_BACKWARD
    across, down = _tiles(setting, height, width)
    tiles = across * down
    run = configs.tiles_per_split(tiles, configs.TILES_PER_STENCIL_SPLIT)
    splits = -(-tiles // run)
    blocks = -(-channels // configs.STENCIL_CHANNELS)
    grad_x = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    parts = fp32_like(x, batch * splits, 10, channels)
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    grad_bias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    with on_device(x):
        start(
            stencil_kernels.stencil_backward_kernel, (blocks, splits, batch),
            grad, x, depthwise_taps(weight, x, configs.STENCIL_CHANNELS), grad_x, parts, x.stride(0), x.stride(1),
            channels, height, width, tiles, across, run,
            RESIDUAL=residual, CHANNELS=configs.STENCIL_CHANNELS, ALIGNED=aligned(channels), **_tile_options(setting),
        )  # fmt: skip
        start(
            lepe_kernels.lepe_reduce_kernel,
            (10 * -(-channels // configs.LEPE_CHANNELS),),
            parts,
            grad_weight,
            grad_bias,
            channels,
            batch * splits,
            ROWS=configs.REDUCE_ROWS,
            CHANNELS=configs.LEPE_CHANNELS,
            num_warps=configs.REDUCE_WARPS,
        )
    return grad_x, grad_weight, grad_bias
