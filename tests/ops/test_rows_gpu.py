"""What only a GPU can show of ``layer_norm`` and ``column_sum``: accuracy with its arithmetic, determinism, layouts.

Needs torch, triton, numpy and pytest, and nothing of OpenMMLab.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mila_mm.ops import column_sum, layer_norm, layer_norm_reference, why_not_triton_stencil

pytestmark = pytest.mark.gpu
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize('dtype', [FP32, FP16, BF16], ids=['fp32', 'fp16', 'bf16'])
ROWS = pytest.mark.parametrize('rows', [1, 63, 500, 4000, 128000])
# Relative root mean square error of y and of gradients.
LIMITS = {FP32: (1e-6, 1e-6), FP16: (5e-4, 1e-3), BF16: (3e-3, 6e-3)}


@pytest.fixture(autouse=True)
def triton_runs() -> None:
    reason = why_not_triton_stencil(torch.zeros(1, 4, 64, device='cuda'))
    assert reason is None, reason


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator('cuda').manual_seed(0), device='cuda')


@DTYPES
@ROWS
@pytest.mark.parametrize('channels', [64, 96, 512, 2048])
def test_column_sum(dtype: torch.dtype, rows: int, channels: int) -> None:
    x = (draw(rows, channels) + 0.1).to(dtype)
    got, again = column_sum(x, FP32), column_sum(torch.cat((x, x), -1).chunk(2, -1)[1], FP32)
    assert torch.equal(got, again)
    error = (got.double() - x.double().sum(0)).abs().max()
    assert error <= 2e-6 * x.double().abs().sum(0).max()


@pytest.mark.parametrize(('dtype', 'y_dtype'), [(FP32, FP32), (FP32, BF16), (FP16, FP16), (BF16, BF16)], ids=str)
@ROWS
@pytest.mark.parametrize('channels', [64, 96, 512, 1024])
def test_layer_norm(dtype: torch.dtype, y_dtype: torch.dtype, rows: int, channels: int) -> None:
    leaves = [(draw(2, rows, channels) + 0.5).to(dtype), draw(channels), draw(channels) + 1]
    leaves = [t.requires_grad_() for t in leaves]
    grad = draw(2, rows, channels).flip(0).to(y_dtype)

    def run() -> tuple[Tensor, ...]:
        with torch.autocast('cuda', y_dtype, enabled=y_dtype != FP32):
            y = layer_norm(*leaves, backend='triton')
        assert y.dtype == y_dtype
        return y, *torch.autograd.grad(y, leaves, grad)

    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact = layer_norm_reference(*doubles)
    want = exact, *torch.autograd.grad(exact, doubles, grad.double())
    results, again = run(), run()
    for index, (got, twice, right) in enumerate(zip(results, again, want, strict=True)):
        assert torch.equal(got, twice)
        error = ((got.double() - right).norm() / right.norm()).item()
        assert error <= LIMITS[y_dtype][index > 0], (index, error)
