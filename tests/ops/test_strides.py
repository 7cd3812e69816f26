"""What the fake kernels say of shapes, dtypes and strides is what the CPU kernels return, whatever comes in.

A compiler plans memory by the former; opcheck does not compare strides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import mila_mm.ops  # noqa: F401 - registers the ops

OPS = torch.ops.mila_mm


def as_it_is(x: Tensor) -> Tensor:
    return x


def as_channels_first(x: Tensor) -> Tensor:
    """``x`` with tokens adjacent in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def as_batch_inner(x: Tensor) -> Tensor:
    """``x`` with the batch between tokens and channels in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = [as_it_is, as_channels_first, as_batch_inner]
# batch, height, width, channels, heads: one row, one column, one token, odd, a head across the halves of RoPE
SHAPES = [(2, 1, 13, 64, 2), (2, 13, 1, 64, 2), (1, 1, 1, 64, 2), (2, 5, 7, 64, 2), (1, 5, 7, 96, 3)]


def described(x: Tensor) -> tuple[object, ...]:
    """Dtype, shape and the strides that mean something."""
    strides = [step for side, step in zip(x.shape, x.stride(), strict=True) if side != 1]
    return x.dtype, tuple(x.shape), strides


def check(op: Callable[..., Tensor | Sequence[Tensor]], *args: object) -> tuple[Tensor, ...]:
    """Run an op and its fake kernel, compare what they return, and return it."""
    mode = FakeTensorMode()
    fake_args = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args]
    with mode:
        fake = op(*fake_args)
    real = op(*args)
    real, fake = ((x,) if isinstance(x, Tensor) else tuple(x) for x in (real, fake))
    assert [described(x) for x in real] == [described(x) for x in fake], op
    return real


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_attention(shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    batch, height, width, channels, heads = shape
    tokens, options = height * width, (height, width, heads, 1e-6, 1e4)
    qk, v, gate, grad = (torch.randn(batch, tokens, n).to(dtype) for n in (2 * channels, *[channels] * 3))
    weight, bias = torch.randn(channels, 1, 3, 3), torch.randn(channels)
    for joint in (qk, layout(qk)):
        inputs = joint, layout(v), weight, bias, layout(gate)
        _, state, mean = check(OPS.attention_forward, *inputs, *options)
        for given in (inputs, (*inputs[:2], None, None, inputs[4]), (*inputs[:4], None)):
            check(OPS.attention_backward, layout(grad), *given, state, mean, *options)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_stencils(shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    batch, height, width, channels, _ = shape
    x, grad = (layout(torch.randn(batch, height * width, channels).to(dtype)) for _ in range(2))
    weight, bias = torch.randn(channels, 1, 3, 3), torch.randn(channels)
    norm = weight, bias, bias + 1, bias
    out, _, mean, rstd = check(OPS.cpe_norm_forward, x, *norm, height, width, 1e-5, dtype)
    check(OPS.cpe_norm_forward, x, *norm, height, width, 1e-5, torch.bfloat16)
    check(OPS.cpe_norm_backward, grad, grad, x, *norm, out, mean, rstd, height, width)
    check(OPS.dwc_silu_forward, x, weight, bias, height, width)
    check(OPS.dwc_silu_backward, grad, x, weight, bias, height, width)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_layer_norm(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    x, grad = (layout(torch.randn(2, 35, 64).to(dtype)) for _ in range(2))
    vector = torch.randn(64)
    for y_dtype in (dtype, torch.bfloat16):
        _, mean, rstd = check(OPS.layer_norm_forward, x, vector, vector, 1e-5, y_dtype)
    check(OPS.layer_norm_backward, grad, x, vector, vector, mean, rstd)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_batch_norm(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    x, grad = (layout(torch.randn(2, 35, 64).to(dtype)) for _ in range(2))
    vector, rest = torch.randn(64), (None, None, None, 0.1, 1e-5, True)
    _, statistics = check(OPS.batch_norm_forward, x, vector, vector, *rest)
    check(OPS.batch_norm_backward, grad, x, vector, vector, statistics, True)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_relu_dwc_relu(shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    batch, height, width, channels, _ = shape
    x = layout(torch.randn(batch, height * width, channels).to(dtype))
    weight, bias = torch.randn(channels, 1, 3, 3), torch.randn(channels)
    (y,) = check(OPS.relu_dwc_relu_forward, x, weight, bias, height, width)
    check(OPS.relu_dwc_relu_backward, layout(torch.randn_like(y)), x, weight, bias, y, height, width)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_mlp(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    x, shortcut, grad = (layout(torch.randn(2, 35, 16)) for _ in range(3))
    x, scale = x.to(dtype), torch.rand(2)
    weights = [torch.randn(shape).to(dtype) for shape in ((24, 16), (24,), (16, 24), (16,))]
    for other in (None, shortcut, shortcut.to(dtype)):
        for factor in (None, scale):
            (y,) = check(OPS.mlp_forward, x, *weights, other, factor)
            check(OPS.mlp_backward, grad.to(y.dtype), x, *weights, factor)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('tokens', [1, 9, 36, 37, 200])
def test_gated_scan(tokens: int, layout: Callable[[Tensor], Tensor]) -> None:
    q, v = (layout(torch.rand(2, tokens, width)) for width in (4, 6))
    rate = -torch.rand(2, 6)
    for length in (4, 56):
        y, starts = check(OPS.gated_scan_forward, q, q, v, v, rate, 2, length)
        check(OPS.gated_scan_backward, layout(y), q, q, v, v, rate, starts, 2, length)
