"""What only a GPU can show of ``mlp``: accuracy with its arithmetic, determinism, widths by kernel and by cuBLAS.

Needs torch, triton, numpy and pytest, and nothing of OpenMMLab.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mila_mm.ops import mlp, mlp_reference

pytestmark = pytest.mark.gpu
FP16, BF16 = torch.float16, torch.bfloat16
# Relative root mean square error of y and of gradients; the hidden map is of 16 bits in the backward.
LIMITS = {FP16: (1e-3, 2e-3), BF16: (6e-3, 1.2e-2)}


@pytest.mark.parametrize('dtype', [FP16, BF16], ids=['fp16', 'bf16'])
@pytest.mark.parametrize('channels', [64, 96, 128, 256])
@pytest.mark.parametrize('tokens', [1, 63, 4000, 64000])
def test_equals_fp64_twice_the_same(dtype: torch.dtype, channels: int, tokens: int) -> None:
    random = torch.Generator('cuda').manual_seed(0)
    shapes = ((2, tokens, channels), (4 * channels, channels), (4 * channels,), (channels, 4 * channels), (channels,))
    tensors = [torch.randn(shape, generator=random, device='cuda') for shape in (*shapes, shapes[0])]
    tensors[1] /= channels**0.5
    tensors[3] /= (4 * channels) ** 0.5
    leaves = [t.to(dtype).requires_grad_() for t in tensors]
    scale = torch.tensor([0.0, 1.25], device='cuda')
    grad = torch.randn(shapes[0], generator=random, device='cuda').to(dtype)

    def run() -> tuple[Tensor, ...]:
        y = mlp(*leaves, scale)
        return y, *torch.autograd.grad(y, leaves, grad)

    doubles = [t.detach().double().requires_grad_() for t in leaves]
    exact = mlp_reference(*doubles, scale)
    want = exact, *torch.autograd.grad(exact, doubles, grad.double())
    for index, (got, twice, right) in enumerate(zip(run(), run(), want, strict=True)):
        assert torch.equal(got, twice)
        error = ((got.double() - right).norm() / right.norm()).item()
        assert error <= LIMITS[dtype][index > 0], (index, error)
