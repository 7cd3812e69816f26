"""``mlp`` without a GPU: what it returns, what it keeps, autocast, registration, mistakes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops import mlp, mlp_reference


def draw(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, the four parameters, the shortcut and the scale."""
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 35, 12), (20, 12), (20,), (12, 20), (12,), (2, 35, 12), (2,))
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize('with_shortcut', [True, False])
@pytest.mark.parametrize('with_scale', [True, False])
def test_equals_the_layers_and_their_gradients(with_shortcut: bool, with_scale: bool) -> None:
    *leaves, shortcut, scale = draw()
    leaves = [t.requires_grad_() for t in (*leaves, shortcut)]
    x, w1, b1, w2, b2, shortcut = leaves
    given = leaves if with_shortcut else leaves[:5]
    y = mlp(x, w1, b1, w2, b2, shortcut if with_shortcut else None, scale if with_scale else None)
    want = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2) * (scale[:, None, None] if with_scale else 1)
    want = want + shortcut if with_shortcut else want
    torch.testing.assert_close(y, want)
    grad = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, given, grad), torch.autograd.grad(want, given, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_of_the_hidden_width_is_kept() -> None:
    *leaves, shortcut, scale = draw()
    kept: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        mlp(*(t.requires_grad_() for t in leaves), shortcut.requires_grad_(), scale)
    assert sorted(kept) == sorted([(2, 35, 12), (20, 12), (20,), (12, 20), (12,), (2,)])


def test_under_autocast_the_residual_stream_keeps_its_dtype() -> None:
    *leaves, shortcut, _ = draw(torch.float32)
    leaves = [t.requires_grad_() for t in (*leaves, shortcut)]
    with torch.autocast('cpu', torch.bfloat16):
        assert mlp(*leaves[:5]).dtype == torch.bfloat16
        y = mlp(*leaves)
    assert y.dtype == torch.float32
    assert [g.dtype for g in torch.autograd.grad(y.sum(), leaves)] == [torch.float32] * 6
    exact = mlp_reference(*leaves)
    assert (y - exact).norm() <= 1e-2 * exact.norm()


def test_is_a_registered_op() -> None:
    *tensors, shortcut, scale = draw(torch.float32)
    for rest in ((None, None), (shortcut, scale)):
        torch.library.opcheck(torch.ops.mila_mm.mlp_forward, (*tensors, *rest))
    torch.library.opcheck(torch.ops.mila_mm.mlp_backward, (shortcut, *tensors, scale))


def test_mistakes_are_named() -> None:
    x, w1, b1, w2, b2, shortcut, scale = draw(torch.float32)
    with pytest.raises(ValueError, match=r'expected fc2_weight of shape \(12, 20\), got \(20, 12\)'):
        mlp(x, w1, b1, w2.t(), b2)
    with pytest.raises(ValueError, match=r'expected scale of shape \(2,\)'):
        mlp(x, w1, b1, w2, b2, shortcut, scale[:1])
    with pytest.raises(ValueError, match='expected parameters of dtype'):
        mlp(x, w1.half(), b1, w2, b2)
    with pytest.raises(ValueError, match='expected backend'):
        mlp(x, w1, b1, w2, b2, backend='triton')
    with pytest.raises(RuntimeError, match='expected one differentiation'):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(mlp(x, w1, b1, w2, b2).sum(), x, create_graph=True)
        grad.sum().backward()
