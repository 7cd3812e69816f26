"""The kernels of ``mlp`` against fp64 autograd of plain operators, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip('triton')

pytestmark = [pytest.mark.usefixtures('poisoned_memory'), pytest.mark.interpreted]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize('dtype', [FP32, FP16, BF16], ids=['fp32', 'fp16', 'bf16'])
# Relative root mean square error; the interpreter truncates to bf16, and multiplies bf16 in fp32.
LIMITS = {FP32: 2e-6, FP16: 1e-3, BF16: 8e-3}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def draw(batch: int, tokens: int, channels: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """x, the four parameters, the shortcut and the scale."""
    random = torch.Generator().manual_seed(0)
    shapes = ((batch, tokens, channels), (hidden, channels), (hidden,), (channels, hidden), (channels,))
    tensors = [torch.randn(shape, generator=random) for shape in (*shapes, shapes[0], (batch,))]
    tensors[1] /= channels**0.5
    tensors[3] /= hidden**0.5
    return [t.to(dtype) for t in tensors]


def forward(*inputs: Tensor | None) -> Tensor:
    from mila_mm.ops.feed_forward import launch

    return launch.mlp_forward(*inputs)


def expected(*inputs: Tensor | None) -> Tensor:
    x, w1, b1, w2, b2, shortcut, scale = (None if t is None else t.double() for t in inputs)
    y = F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
    y = y if scale is None else y * scale[:, None, None]
    return y if shortcut is None else y + shortcut


@DTYPES
@pytest.mark.parametrize('shape', [(2, 77, 16, 64), (1, 1, 32, 128), (1, 130, 32, 40), (2, 9, 24, 96)], ids=str)
def test_forward_equals_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *inputs, shortcut, scale = draw(*shape, dtype)
    for rest in ((None, None), (shortcut, None), (shortcut.float(), scale), (None, scale.float())):
        y = forward(*inputs, *rest)
        assert y.dtype == (dtype if rest[0] is None else rest[0].dtype) and y.is_contiguous()
        assert relative(y, expected(*inputs, *rest)) <= LIMITS[dtype]


def as_first_half(x: Tensor) -> Tensor:
    """``x`` as the first half of a joint projection."""
    return torch.cat((x, torch.full_like(x, float('nan'))), dim=-1).chunk(2, dim=-1)[0]


def as_channels_first(x: Tensor) -> Tensor:
    """``x`` with tokens adjacent in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize('index', [0, 5], ids=['x', 'shortcut'])
@pytest.mark.parametrize('layout', [as_first_half, as_channels_first])
def test_layouts_give_the_same_bits(layout: Callable[[Tensor], Tensor], index: int) -> None:
    inputs = draw(2, 9, 32, 64, FP16)
    want = forward(*inputs)
    inputs[index] = layout(inputs[index])
    assert torch.equal(forward(*inputs), want)


def test_an_image_with_nan_leaves_the_others_alone_bitwise() -> None:
    inputs = draw(3, 9, 16, 64, FP32)
    want = forward(*inputs)
    inputs[0][1, 4] = float('nan')
    got = forward(*inputs)
    assert torch.equal(got[::2], want[::2]) and got[1, 4].isnan().all() and got[1, 5].isfinite().all()


def gelu_backward(h: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from mila_mm.ops.feed_forward import launch

    h, grad = h.clone(), grad.clone()
    total = launch.gelu_backward_(h, grad, FP32)
    return h, grad, total


@DTYPES
@pytest.mark.parametrize('shape', [(70, 64), (1, 128), (33, 40), (2, 5, 96)], ids=str)
def test_gelu_backward_equals_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    h = (3 * torch.randn(shape, generator=random)).to(dtype)
    grad = torch.randn(shape, generator=random).to(dtype)
    activated, grad_h, total = gelu_backward(h, grad)
    leaf = h.double().requires_grad_()
    want = F.gelu(leaf)
    (exact,) = torch.autograd.grad(want, leaf, grad.double())
    assert relative(activated, want.detach()) <= LIMITS[dtype]
    assert relative(grad_h, exact) <= LIMITS[dtype]
    assert relative(total, exact.reshape(-1, shape[-1]).sum(0)) <= 5e-6  # summed before it is rounded
    again = gelu_backward(h, grad)
    assert all(torch.equal(a, b) for a, b in zip((activated, grad_h, total), again, strict=True))


def test_gelu_backward_in_several_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    from mila_mm.ops.triton import configs

    h, grad = torch.randn(2, 50, 48, generator=torch.Generator().manual_seed(0))
    want = gelu_backward(h, grad)
    monkeypatch.setattr(configs, 'column_rows_per_split', lambda rows, channels: 8)
    monkeypatch.setattr(configs, 'GELU_BACKWARD_FP32', configs.Launch(4, 16, 4))
    for got, whole in zip(gelu_backward(h, grad), want, strict=True):
        torch.testing.assert_close(got, whole, rtol=1e-6, atol=1e-5)


@DTYPES
@pytest.mark.parametrize(
    ('rows', 'channels', 'hidden', 'run'), [(70, 64, 80, 100), (1, 16, 64, 1), (33, 96, 48, 20)], ids=str
)
def test_hidden_backward_equals_fp64(
    rows: int, channels: int, hidden: int, run: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mila_mm.ops.feed_forward import launch
    from mila_mm.ops.triton import configs

    monkeypatch.setattr(configs, 'column_rows_per_split', lambda rows, channels: run)
    x, w1, b1, w2, _, grad, _ = draw(1, rows, channels, hidden, dtype)
    results = []
    for _ in range(2):
        start, count = launch.hidden_backward_launch(rows, channels, hidden)
        made = *(torch.empty(rows, hidden, dtype=dtype) for _ in range(2)), torch.empty(count, hidden)
        start(x, grad, w1, b1, w2, *made)
        results.append(made)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)) and count == -(-rows // run)
    h = F.linear(x[0].double(), w1.double(), b1.double()).requires_grad_()
    activated = F.gelu(h)
    (of_h,) = torch.autograd.grad(activated, h, grad[0].double() @ w2.double())
    got, got_of_h, parts = results[0]
    assert relative(got, activated.detach()) <= LIMITS[dtype]
    assert relative(got_of_h, of_h) <= LIMITS[dtype]
    assert relative(parts.sum(0), of_h.sum(0)) <= 5e-6  # summed before it is rounded


def test_nothing() -> None:
    assert forward(*draw(0, 9, 16, 64, FP32)).shape == (0, 9, 16)
    assert not gelu_backward(torch.empty(0, 64), torch.empty(0, 64))[2].any()
