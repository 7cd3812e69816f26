"""The convolutions of a downsampling as one node of autograd, with a backward written by hand.

Two matrix products with :func:`mila_mm.ops.relu_dwc_relu` between them: as convolutions the products take a GPU's host
longer, and their biases are kernels of their own. Kept for the backward is the input of each of the three.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mila_mm.nn import batch_norm
from mila_mm.nn.nodes import FirstOrderOnly, direct_ops
from mila_mm.nn.step_weights import CastConvolutions
from mila_mm.ops.common import as_written, to_image, to_tokens
from mila_mm.ops.stencil.down import by_triton

Weights = tuple[Tensor, Tensor, Tensor, Tensor]
"""Weight and bias of the first and last convolution in the dtype that products are computed in."""


def _forward(x: Tensor, weights: Weights, stencil: tuple[Tensor, Tensor], size: tuple[int, int]) -> tuple[Tensor, ...]:
    """The result (B, N', 2C), and what goes into the stencil and comes out of it."""
    first, first_bias, last, last_bias = weights
    h = F.linear(x, first.flatten(1), first_bias)
    y = direct_ops().relu_dwc_relu_forward(h, *stencil, *size)
    return F.linear(y, last.flatten(1), last_bias), h, y


class DownNode(torch.autograd.Function):
    """``DownNode.apply(x, weights, (H, W), *parameters)`` with x (B, H * W, C) in the dtype of the weights.

    The parameters are weights and biases of the three convolutions; of the middle one they are computed with.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Weights, size: tuple[int, int], *params: Tensor) -> Tensor:
        """Compute (B, N', 2C)."""
        out, h, y = _forward(x, weights, (params[2], params[3]), size)
        ctx.size, ctx.shapes, ctx.master = size, (params[0].shape, params[4].shape), params[0].dtype
        ctx.strides = params[0].stride(), params[4].stride()
        ctx.params = params  # not for their values, which may have changed by then
        ctx.save_for_backward(x, h, y, weights[0], weights[2], *params[2:4])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x and of all parameters."""
        saved, ops, master = ctx.saved_tensors, direct_ops(), ctx.master
        x, h, y, first, last, *stencil = saved
        with torch.no_grad(), as_written(grad):
            of_y, of_last, of_last_bias = ops.linear_backward(grad.contiguous(), y, last.flatten(1), master)
            of_h, *of_stencil = ops.relu_dwc_relu_backward(of_y, h, *stencil, y, *ctx.size)
            of_x, of_first, of_first_bias = ops.linear_backward(of_h, x, first.flatten(1), master)
            if of_first.dtype != master:
                of_first, of_last = ops.cast_all([of_first, of_last], master)
            matrices = zip((of_first, of_last), ctx.shapes, ctx.strides, strict=True)
            of_first, of_last = (matrix.as_strided(shape, strides) for matrix, shape, strides in matrices)
        grads = of_x, of_first, of_first_bias, *of_stencil, of_last, of_last_bias
        if torch.is_grad_enabled():  # create_graph=True
            grads = tuple(FirstOrderOnly.apply(each, grad, x, *ctx.params) for each in grads)
        return grads[0], None, None, *grads[1:]


def run(x: Tensor, weights: Weights, size: tuple[int, int], params: tuple[Tensor, ...]) -> Tensor:
    """Compute the convolutions, as a node where somebody may ask for gradients."""
    with as_written(x):
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in params)):
            return DownNode.apply(x, weights, size, *params)
        with torch.no_grad():
            return _forward(x, weights, (params[2], params[3]), size)[0]


def is_strided(conv: nn.Conv2d) -> bool:
    """Whether a convolution is what ``relu_dwc_relu`` computes: depthwise, 3x3, of stride 2, zeros around the map."""
    built = conv.stride, conv.padding, conv.dilation, conv.padding_mode
    return built == ((2, 2), (1, 1), (1, 1), 'zeros') and conv.weight.shape == (conv.in_channels, 1, 3, 3)


def fits(layers: Any, x: Tensor, params: CastConvolutions) -> bool:
    """Whether the layers (:class:`mila_mm.nn.layers.ConvLayer`) can run as the node: as built, and by the kernels."""
    if len(layers) != 3 or not is_strided(layers[1].conv):
        return False
    one, two, three = layers
    if any(layer.conv.stride != (1, 1) or layer.conv.padding != (0, 0) for layer in (one, three)):
        return False
    if not (one.act and two.act) or three.act or any(bias is None for _, bias in params.values):
        return False
    if one.norm is not None or two.norm is not None or three._folded() is not None:
        return False
    weight, bias = params.values[0]
    if x.dtype != weight.dtype or any(value.shape[2:] != (1, 1) for value, _ in params.values[::2]):
        return False
    assert bias is not None
    return by_triton(bias[None, None], *x.shape[2:])


def downsample(layers: Any, x: Tensor, params: CastConvolutions, recompute: bool) -> tuple[Tensor, int, int]:
    """An image (B, C, H, W) of even sides, tokens in truth, to the tokens of the next stage, and their grid."""
    (first, first_bias), _, (last, last_bias) = params.values
    assert first_bias is not None and last_bias is not None
    height, width = x.shape[2:]
    sources = tuple(p for pair in params.params for p in pair if p is not None)
    rest = (first, first_bias, last, last_bias), (height, width), sources
    y = to_tokens(x)
    y = checkpoint(run, y, *rest, use_reentrant=False) if recompute else run(y, *rest)
    height, width, norm = height // 2, width // 2, layers[2].norm
    if norm is None:
        return y, height, width
    image = to_image(y, height, width)
    image = batch_norm.run(norm, image, False) if batch_norm.fits(norm, image) else norm(image)
    return to_tokens(image), height, width
