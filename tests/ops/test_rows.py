"""``layer_norm`` and ``column_sum`` without a GPU: what they return, autocast, autograd, registration, mistakes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops import column_sum, layer_norm, layer_norm_reference


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=random) for shape in ((2, 35, 24), (24,), (24,)))
    return [t.requires_grad_() for t in (x.to(dtype), weight, bias)]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_layer_norm_equals_pytorch(dtype: torch.dtype) -> None:
    x, weight, bias = inputs(dtype)
    y = layer_norm(x, weight, bias, eps=1e-3)
    want = F.layer_norm(x.double(), (24,), weight.double(), bias.double(), 1e-3)
    eps = max(torch.finfo(dtype).eps, 1e-7)  # the parameters are of 32 bits, and so are their gradients
    torch.testing.assert_close(y, want.to(dtype), rtol=4 * eps, atol=8 * eps)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, weight, bias), grad)
    exact = torch.autograd.grad(want, (x, weight, bias), grad.double())
    for ours, theirs in zip(got, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - theirs.double()).norm() <= 4 * eps * theirs.double().norm()


def test_layer_norm_under_autocast_returns_16_bits() -> None:
    x, weight, bias = inputs()
    with torch.autocast('cpu', torch.bfloat16):
        y = layer_norm(x, weight, bias)
        reference = layer_norm(x, weight, bias, backend='reference')
    assert y.dtype == reference.dtype == torch.bfloat16 and torch.equal(y, reference)
    assert torch.equal(y, layer_norm_reference(x, weight, bias, dtype=torch.bfloat16))
    assert torch.autograd.grad(y.sum(), x)[0].dtype == torch.float32


def test_layer_norm_is_a_registered_op() -> None:
    x, weight, bias = (t.detach() for t in inputs())
    torch.library.opcheck(torch.ops.mila_mm.layer_norm_forward, (x, weight, bias, 1e-5, torch.float32))
    _, mean, rstd = torch.ops.mila_mm.layer_norm_forward(x, weight, bias, 1e-5, torch.float32)
    torch.library.opcheck(torch.ops.mila_mm.layer_norm_backward, (x, x, weight, bias, mean, rstd))


def test_mistakes_of_layer_norm_are_named() -> None:
    x, weight, bias = inputs()
    with pytest.raises(ValueError, match=r'expected weight of shape \(24,\), got \(23,\)'):
        layer_norm(x, weight[:23], bias)
    with pytest.raises(ValueError, match=r'expected x of shape \(B, N, C\)'):
        layer_norm(x[0], weight, bias)
    with pytest.raises(ValueError, match='expected backend'):
        layer_norm(x, weight, bias, backend='cuda')
    with pytest.raises(RuntimeError, match='cannot run here: expected CUDA tensors'):
        layer_norm(x, weight, bias, backend='triton')
    with pytest.raises(RuntimeError, match='expected one differentiation'):
        (grad,) = torch.autograd.grad(layer_norm(x, weight, bias).sum(), x, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_column_sum(dtype: torch.dtype) -> None:
    x = torch.randn(3, 50, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    half = torch.cat((x, x), -1).chunk(2, -1)[1]
    for out in (None, torch.float32):
        got = column_sum(half, out)
        assert got.shape == (24,) and got.dtype == (out or dtype) and got.is_contiguous()
        want = x.double().sum((0, 1))
        assert (got.double() - want).abs().max() <= 50 * torch.finfo(got.dtype).eps
