"""The kernels that walk tokens as rows against fp64, in Triton's interpreter."""

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


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def as_slice(x: Tensor) -> Tensor:
    """``x`` inside a buffer with more channels on both sides, at an odd offset: strided and misaligned."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 7), float('nan'), dtype=x.dtype)
    wide[..., 3:-4] = x
    return wide[..., 3:-4]


def as_second_half(x: Tensor) -> Tensor:
    """``x`` as the second half of a joint projection, which kernels read in place."""
    return torch.cat((torch.full_like(x, float('nan')), x), dim=-1).chunk(2, dim=-1)[1]


def as_channels_first(x: Tensor) -> Tensor:
    """``x`` with tokens adjacent in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def as_batch_inner(x: Tensor) -> Tensor:
    """``x`` with the batch between tokens and channels in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


LAYOUTS = pytest.mark.parametrize('layout', [as_slice, as_second_half, as_channels_first, as_batch_inner])


def column_sum(x: Tensor, dtype: torch.dtype = FP32) -> Tensor:
    from mila_mm.ops.rows import launch

    return launch.column_sum(x, dtype)


@DTYPES
@pytest.mark.parametrize('shape', [(2, 77, 64), (1, 1, 96), (3, 65, 200), (130, 20), (1, 4, 5, 33)], ids=str)
def test_column_sum_equals_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (normal(*shape) + 0.1).to(dtype)
    want = x.double().reshape(-1, shape[-1]).sum(0)
    assert (column_sum(x).double() - want).abs().max() <= 2e-6 * x.double().abs().sum(tuple(range(x.dim() - 1))).max()
    rounded = column_sum(x, dtype)
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded, column_sum(x).to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@LAYOUTS
def test_column_sum_layouts_give_the_same_bits(layout: Callable[[Tensor], Tensor]) -> None:
    x = normal(2, 70, 64).half()
    assert torch.equal(column_sum(layout(x)), column_sum(x))


def test_column_sum_in_several_splits_and_steps_of_the_second_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    from mila_mm.ops.triton import configs

    monkeypatch.setattr(configs, 'COLUMN_SUM', configs.Launch(2, 32, 4))
    monkeypatch.setattr(configs, 'COLUMN_REDUCE', configs.Launch(4, 16, 4))
    x = normal(1, 51, 48)
    torch.testing.assert_close(column_sum(x), x.double().sum((0, 1)).float(), rtol=1e-6, atol=1e-5)
    assert torch.equal(column_sum(x), column_sum(x))


def test_column_sum_of_expanded_and_empty() -> None:
    assert torch.equal(column_sum(torch.tensor(0.5).expand(2, 9, 32)), torch.full((32,), 9.0))
    assert torch.equal(column_sum(torch.empty(0, 9, 32)), torch.zeros(32))


def test_column_sum_nan_stays_in_its_channel() -> None:
    x = normal(2, 9, 32)
    x[1, 3, 7] = float('nan')
    assert column_sum(x).isnan().nonzero().flatten().tolist() == [7]


# Root mean square and maximum relative error of y and of gradients; the interpreter truncates to bf16.
LIMITS = {
    FP32: ((1e-6, 5e-6), (1e-6, 5e-6)),
    FP16: ((5e-4, 2e-3), (1e-3, 3e-3)),
    BF16: ((6e-3, 2e-2), (1.2e-2, 3e-2)),
}
EPS = 1e-5


def norm_inputs(shape: tuple[int, int, int], dtype: torch.dtype, y_dtype: torch.dtype) -> list[Tensor]:
    """x, weight, bias and the gradient of y."""
    draws = normal(4, *shape)
    x, grad = (draws[0] + 0.5).to(dtype), draws[1].to(y_dtype)
    return [x, draws[2, 0, 0].clone(), draws[3, 0, 0].clone(), grad]


def run_norm(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of x, weight and bias."""
    from mila_mm.ops.rows import launch

    y, mean, rstd = launch.layer_norm_forward(x, weight, bias, EPS, grad_y.dtype)
    assert mean.dtype == rstd.dtype == FP32
    results = y, *launch.layer_norm_backward(grad_y, x, mean, rstd, weight, bias, None, x.dtype)
    for got, source in zip(results, (grad_y, x, weight, bias), strict=True):
        assert got.dtype == source.dtype and got.shape == source.shape and got.is_contiguous()
    return results


@pytest.mark.parametrize('shape', [(2, 77, 32), (1, 1, 64), (3, 5, 96), (1, 3, 384), (1, 9, 20)], ids=str)
@pytest.mark.parametrize(
    ('dtype', 'y_dtype'),
    [(FP32, FP32), (FP32, FP16), (FP32, BF16), (FP16, FP16), (BF16, BF16)],
    ids=['fp32', 'fp32-fp16', 'fp32-bf16', 'fp16', 'bf16'],
)
def test_norm_equals_fp64(shape: tuple[int, int, int], dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    inputs = norm_inputs(shape, dtype, y_dtype)
    x, weight, bias = (t.double().requires_grad_() for t in inputs[:3])
    y = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    want = y, *torch.autograd.grad(y, (x, weight, bias), inputs[3].double())
    for index, (got, exact) in enumerate(zip(run_norm(*inputs), want, strict=True)):
        difference = got.double() - exact
        rms = (difference.square().mean() / exact.square().mean()).sqrt().item()
        largest = (difference.abs().max() / exact.abs().max()).item()
        limits = LIMITS[max(y_dtype, dtype, key=lambda d: torch.finfo(d).eps)][index > 0]
        assert rms <= limits[0] and largest <= limits[1], (index, rms, largest, limits)


@LAYOUTS
@pytest.mark.parametrize('index', [0, 3], ids=['x', 'grad_y'])
def test_norm_layouts_give_the_same_bits(index: int, layout: Callable[[Tensor], Tensor]) -> None:
    inputs = norm_inputs((2, 70, 32), FP16, FP16)
    want = run_norm(*inputs)
    inputs[index] = layout(inputs[index])
    assert all(torch.equal(a, b) for a, b in zip(run_norm(*inputs), want, strict=True))


def test_norm_in_several_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    from mila_mm.ops.triton import configs

    inputs = norm_inputs((2, 70, 512), FP32, FP32)
    want = run_norm(*inputs)
    monkeypatch.setattr(configs, 'norm_tokens_per_split', lambda channels: 16)
    for a, b in zip(run_norm(*inputs), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_norm_of_nothing() -> None:
    y, *grads = run_norm(*(t[:0] if t.dim() == 3 else t for t in norm_inputs((2, 5, 32), FP32, FP32)))
    assert y.shape == (0, 5, 32) and not any(grad.any() for grad in grads)
