"""``cpe_norm``, ``dwc_silu`` and ``relu_dwc_relu`` from plain operators: the specification that the kernels equal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops.common import as_written, compute_dtype, to_image, to_tokens


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Depthwise 3x3 on tokens (B, N, C), in x's dtype."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    return to_tokens(F.conv2d(to_image(x, height, width), weight, bias, padding=1, groups=x.shape[-1]))


def depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, N, C), weight and bias, all in x's dtype."""
    channels = x.shape[-1]
    grad_image, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        to_image(grad.contiguous(), height, width),
        to_image(x, height, width),
        weight.to(x.dtype),
        [channels],
        [1, 1],
        [1, 1],
        [1, 1],
        False,
        [0, 0],
        channels,
        [True, True, True],
    )
    return to_tokens(grad_image), grad_weight, grad_bias


def cpe_norm_reference(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    spatial_shape: tuple[int, int],
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the two results of :func:`cpe_norm` from plain operators, in fp64 for fp64 and in fp32 otherwise.

    Args:
        x: (B, N, C). conv_weight: (C, 1, 3, 3). conv_bias, norm_weight, norm_bias: (C,). spatial_shape: (H, W).
        eps: Of the LayerNorm.
        dtype: Of y. Defaults to x's.

    Returns:
        x' (B, N, C) in x's dtype, and y (B, N, C), the norm of the rounded x'.
    """
    compute = compute_dtype(x)
    with as_written(x):
        wide = x.to(compute)
        out = (wide + depthwise(wide, conv_weight, conv_bias, *spatial_shape)).to(x.dtype)
        y = F.layer_norm(out.to(compute), x.shape[-1:], norm_weight.to(compute), norm_bias.to(compute), eps)
    return out, y.to(x.dtype if dtype is None else dtype)


def dwc_silu_reference(x: Tensor, weight: Tensor, bias: Tensor, spatial_shape: tuple[int, int]) -> Tensor:
    """Compute the result of :func:`dwc_silu` from plain operators, in fp64 for fp64 and in fp32 otherwise."""
    with as_written(x):
        return F.silu(depthwise(x.to(compute_dtype(x)), weight, bias, *spatial_shape)).to(x.dtype)


def relu_dwc_relu_reference(x: Tensor, weight: Tensor, bias: Tensor, spatial_shape: tuple[int, int]) -> Tensor:
    """Compute the result of :func:`relu_dwc_relu` from plain operators, in fp64 for fp64 and in fp32 otherwise."""
    compute = compute_dtype(x)
    with as_written(x):
        image = to_image(F.relu(x.to(compute)), *spatial_shape)
        y = F.conv2d(image, weight.to(compute), bias.to(compute), stride=2, padding=1, groups=x.shape[-1])
        return to_tokens(F.relu(y)).to(x.dtype)
