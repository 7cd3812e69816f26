"""Every kernel of the attention against an independent fp64 reference, in Triton's interpreter, without a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip('triton')

pytestmark = pytest.mark.usefixtures('poisoned_memory')
interpreted = pytest.mark.interpreted  # see conftest.py
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
EPS, BASE = 1e-6, 10000.0


def reference(
    qk: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    height: int,
    width: int,
    heads: int,
    normaliser_moves: bool = True,
) -> Tensor:
    """The formula of the paper on fp64 inputs, written with complex numbers and no help from the package."""
    batch, tokens, channels = v.shape
    quarter = channels // 4
    q, k = (torch.where(x > 0, x + 1, x.clamp(max=0).exp()) for x in qk.split(channels, dim=-1))
    theta = 1.0 / BASE ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    row = torch.arange(height, dtype=torch.float32).repeat_interleave(width)
    column = torch.arange(width, dtype=torch.float32).repeat(height)
    angle = torch.cat((row[:, None] * theta, column[:, None] * theta), -1)
    turn = torch.complex(angle.cos().double(), angle.sin().double())

    def rope(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(batch, tokens, -1, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    def split(x: Tensor) -> Tensor:
        return x.reshape(batch, tokens, heads, -1).transpose(1, 2)

    z = 1 / (torch.einsum('bhnd,bhd->bhn', split(q), split(k).mean(2)) + EPS)
    z = z if normaliser_moves else z.detach()
    state = torch.einsum('bhni,bhnj->bhij', split(rope(k)), split(v)) / tokens
    out = torch.einsum('bhni,bhij->bhnj', split(rope(q)), state) * z[..., None]
    out = out.transpose(1, 2).reshape(batch, tokens, channels)
    if weight is not None:
        image = v.transpose(1, 2).reshape(batch, channels, height, width)
        out = out + F.conv2d(image, weight, bias, padding=1, groups=channels).flatten(2).transpose(1, 2)
    return out if gate is None else out * F.silu(gate)


def relative_errors(got: Tensor, want: Tensor, scale: Tensor | None = None) -> tuple[float, float]:
    """Root mean square and maximum error, each over that of ``want``, or of ``scale`` where that is larger.

    What is smaller than the smallest normal number of the dtype has no relative precision to ask for.
    """
    assert got.shape == want.shape
    sizes = [want.double()] + ([] if scale is None else [scale.double()])
    difference = got.double() - want.double()
    tiny = torch.finfo(got.dtype).tiny
    rms = max(tiny, *(x.square().mean().sqrt().item() for x in sizes))
    largest = max(tiny, *(x.abs().max().item() for x in sizes))
    return difference.square().mean().sqrt().item() / rms, difference.abs().max().item() / largest


# Root mean square and maximum relative error of the output and of the gradients. The interpreter truncates where a GPU
# rounds to bf16, which doubles those errors.
LIMITS = {
    torch.float32: ((1e-6, 5e-6), (1e-6, 5e-6)),
    torch.float16: ((5e-4, 2e-3), (1e-3, 3e-3)),
    torch.bfloat16: ((6e-3, 2e-2), (1.2e-2, 3e-2)),
}
NAMES = ('y', 'grad_qk', 'grad_v', 'grad_lepe_weight', 'grad_lepe_bias', 'grad_gate')


class Problem:
    """Inputs of one call, what the kernels make of them, and what fp64 autograd makes of the same numbers."""

    def __init__(
        self,
        batch: int,
        height: int,
        width: int,
        channels: int,
        heads: int,
        dtype: torch.dtype,
        lepe: bool = True,
        gate: bool = True,
        weight_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        tokens = height * width
        self.size = height, width, heads
        self.qk, self.v = normal(batch, tokens, 2 * channels).to(dtype), normal(batch, tokens, channels).to(dtype)
        self.weight = normal(channels, 1, 3, 3).to(weight_dtype) if lepe else None
        self.bias = normal(channels).to(weight_dtype) if lepe else None
        self.gate = normal(batch, tokens, channels).to(dtype) if gate else None
        self.grad_y = normal(batch, tokens, channels).to(dtype)

    def inputs(self) -> tuple[Tensor | None, ...]:
        """The differentiable inputs in the order of the op."""
        return self.qk, self.v, self.weight, self.bias, self.gate

    def run(self, dots: str | None = None) -> dict[str, Tensor]:
        """Outputs and gradients of the kernels."""
        from mila_mm.ops.attention.launch import attention_backward, attention_forward

        height, width, heads = self.size
        options = (height, width, heads, EPS, BASE)
        y, state, mean = attention_forward(*self.inputs(), *options, dots=dots)
        grads = attention_backward(self.grad_y, *self.inputs(), state, mean, *options, dots=dots)
        given = (x for x in zip(NAMES, (y, *grads), (y, *self.inputs()), strict=True))
        result = {}
        for name, got, source in given:
            assert (got is None) == (source is None), name
            if got is not None:
                assert got.dtype == source.dtype and got.is_contiguous(), name
                result[name] = got
        return result

    def expected(self) -> tuple[dict[str, Tensor], Tensor]:
        """The same in fp64, and the gradient of qk without the normaliser's part, which may cancel the rest."""
        inputs = [None if x is None else x.detach().double().requires_grad_() for x in self.inputs()]
        wanted = [x for x in inputs if x is not None]
        y = reference(*inputs, *self.size)
        grads = torch.autograd.grad(y, wanted, self.grad_y.double())
        names = [name for name, x in zip(NAMES[1:], inputs, strict=True) if x is not None]
        fixed = reference(*inputs, *self.size, normaliser_moves=False)
        numerator = torch.autograd.grad(fixed, inputs[0], self.grad_y.double())[0]
        return {'y': y.detach(), **dict(zip(names, grads, strict=True))}, numerator

    def check(self, dots: str | None = None, factor: float = 1.0) -> None:
        """Hold every result of the kernels to the limits of the dtype."""
        want, numerator = self.expected()
        got = self.run(dots)
        assert got.keys() == want.keys()
        bad = []
        for name, x in got.items():
            exact = self.weight.dtype if name.startswith('grad_lepe') else x.dtype
            limits = LIMITS[self.v.dtype if exact == torch.float32 else exact][name != 'y']
            errors = relative_errors(x, want[name], numerator if name == 'grad_qk' else None)
            if not all(error <= factor * limit for error, limit in zip(errors, limits, strict=True)):
                bad.append(f'{name}: rms {errors[0]:.2e}, max {errors[1]:.2e}, limits {limits}')
        assert not bad, '\n'.join(bad)


SHAPES = {
    '2x7x11x64': (2, 7, 11, 64, 2),
    '1x5x9x96-straddling': (1, 5, 9, 96, 3),
    '1x1x13x64-one-row': (1, 1, 13, 64, 2),
    '1x13x1x64-one-column': (1, 13, 1, 64, 2),
    '1x1x1x64-one-token': (1, 1, 1, 64, 2),
    '1x4x16x32-one-head': (1, 4, 16, 32, 1),
}
ARITHMETIC = {
    'fp32': (torch.float32, None),
    'fp16': (torch.float16, None),
    'fp16-operands': (torch.float16, 'low'),
    'bf16': (torch.bfloat16, None),
}


@interpreted
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize('arithmetic', ARITHMETIC.values(), ids=ARITHMETIC)
def test_equals_fp64(arithmetic: tuple[torch.dtype, str | None], shape: tuple[int, ...]) -> None:
    dtype, dots = arithmetic
    Problem(*shape, dtype).check(dots)


@interpreted
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['fp32', 'fp16'])
@pytest.mark.parametrize(
    ('channels', 'heads'),
    [(32, 2), (48, 2), (72, 3), (48, 1), (144, 3), (64, 1), (128, 2), (16, 1)],
    ids=['d16', 'd24', 'd24-straddling', 'd48', 'd48-straddling', 'd64', 'd64-two-heads', 'd16-one-head'],
)
def test_head_widths(channels: int, heads: int, dtype: torch.dtype) -> None:
    Problem(1, 3, 5, channels, heads, dtype).check()


@interpreted
@pytest.mark.parametrize('gate', [True, False], ids=['gate', 'no-gate'])
@pytest.mark.parametrize('lepe', [True, False], ids=['lepe', 'no-lepe'])
def test_optional_parts(lepe: bool, gate: bool) -> None:
    Problem(2, 3, 6, 64, 2, torch.float32, lepe, gate).check()


@interpreted
@pytest.mark.parametrize('weight_dtype', [torch.float16, torch.bfloat16], ids=['fp16', 'bf16'])
def test_weights_of_16_bits_get_gradients_of_16_bits(weight_dtype: torch.dtype) -> None:
    Problem(1, 4, 5, 32, 1, torch.float32, weight_dtype=weight_dtype).check()


@interpreted
@pytest.mark.parametrize(('height', 'width'), [(9, 21), (3, 50)])
def test_several_splits(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mila_mm.ops.triton import configs

    monkeypatch.setattr(configs, 'tokens_per_split', lambda tokens: 64)
    monkeypatch.setattr(configs, 'rows_per_run', lambda height, programs: 2)
    monkeypatch.setattr(configs, 'STRIP', configs.Strip(2, 4))
    monkeypatch.setattr(configs, 'REDUCE_ROWS', 2)
    Problem(2, height, width, 32, 1, torch.float32).check()


@interpreted
@pytest.mark.parametrize('shape', [(2, 7, 11, 64, 2), (1, 5, 9, 96, 3), (1, 9, 13, 64, 1)], ids=str)
def test_tiles_of_hopper(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from mila_mm.ops.triton import configs

    monkeypatch.setattr(configs, 'is_hopper', lambda device: True)
    Problem(*shape, torch.float16).check()


@interpreted
@pytest.mark.parametrize('dots', ['tf32x3', 'tf32', 'ieee'])
def test_fp32_products(dots: str) -> None:
    # The interpreter takes all three alike; each has tiles of its own in the table.
    Problem(1, 5, 6, 32, 1, torch.float32).check(dots)


def as_slice(x: Tensor) -> Tensor:
    """``x`` inside a buffer with more channels on both sides, at an odd offset: strided and misaligned."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 7), float('nan'), dtype=x.dtype)
    wide[..., 3:-4] = x
    return wide[..., 3:-4]


def as_half(x: Tensor, half: int) -> Tensor:
    """``x`` as one half of a joint projection, which kernels read in place: its tokens are 2C apart."""
    halves = [torch.full_like(x, float('nan'))] * 2
    halves[half] = x
    return torch.cat(halves, dim=-1).chunk(2, dim=-1)[half]


def as_channels_last(x: Tensor) -> Tensor:
    """``x`` with tokens adjacent in memory: the channels are strided."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def as_batch_inner(x: Tensor) -> Tensor:
    """``x`` with the batch between tokens and channels in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def as_every_second(x: Tensor) -> Tensor:
    """A vector with something else between its elements."""
    return torch.stack((x, torch.full_like(x, float('nan'))), dim=-1).flatten()[::2]


@interpreted
@pytest.mark.parametrize('layout', [as_slice, as_channels_last, as_batch_inner])
def test_layouts_give_the_same_bits(layout: Callable[[Tensor], Tensor]) -> None:
    problem = Problem(2, 3, 7, 32, 1, torch.float32)
    want = problem.run()
    for name in ('qk', 'v', 'gate', 'grad_y'):
        setattr(problem, name, layout(getattr(problem, name)))
    problem.bias = as_every_second(problem.bias)
    for name, got in problem.run().items():
        assert torch.equal(got, want[name]), name


@interpreted
@pytest.mark.parametrize('half', [0, 1])
@pytest.mark.parametrize('name', ['qk', 'v', 'gate', 'grad_y'])
def test_each_input_is_read_by_its_own_strides(name: str, half: int) -> None:
    problem = Problem(2, 3, 7, 32, 1, torch.float16)
    want = problem.run()
    strided = as_half(getattr(problem, name), half)
    setattr(problem, name, strided)
    assert not strided.is_contiguous() and strided.stride(1) == 2 * strided.shape[2]
    for result, got in problem.run().items():
        assert torch.equal(got, want[result]), result


@interpreted
def test_expanded_gradient_and_bias() -> None:
    problem = Problem(2, 3, 7, 32, 1, torch.float32)
    problem.bias = torch.tensor(0.3).expand(32)
    problem.grad_y = torch.tensor(0.7).expand(2, 21, 32)  # as y.sum() sends it back
    problem.check()


@interpreted
def test_inputs_are_left_alone() -> None:
    problem = Problem(1, 3, 7, 32, 1, torch.float32)
    before = [x.clone() for x in (*problem.inputs(), problem.grad_y)]
    problem.run()
    assert all(torch.equal(x, y) for x, y in zip((*problem.inputs(), problem.grad_y), before, strict=True))


@interpreted
def test_an_image_with_nan_leaves_the_others_alone_bitwise() -> None:
    problem = Problem(3, 4, 5, 32, 1, torch.float16)
    want = problem.run()
    alone = Problem(3, 4, 5, 32, 1, torch.float16)
    for name in ('qk', 'v', 'gate', 'grad_y'):
        setattr(alone, name, getattr(alone, name)[1:2])
        getattr(problem, name)[0, 3] = float('nan')
        getattr(problem, name)[2, 7] = float('inf')
    poisoned, single = problem.run(), alone.run()
    for name in ('y', 'grad_qk', 'grad_v', 'grad_gate'):
        assert torch.equal(poisoned[name][1], want[name][1]), name
        assert torch.equal(single[name][0], want[name][1]), f'{name} depends on the batch'
        assert poisoned[name][0].isnan().any(), f'{name} hides the NaN'


@interpreted
@pytest.mark.parametrize('part', ['q', 'k', 'v', 'gate'])
def test_nan_is_not_hidden(part: str) -> None:
    problem = Problem(1, 2, 3, 32, 1, torch.float32)
    target = {'q': problem.qk[..., :32], 'k': problem.qk[..., 32:], 'v': problem.v, 'gate': problem.gate}[part]
    target[0, 4, 9] = float('nan')
    y = problem.run()['y']
    assert y[0, 4].isnan().any()
    assert y[0, 0].isnan().any() == (part in {'k', 'v'})


@interpreted
@pytest.mark.parametrize('mean', [-6.0, -20.0, 30.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['fp32', 'fp16'])
def test_extreme_queries_and_keys(dtype: torch.dtype, mean: float) -> None:
    problem = Problem(1, 4, 8, 32, 1, dtype)
    problem.qk = (problem.qk.float() + mean).to(dtype)
    problem.check(factor=2.0)


@interpreted
def test_loss_scale_in_fp16_stays_finite_and_exact() -> None:
    problem = Problem(1, 4, 8, 32, 1, torch.float16)
    problem.qk = (problem.qk.float() - 6).half()
    problem.grad_y = problem.grad_y * 512
    problem.check(factor=2.0)


@interpreted
def test_empty_batch() -> None:
    results = Problem(0, 3, 4, 32, 1, torch.float32).run()
    assert results['y'].shape == (0, 12, 32) and results['grad_qk'].shape == (0, 12, 64)
    assert not results['grad_lepe_weight'].any() and not results['grad_lepe_bias'].any()
