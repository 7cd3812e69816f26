"""The kernels of ``relu_dwc_relu`` against fp64 autograd of plain operators, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip('triton')

pytestmark = [pytest.mark.usefixtures('poisoned_memory'), pytest.mark.interpreted]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Root mean square error of y and of gradients, relative; the interpreter truncates to bf16.
LIMITS = {FP32: (1e-6, 1e-6), FP16: (5e-4, 1e-3), BF16: (6e-3, 1.2e-2)}


def draw(batch: int, height: int, width: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias and the gradient of y."""
    random = torch.Generator().manual_seed(0)
    out = -(-height // 2) * -(-width // 2)
    shapes = ((batch, height * width, channels), (channels, 1, 3, 3), (channels,), (batch, out, channels))
    x, weight, bias, grad = (torch.randn(shape, generator=random) for shape in shapes)
    return [x.to(dtype), weight, bias, grad.to(dtype)]


def run(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """y and the gradients of x, weight and bias."""
    from mila_mm.ops.stencil import launch

    y = launch.relu_dwc_relu_forward(x, weight, bias, *size)
    results = y, *launch.relu_dwc_relu_backward(grad_y, x, weight, bias, y, *size)
    for got, source in zip(results, (grad_y, x, weight, bias), strict=True):
        assert got.dtype == source.dtype and got.shape == source.shape and got.is_contiguous()
    return results


def expected(
    x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor, size: tuple[int, int], open_where: Tensor
) -> tuple[Tensor, ...]:
    """The same in fp64; which outputs are above zero is told, since a rounding may close one."""
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    image = F.relu(leaves[0]).transpose(1, 2).unflatten(2, size)
    p = F.conv2d(image, *leaves[1:], stride=2, padding=1, groups=x.shape[-1]).flatten(2).transpose(1, 2)
    return F.relu(p), *torch.autograd.grad(p, leaves, grad_y.double() * open_where)


def check(inputs: list[Tensor], size: tuple[int, int]) -> None:
    results = run(*inputs, size)
    want = expected(*inputs, size, results[0] > 0)
    for index, (got, exact) in enumerate(zip(results, want, strict=True)):
        error = ((got.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()
        assert error <= LIMITS[inputs[0].dtype][index > 0], (index, error)


SIZES = [(8, 10), (7, 9), (1, 1), (1, 13), (13, 1), (2, 2), (5, 40)]


@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('dtype', [FP32, FP16, BF16], ids=['fp32', 'fp16', 'bf16'])
def test_equals_fp64(size: tuple[int, int], dtype: torch.dtype) -> None:
    check(draw(2, *size, 32, dtype), size)


@pytest.mark.parametrize('channels', [20, 96])
def test_widths(channels: int) -> None:
    check(draw(1, 6, 5, channels, FP32), (6, 5))


def test_several_runs_and_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    from mila_mm.ops.triton import configs

    inputs = draw(2, 13, 19, 32, FP32)
    want = run(*inputs, (13, 19))
    monkeypatch.setattr(configs, 'rows_per_run', lambda height, programs: 2)
    monkeypatch.setattr(configs, 'STRIP_DOWN', configs.Strip(1, 4))
    monkeypatch.setattr(configs, 'STRIP_DOWN_BACKWARD', configs.Strip(2, 4))
    results = run(*inputs, (13, 19))
    for got, whole in zip(results[:2], want[:2], strict=True):
        assert torch.equal(got, whole)
    check(inputs, (13, 19))
    assert all(torch.equal(a, b) for a, b in zip(results, run(*inputs, (13, 19)), strict=True))


def as_first_half(x: Tensor) -> Tensor:
    """``x`` as the first half of a joint projection."""
    return torch.cat((x, torch.full_like(x, float('nan'))), dim=-1).chunk(2, dim=-1)[0]


def as_slice(x: Tensor) -> Tensor:
    """``x`` inside a buffer with more channels on both sides, at an odd offset: strided and misaligned."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 7), float('nan'), dtype=x.dtype)
    wide[..., 3:-4] = x
    return wide[..., 3:-4]


@pytest.mark.parametrize('index', [0, 3], ids=['x', 'grad_y'])
@pytest.mark.parametrize('layout', [as_first_half, as_slice])
def test_layouts_give_the_same_bits(layout: Callable[[Tensor], Tensor], index: int) -> None:
    inputs = draw(2, 5, 7, 32, FP16)
    want = run(*inputs, (5, 7))
    inputs[index] = layout(inputs[index])
    assert all(torch.equal(a, b) for a, b in zip(run(*inputs, (5, 7)), want, strict=True))


def test_nan_is_not_hidden_and_stays_near() -> None:
    inputs = draw(1, 8, 8, 32, FP32)
    inputs[0][0, 3 * 8 + 3, 5] = float('nan')
    y, grad_x, *_ = run(*inputs, (8, 8))
    assert y.isnan().nonzero().tolist() == [[0, token, 5] for token in (5, 6, 9, 10)]
    assert grad_x[0, :, :5].isfinite().all() and grad_x[0, :, 6:].isfinite().all()


def test_empty_batch() -> None:
    results = run(*draw(0, 4, 6, 32, FP32), (4, 6))
    assert results[0].shape == (0, 6, 32) and not results[2].any() and not results[3].any()
