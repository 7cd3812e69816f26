"""What only a GPU can show of ``relu_dwc_relu``: accuracy with its arithmetic, determinism, large maps.

Needs torch, triton, numpy and pytest, and nothing of OpenMMLab.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops import relu_dwc_relu

pytestmark = pytest.mark.gpu
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Relative root mean square error of y and of gradients.
LIMITS = {FP32: (1e-6, 1e-6), FP16: (5e-4, 1e-3), BF16: (3e-3, 6e-3)}


def exact(leaves: list[Tensor], grad: Tensor, size: tuple[int, int], open_where: Tensor) -> tuple[Tensor, ...]:
    """fp64; which outputs are above zero is told, since a rounding may close one."""
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    image = F.relu(doubles[0]).transpose(1, 2).unflatten(2, size)
    p = F.conv2d(image, *doubles[1:], stride=2, padding=1, groups=image.shape[1]).flatten(2).transpose(1, 2)
    return F.relu(p), *torch.autograd.grad(p, doubles, grad.double() * open_where)


@pytest.mark.parametrize('dtype', [FP32, FP16, BF16], ids=['fp32', 'fp16', 'bf16'])
@pytest.mark.parametrize('channels', [64, 96, 512, 2048])
@pytest.mark.parametrize('size', [(1, 1), (1, 17), (16, 1), (31, 33), (50, 84)], ids=str)
def test_equals_fp64_twice_the_same(dtype: torch.dtype, channels: int, size: tuple[int, int]) -> None:
    random = torch.Generator('cuda').manual_seed(0)
    shapes = ((2, size[0] * size[1], channels), (channels, 1, 3, 3), (channels,))
    x, weight, bias = (torch.randn(shape, generator=random, device='cuda') for shape in shapes)
    leaves = [t.requires_grad_() for t in (x.to(dtype), weight, bias)]

    def run() -> tuple[Tensor, ...]:
        y = relu_dwc_relu(*leaves, size, backend='triton')
        return y, *torch.autograd.grad(y, leaves, grad)

    out = 2, -(-size[0] // 2) * -(-size[1] // 2), channels
    grad = torch.randn(out, generator=random, device='cuda').to(dtype)
    results, again = run(), run()
    want = exact(leaves, grad, size, results[0] > 0)
    for index, (got, twice, right) in enumerate(zip(results, again, want, strict=True)):
        assert torch.equal(got, twice)
        error = ((got.double() - right).norm() / right.norm().clamp(min=1e-30)).item()
        assert error <= LIMITS[dtype][index > 0], (index, error)
