"""Every kernel of the block's stencils against fp64 autograd of plain operators, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip('triton')

pytestmark = [pytest.mark.usefixtures('poisoned_memory'), pytest.mark.interpreted]
EPS = 1e-5
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Root mean square and maximum relative error of outputs and of gradients; the interpreter truncates to bf16.
LIMITS = {
    FP32: ((1e-6, 5e-6), (1e-6, 5e-6)),
    FP16: ((5e-4, 2e-3), (1e-3, 3e-3)),
    BF16: ((6e-3, 2e-2), (1.2e-2, 3e-2)),
}
CPE_NORM = ('out', 'y', 'grad_x', 'grad_conv_weight', 'grad_conv_bias', 'grad_norm_weight', 'grad_norm_bias')
DWC_SILU = ('y', 'grad_x', 'grad_weight', 'grad_bias')


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Depthwise 3x3 of tokens (B, N, C), from PyTorch's convolution."""
    image = x.transpose(1, 2).unflatten(2, (height, width))
    return F.conv2d(image, weight, bias, padding=1, groups=x.shape[-1]).flatten(2).transpose(1, 2)


class Problem:
    """Inputs of one op, what the kernels make of them, and what fp64 autograd makes of the same numbers."""

    def __init__(
        self,
        op: str,
        batch: int,
        height: int,
        width: int,
        channels: int,
        dtype: torch.dtype,
        weight_dtype: torch.dtype = FP32,
        y_dtype: torch.dtype | None = None,
    ) -> None:
        random = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        self.op, self.size, self.y_dtype = op, (height, width), y_dtype or dtype
        shape = batch, height * width, channels
        self.x = (normal(*shape) + 0.5).to(dtype)
        vectors = 3 if op == 'cpe_norm' else 1
        self.parameters = [normal(channels, 1, 3, 3).to(weight_dtype)]
        self.parameters += [normal(channels).to(weight_dtype) for _ in range(vectors)]
        grads = 2 if op == 'cpe_norm' else 1
        self.grads = [normal(*shape).to(d) for d in (dtype, self.y_dtype)[2 - grads :]]
        self.names = CPE_NORM if op == 'cpe_norm' else DWC_SILU

    def run(self) -> dict[str, Tensor]:
        """Outputs and gradients of the kernels."""
        from mila_mm.ops.stencil import launch as stencil_launch

        if self.op == 'cpe_norm':
            out, y, mean, rstd = stencil_launch.cpe_norm_forward(
                self.x, *self.parameters, *self.size, EPS, self.y_dtype
            )
            assert mean.dtype == rstd.dtype == FP32
            grads = stencil_launch.cpe_norm_backward(*self.grads, self.x, *self.parameters, out, mean, rstd, *self.size)
            outputs: tuple[Tensor, ...] = (out, y)
        else:
            outputs = (stencil_launch.dwc_silu_forward(self.x, *self.parameters, *self.size),)
            grads = stencil_launch.dwc_silu_backward(*self.grads, self.x, *self.parameters, *self.size)
        results = (*outputs, *grads)
        sources = (*self.grads, self.x, *self.parameters)
        for name, got, source in zip(self.names, results, sources, strict=True):
            assert got.dtype == source.dtype and got.shape == source.shape and got.is_contiguous(), name
        return dict(zip(self.names, results, strict=True))

    def expected(self) -> dict[str, Tensor]:
        """The same in fp64."""
        leaves = [t.detach().double().requires_grad_() for t in (self.x, *self.parameters)]
        x, weight, bias, *norm = leaves
        p = depthwise(x, weight, bias, *self.size)
        outputs = (x + p, F.layer_norm(x + p, x.shape[-1:], *norm, EPS)) if norm else (F.silu(p),)
        grads = torch.autograd.grad(outputs, leaves, [g.double() for g in self.grads])
        return dict(zip(self.names, (*outputs, *grads), strict=True))

    def check(self, factor: float = 1.0) -> None:
        """Hold every result of the kernels to the limits of the coarsest dtype that it has passed through."""
        want = self.expected()
        bad = []
        for name, got in self.run().items():
            exact = max((self.x.dtype, got.dtype, self.grads[-1].dtype), key=lambda dtype: torch.finfo(dtype).eps)
            limits = LIMITS[exact if name != 'out' else got.dtype][name.startswith('grad')]
            difference, scale = got.double() - want[name], want[name]
            errors = (
                (difference.square().mean() / scale.square().mean()).sqrt().item(),
                (difference.abs().max() / scale.abs().max()).item(),
            )
            if not all(error <= factor * limit for error, limit in zip(errors, limits, strict=True)):
                bad.append(f'{name}: rms {errors[0]:.2e}, max {errors[1]:.2e}, limits {limits}')
        assert not bad, '\n'.join(bad)


OPS = pytest.mark.parametrize('op', ['cpe_norm', 'dwc_silu'])
SHAPES = {
    '2x7x11x32': (2, 7, 11, 32),
    '1x1x13x64-one-row': (1, 1, 13, 64),
    '1x13x1x64-one-column': (1, 13, 1, 64),
    '1x1x1x64-one-token': (1, 1, 1, 64),
    '1x5x9x96': (1, 5, 9, 96),
    '1x3x4x20-odd-channels': (1, 3, 4, 20),
}


@OPS
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
def test_equals_fp64_in_fp32(op: str, shape: tuple[int, int, int, int]) -> None:
    Problem(op, *shape, FP32).check()


def test_all_channels_of_a_wide_token() -> None:
    Problem('cpe_norm', 1, 2, 3, 384, FP32).check()


@OPS
@pytest.mark.parametrize('shape', [(2, 5, 7, 32), (1, 1, 13, 64), (1, 13, 1, 64), (1, 1, 1, 96)], ids=str)
@pytest.mark.parametrize('dtype', [FP16, BF16], ids=['fp16', 'bf16'])
def test_equals_fp64_in_16_bits(op: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    Problem(op, *shape, dtype).check()


@OPS
@pytest.mark.parametrize('weight_dtype', [FP16, BF16], ids=['fp16', 'bf16'])
def test_weights_of_16_bits_get_gradients_of_16_bits(op: str, weight_dtype: torch.dtype) -> None:
    problem = Problem(op, 1, 4, 5, 32, weight_dtype, weight_dtype)
    problem.check()


def test_residual_of_32_bits_with_a_norm_of_16() -> None:
    Problem('cpe_norm', 2, 4, 5, 32, FP32, y_dtype=FP16).check()


@OPS
@pytest.mark.parametrize(('height', 'width', 'rows'), [(9, 21, 4), (3, 50, 1), (11, 6, 8)])
def test_several_splits(op: str, height: int, width: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from mila_mm.ops.triton import configs

    monkeypatch.setattr(configs, 'norm_tokens_per_split', lambda channels: 64)
    monkeypatch.setattr(configs, 'rows_per_run', lambda height, programs: rows)
    monkeypatch.setattr(configs, 'STRIP', configs.Strip(4, 4))
    monkeypatch.setattr(configs, 'STRIP_BACKWARD', configs.Strip(2, 4))
    monkeypatch.setattr(configs, 'REDUCE_ROWS', 2)
    Problem(op, 2, height, width, 32, FP32).check()


def as_slice(x: Tensor) -> Tensor:
    """``x`` inside a buffer with more channels on both sides, at an odd offset: strided and misaligned."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 7), float('nan'), dtype=x.dtype)
    wide[..., 3:-4] = x
    return wide[..., 3:-4]


def as_first_half(x: Tensor) -> Tensor:
    """``x`` as the first half of a joint projection."""
    return torch.cat((x, torch.full_like(x, float('nan'))), dim=-1).chunk(2, dim=-1)[0]


def as_channels_first(x: Tensor) -> Tensor:
    """``x`` with tokens adjacent in memory: the channels are strided."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def as_batch_inner(x: Tensor) -> Tensor:
    """``x`` with the batch between tokens and channels in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def as_every_second(x: Tensor) -> Tensor:
    """A vector with something else between its elements."""
    return torch.stack((x, torch.full_like(x, float('nan'))), dim=-1).flatten()[::2]


@OPS
@pytest.mark.parametrize('layout', [as_slice, as_first_half, as_channels_first, as_batch_inner])
def test_layouts_give_the_same_bits(op: str, layout: Callable[[Tensor], Tensor]) -> None:
    problem = Problem(op, 2, 3, 7, 32, FP32)
    want = problem.run()
    problem.x = layout(problem.x)
    problem.grads = [layout(grad) for grad in problem.grads]
    problem.parameters[1:] = map(as_every_second, problem.parameters[1:])
    for name, got in problem.run().items():
        assert torch.equal(got, want[name]), name


@OPS
@pytest.mark.parametrize('index', [0, 1, 2], ids=['x', 'first-gradient', 'last-gradient'])
def test_each_input_is_read_by_its_own_strides(op: str, index: int) -> None:
    problem = Problem(op, 2, 3, 7, 32, FP16)
    want = problem.run()
    if index == 0:
        problem.x = as_first_half(problem.x)
    else:
        problem.grads[1 - index] = as_first_half(problem.grads[1 - index])  # 0, and -1
    for name, got in problem.run().items():
        assert torch.equal(got, want[name]), name


@OPS
def test_expanded_gradients_and_vectors(op: str) -> None:
    problem = Problem(op, 2, 3, 7, 32, FP32)
    problem.parameters[1:] = [torch.tensor(0.3 + i).expand(32) for i, _ in enumerate(problem.parameters[1:])]
    problem.grads = [torch.tensor(0.7 + i).expand(2, 21, 32) for i, _ in enumerate(problem.grads)]
    problem.check(factor=2.0)  # a LayerNorm takes out what channels have in common: the rest is a difference


@OPS
def test_inputs_are_left_alone(op: str) -> None:
    problem = Problem(op, 1, 3, 7, 32, FP32)
    tensors = [problem.x, *problem.parameters, *problem.grads]
    before = [t.clone() for t in tensors]
    problem.run()
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@OPS
def test_an_image_with_nan_leaves_the_others_alone_bitwise(op: str) -> None:
    problem, alone = (Problem(op, 3, 4, 5, 32, FP16) for _ in range(2))
    want = problem.run()
    alone.x, alone.grads = alone.x[1:2], [grad[1:2] for grad in alone.grads]
    for tensor in (problem.x, *problem.grads):
        tensor[0, 3], tensor[2, 7] = float('nan'), float('inf')
    poisoned, single = problem.run(), alone.run()
    for name in (x for x in ('out', 'y', 'grad_x') if x in want):
        assert torch.equal(poisoned[name][1], want[name][1]), name
        assert torch.equal(single[name][0], want[name][1]), f'{name} depends on the batch'
        assert poisoned[name][0].isnan().any(), f'{name} hides the NaN'


@OPS
def test_large_mean_and_loss_scale(op: str) -> None:
    problem = Problem(op, 1, 4, 6, 32, FP16)
    problem.x = (problem.x.float() + 30).half()
    problem.grads = [grad * 2**8 for grad in problem.grads]
    problem.check(factor=3.0)  # x' of 16 bits is coarse beside its own variance


@OPS
def test_empty_batch(op: str) -> None:
    results = Problem(op, 0, 3, 4, 32, FP32).run()
    assert results['y'].shape == (0, 12, 32)
    assert not any(results[name].any() for name in results if 'weight' in name or 'bias' in name)


def test_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
