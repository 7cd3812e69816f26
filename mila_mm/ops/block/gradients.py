"""How the gradients of a block's parameters lie in the one tensor that the kernels fill."""

from __future__ import annotations

from torch import Tensor


def gradient_sizes(channels: int, hidden: int) -> list[int]:
    """Numbers of a block's gradients in their flat buffer.

    First all vectors: both norms with the bias of the product before each (out_proj, fc2), weight and bias of cpe1,
    dwc, cpe2 and lepe, biases of qk, in_proj, act_proj and fc1. Then the matrices in_proj, act_proj, qk, out_proj, fc1,
    fc2.
    """
    c = channels
    vectors = [*[c] * 6, *[9 * c, c] * 4, 2 * c, c, c, hidden]
    return [*vectors, c * c, c * c, 2 * c * c, c * c, hidden * c, hidden * c]


def in_order(flat: Tensor, channels: int, hidden: int) -> list[Tensor]:
    """Take the flat gradients apart, in the order of a block's parameters (:mod:`mila_mm.nn.block_node`)."""
    c = channels
    pieces = flat.split_with_sizes(gradient_sizes(c, hidden))
    norm1, norm1_bias, out_bias, norm2, norm2_bias, fc2_bias, *stencils = pieces[:14]
    qk_bias, in_bias, act_bias, fc1_bias, in_proj, act_proj, qk, out, fc1, fc2 = pieces[14:]
    cpe1, dwc, cpe2, lepe = (weight.view(c, 1, 3, 3) for weight in stencils[::2])
    cpe1_bias, dwc_bias, cpe2_bias, lepe_bias = stencils[1::2]
    return [
        *(cpe1, cpe1_bias, norm1, norm1_bias),
        *(in_proj.view(c, c), act_proj.view(c, c), in_bias, act_bias, dwc, dwc_bias),
        *(qk.view(2 * c, c), qk_bias, lepe, lepe_bias, out.view(c, c), out_bias),
        *(cpe2, cpe2_bias, norm2, norm2_bias),
        *(fc1.view(hidden, c), fc1_bias, fc2.view(c, hidden), fc2_bias),
    ]
