"""The attention of a MILA block in plain PyTorch: the specification of ``mila_attention``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops.rope import grid_for


def feature_map(x: Tensor) -> Tensor:
    """Return elu(x) + 1 as exp(min(x, 0)) + max(x, 0): exp(x) for x <= 0 and x + 1 above.

    ``F.elu(x) + 1`` would round exp(x) to a multiple of the epsilon at 1: in bf16 every x below -6 becomes 0.
    """
    return x.clamp(max=0).exp() + F.relu(x)


def rotate(x: Tensor, grid: Tensor) -> Tensor:
    """Turn the pairs (2j, 2j + 1) of x (B, N, C) by a grid (N, C // 2, 2): (a cos - b sin, b cos + a sin)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = grid.unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def mila_attention_reference(
    qk: Tensor,
    v: Tensor,
    lepe_weight: Tensor | None,
    lepe_bias: Tensor | None,
    spatial_shape: tuple[int, int],
    num_heads: int,
    gate: Tensor | None = None,
    *,
    eps: float = 1e-6,
    rope_base: float = 10000.0,
) -> Tensor:
    """Linear attention with RoPE, LePE and an optional SiLU gate, differentiable to any order.

    The specification of :func:`mila_mm.ops.mila_attention`, which see for the arguments. It computes in fp64 where an
    input is fp64 and in fp32 otherwise, also under autocast, and casts the result to v's dtype. With f = elu + 1 and R
    the rotation of :mod:`mila_mm.ops.rope`, for each head (MILA, arXiv 2405.16605, section 4)::

        z_n = 1 / (f(q_n) . mean_m f(k_m) + eps)
        y_n = z_n R f(q_n) (1/N) sum_m (R f(k_m))^T v_m + lepe(v)_n,    times silu(gate_n)

    Returns:
        (B, N, C) in v's dtype.
    """
    height, width = spatial_shape
    tokens, channels = height * width, v.shape[2]
    dtype = torch.float64 if torch.float64 in (qk.dtype, v.dtype) else torch.float32
    grid = grid_for(v, height, width, channels, rope_base, dtype)

    # No autocast on meta tensors, which only have shapes.
    with torch.autocast('cpu' if v.is_meta else v.device.type, enabled=False):
        q, k = feature_map(qk.to(dtype)).chunk(2, dim=-1)
        values = v.to(dtype)
        q_rope, k_rope = rotate(q, grid), rotate(k, grid)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)

        z = 1 / (heads(q) @ heads(k.mean(dim=1, keepdim=True)).transpose(-2, -1) + eps)
        state = heads(k_rope).transpose(-2, -1) @ heads(values) / tokens
        out = ((heads(q_rope) * z) @ state).transpose(1, 2).flatten(2)
        if lepe_weight is not None:
            image = values.unflatten(1, (height, width)).permute(0, 3, 1, 2)
            bias = None if lepe_bias is None else lepe_bias.to(dtype)
            lepe = F.conv2d(image, lepe_weight.to(dtype), bias, padding=1, groups=channels)
            out = out + lepe.permute(0, 2, 3, 1).flatten(1, 2)
        if gate is not None:
            out = out * F.silu(gate.to(dtype))
    return out.to(v.dtype)
