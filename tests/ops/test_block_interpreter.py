"""A block by Triton kernels against fp64 autograd of plain operators, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops.attention.reference import mila_attention_reference

pytest.importorskip('triton')

pytestmark = [pytest.mark.usefixtures('poisoned_memory'), pytest.mark.interpreted]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Root mean square of the error over that of the number, of results and of gradients; several roundings one after the
# other, and the interpreter truncates to bf16.
LIMITS = {FP32: (2e-6, 1e-5), FP16: (2e-3, 6e-3), BF16: (2e-2, 6e-2)}
NAMES = (
    *('cpe1.weight', 'cpe1.bias', 'norm1.weight', 'norm1.bias'),
    *('in_proj.weight', 'act_proj.weight', 'in_proj.bias', 'act_proj.bias', 'dwc.weight', 'dwc.bias'),
    *('attn.qk.weight', 'attn.qk.bias', 'attn.lepe.weight', 'attn.lepe.bias', 'out_proj.weight', 'out_proj.bias'),
    *('cpe2.weight', 'cpe2.bias', 'norm2.weight', 'norm2.bias'),
    *('mlp.fc1.weight', 'mlp.fc1.bias', 'mlp.fc2.weight', 'mlp.fc2.bias'),
)


def shape_of(name: str, c: int, hidden: int) -> tuple[int, ...]:
    if name.endswith('bias'):
        return (hidden if 'fc1' in name else 2 * c if 'qk' in name else c,)
    if 'cpe' in name or 'dwc' in name or 'lepe' in name:
        return c, 1, 3, 3
    return {'qk': (2 * c, c), 'fc1': (hidden, c), 'fc2': (c, hidden), 'norm': (c,)}.get(
        next((key for key in ('qk', 'fc1', 'fc2', 'norm') if key in name), ''), (c, c)
    )


def plain(x: Tensor, p: dict[str, Tensor], size: tuple[int, int], heads: int, scales: Any) -> Tensor:
    """The block from plain operators."""

    def conv(t: Tensor, name: str) -> Tensor:
        image = t.transpose(1, 2).unflatten(2, size)
        y = F.conv2d(image, p[f'{name}.weight'], p[f'{name}.bias'], padding=1, groups=t.shape[-1])
        return y.flatten(2).transpose(1, 2)

    def linear(t: Tensor, name: str) -> Tensor:
        return F.linear(t, p[f'{name}.weight'], p[f'{name}.bias'])

    def norm(t: Tensor, name: str) -> Tensor:
        return F.layer_norm(t, t.shape[-1:], p[f'{name}.weight'], p[f'{name}.bias'], 1e-5)

    one, two = (1.0 if s is None else s.double()[:, None, None] for s in scales)
    x1 = x + conv(x, 'cpe1')
    y = norm(x1, 'norm1')
    u = F.silu(conv(linear(y, 'in_proj'), 'dwc'))
    lepe = p['attn.lepe.weight'], p['attn.lepe.bias']
    a = mila_attention_reference(linear(u, 'attn.qk'), u, *lepe, size, heads, linear(y, 'act_proj'))
    x2 = x1 + one * linear(a, 'out_proj')
    x3 = x2 + conv(x2, 'cpe2')
    return x3 + two * linear(F.gelu(linear(norm(x3, 'norm2'), 'mlp.fc1')), 'mlp.fc2')


class Problem:
    """A block of random numbers: what the kernels make of them, and fp64 autograd."""

    def __init__(
        self,
        batch: int,
        size: tuple[int, int],
        c: int,
        heads: int,
        dtype: torch.dtype,
        residual: torch.dtype | None = None,
        master: torch.dtype = FP32,
        scaled: bool = False,
        hidden: int | None = None,
    ) -> None:
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return std * torch.randn(shape, generator=random)

        hidden = hidden or 4 * c
        self.size, self.heads, self.dtype, self.master = size, heads, dtype, master
        self.x = normal(batch, size[0] * size[1], c).to(residual or dtype)
        self.grad = normal(*self.x.shape).to(self.x.dtype)
        self.params = {}
        for name in NAMES:
            shape = shape_of(name, c, hidden)
            fan = 3.0 if len(shape) == 4 else shape[-1] ** 0.5 if len(shape) == 2 else 2.0
            value = normal(*shape, std=1 / fan) + (name.startswith('norm') and name.endswith('weight'))
            product = 'proj' in name or 'qk' in name or 'fc' in name
            self.params[name] = value.to(dtype if product else master).to(master)
        drawn = [torch.tensor([1.25, 0.0][:batch] + [1.25] * (batch - 2)).to(dtype) for _ in range(2)]
        self.scales = (drawn[0], drawn[1].flip(0)) if scaled else (None, None)

    def run(self, keep: bool = True) -> dict[str, Tensor]:
        """Result and gradients of the kernels."""
        from mila_mm.ops.block import gradients, launch, plan
        from mila_mm.ops.triton.tensors import depthwise_taps

        p, c = self.params, self.x.shape[2]
        shape = plan.Shape(
            self.x.shape[0], *self.size, c, p['mlp.fc1.bias'].numel(), self.heads, 1e-5, 1e-5, 1e-6, 1e4, self.dtype,
            self.x.dtype, self.master, tuple(s is not None for s in self.scales), keep, None, self.x.device,
        )  # fmt: skip
        found = plan.find(shape)
        assert found is not None
        low = {name: p[name].to(self.dtype) for name in NAMES}
        joint = [torch.cat([low[f'{part}.{kind}'] for part in ('in_proj', 'act_proj')]) for kind in ('weight', 'bias')]
        weights = [
            *joint,
            *(low[f'{n}.{k}'] for n in ('attn.qk', 'out_proj', 'mlp.fc1', 'mlp.fc2') for k in ('weight', 'bias')),
        ]
        stencils = [
            p[f'{n}.{k}'] for n in ('cpe1', 'norm1', 'dwc', 'attn.lepe', 'cpe2', 'norm2') for k in ('weight', 'bias')
        ]
        taps = depthwise_taps(p['attn.lepe.weight'], self.x, c // self.heads)
        out, *kept = launch.forward(found, self.x, weights, stencils, taps, self.scales)
        if not keep:
            return {'out': out}
        rest = [*weights[:6:2], *weights[6:9]]
        grad_x, flat = launch.backward(found, self.grad, [self.x, *kept], rest, stencils, taps, self.scales)
        return {'out': out, 'x': grad_x, **dict(zip(NAMES, gradients.in_order(flat, c, shape.hidden), strict=True))}

    def expected(self) -> dict[str, Tensor]:
        """The same by autograd in fp64."""
        p = {name: value.double().requires_grad_() for name, value in self.params.items()}
        x = self.x.double().requires_grad_()
        out = plain(x, p, self.size, self.heads, self.scales)
        grads = torch.autograd.grad(out, [x, *p.values()], self.grad.double())
        return {'out': out.detach(), **dict(zip(('x', *NAMES), grads, strict=True))}

    def check(self) -> None:
        got, want = self.run(), self.expected()
        assert got['out'].dtype == got['x'].dtype == self.x.dtype
        # What is small beside gradients of its kind is rounding of what cancels: a bias before a norm, say.
        scale: dict[int, float] = {}
        for value in want.values():
            scale[value.dim()] = max(scale.get(value.dim(), 0.0), value.norm().item() / value.numel() ** 0.5)
        for name, value in want.items():
            assert got[name].shape == value.shape, name
            assert name in ('out', 'x') or got[name].dtype == self.master, name
            size = max(value.norm().item(), 1e-2 * scale[value.dim()] * value.numel() ** 0.5)
            error = (got[name].double() - value).norm().item() / size
            assert error <= LIMITS[self.dtype][name != 'out'], f'{name}: {error:.1e}'


def identify(value: object) -> str | None:
    return str(value).removeprefix('torch.') if isinstance(value, torch.dtype) else None


@pytest.mark.parametrize('dtype', [FP32, FP16, BF16], ids=identify)
@pytest.mark.parametrize(
    ('batch', 'size', 'c', 'heads'),
    [
        pytest.param(2, (7, 11), 64, 2, marks=pytest.mark.slow),
        (1, (5, 9), 48, 1),
        (1, (2, 3), 64, 2),
        (2, (1, 3), 80, 5),
        (2, (3, 2), 32, 2),
        (1, (1, 1), 32, 1),
    ],
)
def test_equals_fp64(batch: int, size: tuple[int, int], c: int, heads: int, dtype: torch.dtype) -> None:
    Problem(batch, size, c, heads, dtype).check()


@pytest.mark.parametrize(
    'options',
    [
        {'dtype': FP16, 'residual': FP32},
        {'dtype': BF16, 'master': BF16},
        {'dtype': FP32, 'scaled': True},
        {'dtype': FP16, 'scaled': True, 'residual': FP32},
        {'dtype': FP32, 'hidden': 48},
    ],
    ids=lambda options: '-'.join(f'{k}={identify(v) or v}' for k, v in options.items()),
)
def test_other_dtypes_widths_and_stochastic_depth(options: dict[str, Any]) -> None:
    Problem(2, (3, 5), 32, 2, **options).check()


def test_several_splits_of_the_tokens() -> None:
    Problem(1, (13, 20), 16, 1, FP32).check()


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The plans that are made in a test, which no other test sees."""
    from mila_mm.ops.block import plan

    made = []
    build = plan.Plan
    monkeypatch.setattr(plan, 'Plan', lambda *a, **k: made.append(build(*a, **k)) or made[-1])
    plan.find.cache_clear()
    yield made
    plan.find.cache_clear()


@pytest.mark.parametrize('master', [FP32, FP16], ids=identify)
def test_matrices_from_parts_of_the_rows(
    master: torch.dtype, plans: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mila_mm.ops.triton import configs

    monkeypatch.setattr(configs, 'weight_rows_per_split', lambda rows, channels: 10)
    Problem(2, (3, 4), 32, 2, FP16, master=master).check()
    assert [made.matrices.sums is not None for made in plans] == [True]


def test_matrices_from_products_where_those_are_large(plans: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from mila_mm.ops.triton import configs

    monkeypatch.setattr(configs, 'WEIGHT_GRADIENTS_FLOP', 0)
    Problem(2, (3, 4), 32, 2, FP16, scaled=True).check()
    assert [made.matrices.mix is None for made in plans] == [True]


def test_runs_of_rows_cover_them_and_only_long_ones_are_split() -> None:
    from mila_mm.ops.triton import configs

    for channels in (16, 64, 96, 256, 1024):
        for rows in (1, 63, 1000, 2047, 8000, 128000, 10**6 + 1):
            run = configs.weight_rows_per_split(rows, channels)
            splits = -(-rows // run)
            assert run > 0 and (splits == 1 or run >= max(1024, 8 * channels)), (channels, rows)
            assert splits <= configs.MAX_GRID


def test_the_same_bits_twice_and_in_less_memory_without_a_backward() -> None:
    problem = Problem(2, (3, 5), 32, 1, FP16)
    one, other, alone = problem.run(), problem.run(), problem.run(keep=False)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert torch.equal(alone['out'], one['out'])
