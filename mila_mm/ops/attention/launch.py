"""Launchers: shapes and strides to grids and kernels. The docstring of the package states what they compute."""

import torch
from torch import Tensor

from mila_mm.ops.attention.geometry import Geometry, strides_of
from mila_mm.ops.stencil.launch import depthwise_weight_backward
from mila_mm.ops.triton.tensors import depthwise_taps, fp32_like, on_device, readable, vector_or


def _parts(geometry: Geometry, like: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the sums of the splits: a (d, d) matrix and a (d,) vector for each split and head."""
    square, vector = geometry.state_shapes(geometry.splits)
    return fp32_like(like, *square), fp32_like(like, *vector)


def _reduced(geometry: Geometry, parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum over the splits: (B, heads, d, d) and (B, heads, d). A single split is its own sum."""
    if geometry.splits == 1:
        return parts
    square, vector = geometry.state_shapes()
    sums = fp32_like(parts[0], *square), fp32_like(parts[0], *vector)
    geometry.reduce()(*parts, *sums)
    return sums


def attention_forward(
    qk: Tensor,
    v: Tensor,
    lepe_weight: Tensor | None,
    lepe_bias: Tensor | None,
    gate: Tensor | None,
    height: int,
    width: int,
    num_heads: int,
    eps: float,
    rope_base: float,
    *,
    dots: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernels.

    Args:
        qk: (B, N, 2C), q first. v: (B, N, C). gate: (B, N, C) before its SiLU, or None; all of one dtype.
        lepe_weight: (C, 1, 3, 3) and lepe_bias (C,) of any float dtype, or both None.
        height, width: The map, with N = height * width. num_heads: Heads of C / num_heads channels.
        eps: Added to the normaliser. rope_base: Base of the rotation frequencies.
        dots: How to take matrix products, see :func:`mila_mm.ops.triton.configs.arithmetic`.

    Returns:
        y (B, N, C) contiguous in v's dtype; the state (B, heads, d, d) and the key mean (B, heads, d), fp32.
    """
    batch, tokens, _ = v.shape
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if batch == 0 or tokens == 0:
        empty = (batch, num_heads, v.shape[2] // num_heads)
        return y, torch.zeros((*empty, empty[-1]), device=v.device), torch.zeros(empty, device=v.device)
    geometry = Geometry(v.shape, height, width, num_heads, rope_base, v.dtype, v.device, dots)
    tables = geometry.cos, geometry.sin
    qk, v = readable(qk, width), readable(v, width)
    gated = v if gate is None else readable(gate, width)
    with on_device(v):
        parts = _parts(geometry, v)
        geometry.state(strides_of(qk, v))(qk, v, *tables, *parts)
        state, mean = _reduced(geometry, parts)
        taps, bias = depthwise_taps(lepe_weight, v, geometry.head_width), vector_or(lepe_bias, v)
        output = geometry.output(strides_of(qk, v, gated), eps, lepe_weight is not None, gate is not None)
        output(qk, v, taps, bias, gated, *tables, state, mean, y)
    return y, state, mean


def attention_backward(
    grad_y: Tensor,
    qk: Tensor,
    v: Tensor,
    lepe_weight: Tensor | None,
    lepe_bias: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
    key_mean: Tensor,
    height: int,
    width: int,
    num_heads: int,
    eps: float,
    rope_base: float,
    *,
    dots: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Run the backward kernels.

    Args:
        grad_y: (B, N, C), gradient of the output; any strides. state, key_mean: As the forward pass returned them.
        qk, v, lepe_weight, lepe_bias, gate, height, width, num_heads, eps, rope_base, dots: As in the forward pass.

    Returns:
        Gradients of qk (B, N, 2C), v, lepe_weight, lepe_bias and gate, contiguous, each in the dtype of its input and
        None where that was None.
    """
    grad_qk = torch.empty(qk.shape, dtype=v.dtype, device=v.device)
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if v.shape[0] == 0 or v.shape[1] == 0:
        grad_weight, grad_bias, grad_gate = (
            None if x is None else torch.zeros_like(x) for x in (lepe_weight, lepe_bias, gate)
        )
        return grad_qk, grad_v, grad_weight, grad_bias, grad_gate
    geometry = Geometry(v.shape, height, width, num_heads, rope_base, v.dtype, v.device, dots)
    qk, v, grad_y = readable(qk, width), readable(v, width), readable(grad_y, width)
    state, key_mean = state.contiguous(), key_mean.contiguous()
    taps, grad_weight, grad_bias, grad_gate = v, None, None, None
    with on_device(v):
        if lepe_weight is not None:
            taps = depthwise_taps(lepe_weight, v, geometry.head_width)
        grad_out = grad_y
        if gate is not None:
            bias = vector_or(lepe_bias, v)
            grad_out, grad_gate = _gate_backward(
                geometry, grad_y, qk, v, taps, bias, lepe_bias is not None, readable(gate, width), state, key_mean, eps
            )
        _query_key_value_backward(
            geometry, grad_out, qk, v, taps, lepe_weight is not None, state, key_mean, eps, grad_qk, grad_v
        )
        if lepe_weight is not None and lepe_bias is not None:
            grad_weight, grad_bias = depthwise_weight_backward(grad_out, v, lepe_weight, lepe_bias, height, width)
    return grad_qk, grad_v, grad_weight, grad_bias, grad_gate


def _gate_backward(
    geometry: Geometry,
    grad_y: Tensor,
    qk: Tensor,
    v: Tensor,
    taps: Tensor,
    bias: Tensor,
    lepe: bool,
    gate: Tensor,
    state: Tensor,
    key_mean: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the output before the gate and of the gate, both (B, N, C) contiguous."""
    grad_out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    strides = *strides_of(grad_y, qk, v, gate), grad_gate.stride(1)
    geometry.gate_backward(strides, eps, lepe)(
        grad_y, qk, v, taps, bias, gate, geometry.cos, geometry.sin, state, key_mean, grad_out, grad_gate
    )
    return grad_out, grad_gate


def _query_key_value_backward(
    geometry: Geometry,
    grad_out: Tensor,
    qk: Tensor,
    v: Tensor,
    taps: Tensor,
    lepe: bool,
    state: Tensor,
    key_mean: Tensor,
    eps: float,
    grad_qk: Tensor,
    grad_v: Tensor,
) -> None:
    """Fill grad_qk and grad_v: the sweep over queries, the sum of its parts, the sweep over keys and values."""
    parts, tables = _parts(geometry, v), (geometry.cos, geometry.sin)
    geometry.query_backward(strides_of(grad_out, qk), eps)(grad_out, qk, *tables, state, key_mean, grad_qk, *parts)
    geometry.key_value_backward(strides_of(grad_out, qk, v), lepe)(
        grad_out, qk, v, taps, *tables, *_reduced(geometry, parts), grad_qk, grad_v
    )
