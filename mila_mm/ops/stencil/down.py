"""``relu_dwc_relu``: the middle of a downsampling, whose map is eight times as wide as its input, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from mila_mm.ops.common import (
    BACKENDS,
    as_written,
    autocast_dtype,
    check_map,
    compute_dtype,
    plain_operators,
    register,
    to_image,
    to_tokens,
)
from mila_mm.ops.stencil.reference import relu_dwc_relu_reference

MAX_CHANNELS = 2**14
"""Widest tokens that the kernels take: they go through channels in blocks."""


def by_triton(x: Tensor, height: int, width: int) -> bool:
    """Whether the Triton kernels serve x (B, height * width, C)."""
    if not x.is_cuda:
        return False
    from mila_mm.ops.triton import capability

    if capability.why_not_stencil(x, (height, width), MAX_CHANNELS) is None:
        return True
    capability.warn_of_what_is_missing(x.device)
    return False


def _relu_dwc_relu_forward(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """y (B, ceil(height / 2) * ceil(width / 2), C), which the backward takes too."""
    if by_triton(x, height, width):
        from mila_mm.ops.stencil import launch

        return launch.relu_dwc_relu_forward(x, weight, bias, height, width)
    return relu_dwc_relu_reference(x, weight, bias, (height, width)).contiguous()


def _relu_dwc_relu_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in the dtype of its input."""
    if by_triton(x, height, width):
        from mila_mm.ops.stencil import launch

        return launch.relu_dwc_relu_backward(grad_y, x, weight, bias, y, height, width)
    compute, channels = compute_dtype(x), x.shape[-1]
    with as_written(x):
        grad = torch.ops.aten.threshold_backward(grad_y.to(compute).contiguous(), y.to(compute), 0)
        grad_image, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            to_image(grad, -(-height // 2), -(-width // 2)),
            to_image(torch.relu(x.to(compute)), height, width),
            weight.to(compute),
            [channels],
            [2, 2],
            [1, 1],
            [1, 1],
            False,
            [0, 0],
            channels,
            [True, True, True],
        )
        grad_x = torch.ops.aten.threshold_backward(to_tokens(grad_image), x.to(compute), 0)
    grads = grad_x, grad_weight, grad_bias
    return tuple(grad.to(given.dtype).contiguous() for grad, given in zip(grads, (x, weight, bias), strict=True))


def _fake_forward(x, weight, bias, height, width):
    return x.new_empty(x.shape[0], (height + 1) // 2 * ((width + 1) // 2), x.shape[2])


def _fake_backward(grad_y, x, weight, bias, y, height, width):
    return tuple(t.new_empty(t.shape) for t in (x, weight, bias))


def _context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], output)
    ctx.size = inputs[3:]


def _differentiate(ctx, grad_y):
    return *torch.ops.mila_mm.relu_dwc_relu_backward(grad_y, *ctx.saved_tensors, *ctx.size), None, None


register(
    'relu_dwc_relu_forward',
    '(Tensor x, Tensor weight, Tensor bias, SymInt height, SymInt width) -> Tensor',
    _relu_dwc_relu_forward,
    _fake_forward,
    differentiate=_differentiate,
    setup_context=_context,
)
register(
    'relu_dwc_relu_backward',
    '(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, Tensor y, SymInt height, SymInt width) '
    '-> (Tensor, Tensor, Tensor)',
    _relu_dwc_relu_backward,
    _fake_backward,
    once="relu_dwc_relu: expected one differentiation, got a second; take backend='reference' for it",
)


def relu_dwc_relu(
    x: Tensor, weight: Tensor, bias: Tensor, spatial_shape: tuple[int, int], *, backend: str = 'auto'
) -> Tensor:
    """ReLU of a depthwise 3x3 convolution of stride 2 of ReLU(x); differentiable once, keeps its input and result.

    What lies between the two 1x1 convolutions of a downsampling (MILA's released code), 8C wide: the forward reads x
    once and writes a quarter of it, the backward reads both and the gradient once and writes the gradient of x.

    Args:
        x: (B, N, C), tokens row by row; any float dtype and strides. Under autocast cast to autocast's dtype.
        weight: (C, 1, 3, 3), of any float dtype; padding 1.
        bias: (C,), of any float dtype.
        spatial_shape: (H, W) with N = H * W, of any size.
        backend: As for :func:`cpe_norm`.

    Returns:
        (B, ceil(H / 2) * ceil(W / 2), C) in x's dtype; under autocast in autocast's.

    Raises:
        ValueError: Shapes or options that do not fit; the message says expected and got.
        RuntimeError: ``backend='triton'`` where the Triton kernels cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f'relu_dwc_relu: expected backend to be one of {", ".join(BACKENDS)}, got {backend!r}')
    if x.dim() != 3 or not x.is_floating_point():
        got = f'{tuple(x.shape)}, {x.dtype}'
        raise ValueError(f'relu_dwc_relu: expected x of shape (B, N, C) and a floating dtype, got {got}')
    check_map('relu_dwc_relu', 'x', x.shape[1], spatial_shape)
    for name, tensor, shape in (('weight', weight, (x.shape[2], 1, 3, 3)), ('bias', bias, (x.shape[2],))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f'relu_dwc_relu: expected {name} of shape {shape}, got {tuple(tensor.shape)}')
    if backend == 'triton' and (reason := _why_not_triton(x, spatial_shape)) is not None:
        raise RuntimeError(f"relu_dwc_relu: backend='triton' cannot run here: {reason}; take backend='auto'")
    if (low := autocast_dtype(x.device.type)) is not None and x.dtype != torch.float64:
        x = x.to(low)
    if plain_operators(x, backend):
        return relu_dwc_relu_reference(x, weight, bias, spatial_shape)
    return torch.ops.mila_mm.relu_dwc_relu_forward(x, weight, bias, *spatial_shape)


def _why_not_triton(x: Tensor, spatial_shape: tuple[int, int]) -> str | None:
    if not x.is_cuda:
        return f'expected CUDA tensors, got {x.device.type}'
    from mila_mm.ops.triton import capability

    return capability.why_not_stencil(x, spatial_shape, MAX_CHANNELS)
