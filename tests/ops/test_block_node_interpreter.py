"""Blocks as nodes whose kernels run in Triton's interpreter: the modules' numbers, and what happens when one fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mila_mm.models import MILATrunk
from mila_mm.nn import down_node
from mila_mm.ops.block import op
from mila_mm.ops.triton import capability
from mila_mm.ops.triton.configs import KernelFailed

pytest.importorskip('triton')

pytestmark = pytest.mark.interpreted
SMALL = {'arch': {'embed_dim': 16, 'depths': (1, 1), 'num_heads': (1, 2)}, 'out_indices': (0, 1)}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Tensor, 'is_cuda', True)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: None)  # the index of the device of a CPU tensor
    monkeypatch.setattr(capability, '_given_up', {})
    yield


def pair() -> tuple[nn.Module, nn.Module]:
    """A model whose blocks are nodes, and its modules in fp64."""
    torch.manual_seed(0)
    node = MILATrunk(**SMALL, fused=True).eval()
    for name, p in node.named_parameters():
        if p.dim() == 1:
            nn.init.normal_(p, 1.0 if 'norm' in name and name.endswith('weight') else 0.0, 0.3)
    plain = MILATrunk(**SMALL, fused=False, attn_backend='reference').double().eval()
    plain.load_state_dict(node.state_dict())
    return node, plain


def step(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    image = torch.randn(1, 3, 16, 20, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    maps = model(image)
    fixed = torch.Generator().manual_seed(2)
    sum((m.double() * torch.randn(m.shape, generator=fixed)).sum() for m in maps).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {**{str(i): m for i, m in enumerate(maps)}, 'image': image.grad, **grads}


def assert_near(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    scale = max(value.norm().item() / value.numel() ** 0.5 for value in want.values())
    for name, value in want.items():
        size = value.norm().item() + 1e-2 * scale * value.numel() ** 0.5
        assert (got[name].double() - value).norm().item() <= 2e-4 * size, name


def test_is_what_the_modules_are(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ('forward', 'backward'):
        original = getattr(op, name)
        monkeypatch.setattr(op, name, lambda *a, run=original, name=name: calls.append(name) or run(*a))
    node, plain = pair()
    assert_near(step(node, torch.float32), step(plain, torch.float64))
    assert calls == ['forward'] * 2 + ['backward'] * 2
    with torch.no_grad():
        for a, b in zip(node(torch.ones(2, 3, 9, 8)), plain(torch.ones(2, 3, 9, 8).double()), strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize('direction', ['forward', 'backward'])
def test_a_kernel_that_does_not_work_hands_over(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mila_mm.ops.block import launch

    def fail(*args: Any) -> None:
        raise KernelFailed('block_reduce_kernel cannot run here')

    monkeypatch.setattr(launch, direction, fail)
    monkeypatch.delenv('MILA_MM_KERNEL_ERRORS', raising=False)
    node, plain = pair()
    with pytest.warns(UserWarning, match='block_reduce_kernel cannot run here'):
        got = step(node, torch.float32)
    assert capability.has_given_up(torch.device('cpu'))
    assert_near(got, step(plain, torch.float64))


@pytest.mark.parametrize(
    'low', [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=['fp16', 'bf16']
)
def test_a_training_step_in_16_bits(low: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the downsampling as a node as well, whose weights are cast with those of the blocks."""
    calls = []
    original = down_node.run
    monkeypatch.setattr(down_node, 'run', lambda *a: calls.append(1) or original(*a))
    node, plain = pair()
    node.train()
    plain.train()
    with torch.autocast('cpu', low):
        got = step(node, torch.float32)
    want = step(plain, torch.float64)
    assert calls == [1]
    scale = max(value.norm().item() / value.numel() ** 0.5 for value in want.values())
    for name, value in want.items():
        size = value.norm().item() + 3e-2 * scale * value.numel() ** 0.5
        assert (got[name].double() - value).norm().item() <= 0.15 * size, name
        assert name.isdigit() or got[name].dtype == torch.float32, name
