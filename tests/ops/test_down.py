"""``relu_dwc_relu`` without a GPU: what it returns, autocast, autograd, registration, mistakes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops import relu_dwc_relu


def inputs(size: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = ((2, size[0] * size[1], 12), (12, 1, 3, 3), (12,))
    x, weight, bias = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


def plain(x: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    image = F.relu(x).transpose(1, 2).unflatten(2, size)
    return F.relu(F.conv2d(image, weight, bias, stride=2, padding=1, groups=12)).flatten(2).transpose(1, 2)


@pytest.mark.parametrize('size', [(6, 8), (5, 7), (1, 1), (1, 6)], ids=str)
def test_equals_the_layers(size: tuple[int, int]) -> None:
    leaves = inputs(size, torch.float64)
    y, want = relu_dwc_relu(*leaves, size), plain(*leaves, size)
    torch.testing.assert_close(y, want)
    grad = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_under_autocast() -> None:
    leaves = inputs((6, 8))
    with torch.autocast('cpu', torch.bfloat16):
        y = relu_dwc_relu(*leaves, (6, 8))
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in torch.autograd.grad(y.sum(), leaves)] == [torch.float32] * 3


@pytest.mark.parametrize('size', [(6, 8), (5, 7)], ids=str)
def test_is_a_registered_op(size: tuple[int, int]) -> None:
    x, weight, bias = (t.detach() for t in inputs(size))
    torch.library.opcheck(torch.ops.mila_mm.relu_dwc_relu_forward, (x, weight, bias, *size))
    y = torch.ops.mila_mm.relu_dwc_relu_forward(x, weight, bias, *size)
    torch.library.opcheck(torch.ops.mila_mm.relu_dwc_relu_backward, (y, x, weight, bias, y, *size))


def test_mistakes_are_named() -> None:
    x, weight, bias = inputs((6, 8))
    with pytest.raises(ValueError, match=r'expected x of N = H \* W tokens'):
        relu_dwc_relu(x, weight, bias, (6, 7))
    with pytest.raises(ValueError, match=r'expected bias of shape \(12,\), got \(11,\)'):
        relu_dwc_relu(x, weight, bias[:11], (6, 8))
    with pytest.raises(RuntimeError, match='cannot run here: expected CUDA tensors'):
        relu_dwc_relu(x, weight, bias, (6, 8), backend='triton')
    with pytest.raises(RuntimeError, match='expected one differentiation'):
        (grad,) = torch.autograd.grad(relu_dwc_relu(x, weight, bias, (6, 8)).sum(), x, create_graph=True)
        grad.sum().backward()
