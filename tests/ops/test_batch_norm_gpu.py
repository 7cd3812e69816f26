"""What only a GPU can show of ``batch_norm``: accuracy with its arithmetic, determinism, the norms of a backbone.

Needs torch, triton, numpy and pytest, for a backbone timm, and nothing of OpenMMLab.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mila_mm.nn import batch_norm as batch_norm_of_a_module
from mila_mm.ops import batch_norm, why_not_triton_batch_norm

pytestmark = pytest.mark.gpu
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Relative root mean square error of y and of gradients.
LIMITS = {FP32: (1e-6, 2e-6), FP16: (5e-4, 1e-3), BF16: (3e-3, 6e-3)}


@pytest.fixture(autouse=True)
def triton_runs() -> None:
    reason = why_not_triton_batch_norm(torch.zeros(1, 4, 64, device='cuda'))
    assert reason is None, reason


@pytest.mark.parametrize('dtype', [FP32, FP16, BF16], ids=['fp32', 'fp16', 'bf16'])
@pytest.mark.parametrize('relu', [True, False], ids=['relu', ''])
@pytest.mark.parametrize('channels', [20, 32, 96, 512])
@pytest.mark.parametrize('tokens', [1, 9, 500, 40000])
def test_equals_fp64_twice_the_same(tokens: int, channels: int, relu: bool, dtype: torch.dtype) -> None:
    random = torch.Generator('cuda').manual_seed(0)
    shapes = (2, tokens, channels), (channels,), (channels,), (2, tokens, channels)
    x, weight, bias, grad = (torch.randn(shape, generator=random, device='cuda') for shape in shapes)
    leaves, grad = [t.requires_grad_() for t in ((x + 3).to(dtype), weight, bias)], grad.to(dtype)

    def run() -> tuple[Tensor, ...]:
        running = torch.zeros(channels, device='cuda'), torch.ones(channels, device='cuda'), torch.tensor(0).cuda()
        y = batch_norm(*leaves, relu=relu, running=running, momentum=0.3, backend='triton')
        assert running[2] == 1
        return y, *torch.autograd.grad(y, leaves, grad), *running[:2]

    doubles = [t.detach().double().requires_grad_() for t in leaves]
    mean, variance = torch.zeros_like(doubles[1]), torch.ones_like(doubles[1])
    exact = F.batch_norm(doubles[0].flatten(0, 1), mean, variance, *doubles[1:], True, 0.3).view_as(doubles[0])
    results, again = run(), run()
    # A rounding may close what fp64 leaves open.
    gradients = torch.autograd.grad(exact, doubles, grad.double() * (results[0] > 0) if relu else grad.double())
    want = F.relu(exact) if relu else exact, *gradients, mean, variance
    scale = doubles[1] * (doubles[0].flatten(0, 1).var(0, correction=0) + 1e-5).rsqrt()
    for index, (got, twice, right) in enumerate(zip(results, again, want, strict=True)):
        assert torch.equal(got, twice)
        # Of two values a channel the gradient of x all but vanishes: by what it is a difference of.
        size = max(right.norm(), (scale * grad).norm()) if index == 1 else right.norm()
        error = ((got.double() - right).norm() / size.clamp(min=1e-30)).item()
        assert error <= (LIMITS[dtype][index > 0] if index < 4 else 1e-6), (index, error)


def test_the_norms_of_a_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight, by the kernels, with the running statistics of PyTorch's."""
    pytest.importorskip('timm', reason='timm is not installed, of which the backbone is made')
    from mila_mm.nn.trunk import MILATrunk

    torch.manual_seed(0)
    model = MILATrunk('nano').cuda().train()
    plain, x = copy.deepcopy(model), torch.randn(2, 3, 160, 224, device='cuda')
    taken: list[bool] = []
    fits = batch_norm_of_a_module.fits

    def noted(norm: nn.Module | None, image: Tensor) -> bool:
        taken.append(fits(norm, image))
        return taken[-1]

    def train(model: nn.Module) -> None:
        with torch.autocast('cuda', BF16):
            sum(y.float().square().mean() for y in model(x)).backward()

    monkeypatch.setattr(batch_norm_of_a_module, 'fits', noted)
    train(model)
    assert taken == [True] * 8
    monkeypatch.setattr(batch_norm_of_a_module, 'fits', lambda *_: False)
    train(plain)
    for (name, got), want in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert (got.double() - want.double()).norm() <= 2e-2 * want.double().norm().clamp(min=1e-2), name
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        if 'norm' in name:
            assert got.grad is not None and want.grad is not None
            assert (got.grad - want.grad).norm() <= 0.1 * want.grad.norm(), name
