"""``gated_linear_attention`` on a GPU against the same on the CPU.

Needs torch, triton, numpy and pytest, and nothing of OpenMMLab.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mila_mm.ops import gated_linear_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize('tokens', [1, 2, 63, 500])
def test_equals_the_cpu(tokens: int) -> None:
    random = torch.Generator().manual_seed(0)
    channels, heads, states = 64, 2, 32
    shapes = [(2, tokens, heads * states)] * 2 + [(2, tokens, channels)] * 2 + [(states, channels), (channels,)]
    leaves = [torch.rand(shape, generator=random, dtype=torch.float64) for shape in shapes]
    leaves[2] -= 0.5  # v; delta and a as a model would give them
    leaves[3] += 0.1
    leaves[4] = -0.1 - leaves[4]
    there = [t.cuda().requires_grad_() for t in leaves]
    leaves = [t.requires_grad_() for t in leaves]

    def run(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, a: Tensor, d: Tensor) -> Tensor:
        return gated_linear_attention(q, k, v, num_heads=2, input_gate=delta, forget_gate=(delta, a), shortcut=d)

    here, on_gpu = run(*leaves), run(*there)
    torch.testing.assert_close(on_gpu.cpu(), here)
    weight = torch.randn(here.shape, generator=random, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((on_gpu * weight.cuda()).sum(), there),
        torch.autograd.grad((here * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine.cpu(), theirs)
