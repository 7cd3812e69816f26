"""How the gradients of a block's parameters lie in the one tensor that the kernels fill."""

from __future__ import annotations

from functools import lru_cache
from operator import itemgetter

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

# Where each parameter of a block, in the order of its node, has its gradient in the flat tensor.
_ORDER = itemgetter(6, 7, 0, 1, 18, 19, 15, 16, 8, 9, 20, 14, 12, 13, 21, 2, 10, 11, 3, 4, 22, 17, 23, 5)


def _shapes(channels: int, hidden: int) -> list[tuple[int, ...]]:
    """Of the gradients in the flat tensor.

    First all vectors: both norms with the bias of the product before each (out_proj, fc2), weight and bias of cpe1,
    dwc, cpe2 and lepe, biases of qk, in_proj, act_proj and fc1. Then the matrices in_proj, act_proj, qk, out_proj, fc1,
    fc2.
    """
    c, vector, weight = channels, (channels,), (channels, 1, 3, 3)
    vectors = [*[vector] * 6, *[weight, vector] * 4, (2 * c,), vector, vector, (hidden,)]
    return [*vectors, (c, c), (c, c), (2 * c, c), (c, c), (hidden, c), (c, hidden)]


def gradient_sizes(channels: int, hidden: int) -> list[int]:
    """Numbers of a block's gradients, one behind the other; the last six are those of matrices."""
    return [torch.Size(shape).numel() for shape in _shapes(channels, hidden)]


@lru_cache(maxsize=64)
def _templates(channels: int, hidden: int, device: torch.device) -> list[Tensor]:
    """Tensors of these shapes without memory of their own."""
    with torch.inference_mode(False):
        return [torch.empty(1, device=device).expand(shape) for shape in _shapes(channels, hidden)]


def in_order(flat: Tensor, channels: int, hidden: int) -> tuple[Tensor, ...]:
    """Take the flat gradients apart, in the order of a block's parameters (:mod:`mila_mm.nn.block_node`)."""
    # As distributed training takes its buckets apart: in one call, where views one by one would take a call each.
    return _ORDER(_unflatten_dense_tensors(flat, _templates(channels, hidden, flat.device)))
