"""What only a GPU can show of the attention op: accuracy, determinism, large offsets, graphs, compilation, memory.

Needs torch, triton, numpy and pytest, and nothing of OpenMMLab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops import mila_attention, mila_attention_reference, why_not_triton

pytestmark = pytest.mark.gpu
NAMES = ('y', 'grad_qk', 'grad_v', 'grad_lepe_weight', 'grad_lepe_bias', 'grad_gate')
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Root mean square and maximum relative error of the output, of the gradient of qk, of the other gradients.
LIMITS = {
    'fp32': ((1e-6, 5e-6), (1e-5, 1e-5), (1e-6, 5e-6)),
    'fp32-tf32': ((5e-4, 1e-3), (5e-4, 1e-3), (5e-4, 1e-3)),
    'bf16': ((3e-3, 1e-2), (6e-3, 1.5e-2), (6e-3, 1.5e-2)),
    'fp16': ((5e-4, 2e-3), (1e-3, 3e-3), (1e-3, 3e-3)),
}
DTYPES = {'fp32': FP32, 'fp32-tf32': FP32, 'bf16': BF16, 'fp16': FP16}


@pytest.fixture(autouse=True)
def triton_runs() -> None:
    """The tests below would all pass on the reference too: make sure that they are not."""
    x = torch.zeros(1, 4, 64, device='cuda')
    reason = why_not_triton(torch.zeros(1, 4, 128, device='cuda'), x, 2)
    assert reason is None, reason


@contextmanager
def precision(mode: str) -> Iterator[None]:
    """Allow TF32 in matrix products for 'fp32-tf32', forbid it otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('high' if mode == 'fp32-tf32' else 'highest')
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN, so that an element which no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def draw(
    batch: int,
    height: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    lepe: bool = True,
    gate: bool = True,
    weight_dtype: torch.dtype = FP32,
    mean: float = 0.0,
    seed: int = 0,
) -> tuple[list[Tensor | None], Tensor]:
    """Random inputs in the order (qk, v, lepe_weight, lepe_bias, gate), and a gradient of the output."""
    random = torch.Generator('cuda').manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device='cuda')

    tokens = height * width
    inputs = [
        (normal(batch, tokens, 2 * channels) + mean).to(dtype),
        normal(batch, tokens, channels).to(dtype),
        normal(channels, 1, 3, 3).div(3).to(weight_dtype) if lepe else None,
        normal(channels).to(weight_dtype) if lepe else None,
        normal(batch, tokens, channels).to(dtype) if gate else None,
    ]
    return inputs, normal(batch, tokens, channels).to(dtype)


def run(
    function: Callable[..., Tensor],
    inputs: list[Tensor | None],
    grad_y: Tensor,
    size: tuple[int, int],
    heads: int,
    **options: object,
) -> dict[str, Tensor]:
    """Output and gradients of an implementation, by name."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    y = function(*leaves[:4], size, heads, leaves[4], **options)
    wanted = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(y, wanted, grad_y)
    names = [name for name, x in zip(NAMES[1:], leaves, strict=True) if x is not None]
    return {'y': y.detach(), **dict(zip(names, grads, strict=True))}


def exact(inputs: list[Tensor | None], grad_y: Tensor, size: tuple[int, int], heads: int) -> dict[str, Tensor]:
    """The same in fp64, from the numbers that the inputs hold in their own precision."""
    doubles = [None if x is None else x.double() for x in inputs]
    return run(mila_attention_reference, doubles, grad_y.double(), size, heads)


def errors(got: Tensor, want: Tensor, floor: float = 0.0) -> tuple[float, float]:
    """Root mean square and maximum error over those of ``want`` (over ``floor`` where that is larger)."""
    assert got.shape == want.shape
    floor = max(floor, torch.finfo(got.dtype).tiny)
    difference = got.double() - want
    rms = difference.square().mean().sqrt() / want.square().mean().sqrt().clamp(min=floor)
    return rms.item(), (difference.abs().max() / want.abs().max().clamp(min=floor)).item()


def check(
    mode: str,
    inputs: list[Tensor | None],
    grad_y: Tensor,
    size: tuple[int, int],
    heads: int,
    factor: float = 1.0,
    cancelling: bool = False,
) -> None:
    """Hold the kernels to the limits of the mode.

    With ``cancelling`` (one token, or tokens all equal) numerator and normaliser cancel in the gradient of qk, whose
    error is then measured against the size of either.
    """
    want = exact(inputs, grad_y, size, heads)
    with precision(mode), poisoned_memory():
        got = run(mila_attention, inputs, grad_y, size, heads, backend='triton')
    bad = []
    floor = inputs[1].double().square().mean().sqrt().item() * grad_y.double().square().mean().sqrt().item()
    for name, x in got.items():
        limits = LIMITS[mode][0 if name == 'y' else 1 if name == 'grad_qk' else 2]
        found = errors(x, want[name], floor if cancelling and name == 'grad_qk' else 0.0)
        if not all(error <= factor * limit for error, limit in zip(found, limits, strict=True)):
            bad.append(f'{name}: rms {found[0]:.2e}, max {found[1]:.2e}, limits {limits}')
    assert not bad, '\n'.join(bad)


# batch, height, width, channels, heads
SHAPES = [
    (1, 1, 1, 64, 2),
    (1, 1, 15, 64, 2),
    (3, 16, 1, 64, 2),
    (1, 17, 1, 32, 1),
    (1, 1, 63, 128, 4),
    (2, 8, 8, 64, 2),
    (3, 5, 13, 96, 3),
    (16, 7, 7, 512, 16),
    (2, 15, 17, 192, 6),
    (1, 16, 16, 256, 8),
    (2, 25, 40, 384, 12),
    (2, 4, 250, 768, 24),
    (1, 1, 4001, 64, 2),
    (1, 4001, 1, 64, 2),
    (3, 57, 33, 128, 4),
    (1, 200, 334, 64, 2),
]


@pytest.mark.parametrize('shape', SHAPES, ids=lambda shape: 'x'.join(map(str, shape)))
@pytest.mark.parametrize('mode', LIMITS)
def test_accuracy(mode: str, shape: tuple[int, ...]) -> None:
    batch, height, width, channels, heads = shape
    inputs, grad_y = draw(batch, height, width, channels, DTYPES[mode])
    check(mode, inputs, grad_y, (height, width), heads, cancelling=height * width == 1)


@pytest.mark.parametrize('head_width', [16, 24, 32, 48, 64])
@pytest.mark.parametrize('heads', [1, 2, 3])
@pytest.mark.parametrize('mode', LIMITS)
def test_head_widths(mode: str, heads: int, head_width: int) -> None:
    inputs, grad_y = draw(2, 13, 30, heads * head_width, DTYPES[mode])
    check(mode, inputs, grad_y, (13, 30), heads)


@pytest.mark.parametrize(('lepe', 'gate'), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize('mode', LIMITS)
def test_optional_parts(mode: str, lepe: bool, gate: bool) -> None:
    inputs, grad_y = draw(2, 19, 35, 64, DTYPES[mode], lepe, gate)
    check(mode, inputs, grad_y, (19, 35), 2)


@pytest.mark.parametrize('dtype', [FP16, BF16])
def test_weights_of_16_bits(dtype: torch.dtype) -> None:
    inputs, grad_y = draw(2, 19, 35, 64, dtype, weight_dtype=dtype)
    got = run(mila_attention, inputs, grad_y, (19, 35), 2, backend='triton')
    assert got['grad_lepe_weight'].dtype == got['grad_lepe_bias'].dtype == dtype
    check('bf16' if dtype == BF16 else 'fp16', inputs, grad_y, (19, 35), 2)


def eager(
    qk: Tensor, v: Tensor, weight: Tensor, bias: Tensor, size: tuple[int, int], heads: int, gate: Tensor
) -> Tensor:
    """The formula as one writes it in the dtype of its inputs: elu(x) + 1, k and v scaled by 1 / sqrt(N)."""
    batch, tokens, channels = v.shape
    height, width = size
    q, k = ((F.elu(x) + 1).reshape(batch, tokens, channels) for x in qk.chunk(2, -1))
    theta = 1 / 10000 ** (torch.arange(channels // 4, device=v.device) / (channels // 4))
    row = torch.arange(height, device=v.device).repeat_interleave(width)[:, None] * theta
    column = torch.arange(width, device=v.device).repeat(height)[:, None] * theta
    angle = torch.cat((row, column), -1)

    def rope(x: Tensor) -> Tensor:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
        return torch.stack(turned, -1).flatten(-2).to(x.dtype)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    z = 1 / (split(q) @ split(k).mean(-2, keepdim=True).transpose(-2, -1) + 1e-6)
    state = (split(rope(k)).transpose(-2, -1) * tokens**-0.5) @ (split(v) * tokens**-0.5)
    out = (split(rope(q)) @ state * z).transpose(1, 2).flatten(2)
    image = v.transpose(1, 2).unflatten(2, size)
    lepe = F.conv2d(image, weight.to(v.dtype), bias.to(v.dtype), padding=1, groups=channels)
    return (out + lepe.flatten(2).transpose(1, 2)) * F.silu(gate)


@pytest.mark.parametrize('mode', ['fp32', 'bf16', 'fp16'])
def test_no_worse_than_eager_in_the_same_dtype(mode: str) -> None:
    inputs, grad_y = draw(2, 100, 167, 64, DTYPES[mode])
    size = (100, 167)
    want = exact(inputs, grad_y, size, 2)
    with precision(mode):
        ours = run(mila_attention, inputs, grad_y, size, 2, backend='triton')
        theirs = run(eager, inputs, grad_y, size, 2)
    for name in NAMES:
        mine, other = errors(ours[name], want[name])[0], errors(theirs[name], want[name])[0]
        assert mine <= 1.2 * other + 1e-7, f'{name}: {mine:.2e} against {other:.2e} of eager'


@pytest.mark.parametrize('mean', [-6.0, -20.0, 30.0])
@pytest.mark.parametrize('mode', ['fp32', 'bf16', 'fp16'])
def test_extreme_queries_and_keys(mode: str, mean: float) -> None:
    inputs, grad_y = draw(2, 20, 40, 64, DTYPES[mode], mean=mean)
    check(mode, inputs, grad_y, (20, 40), 2, factor=2.0)


@pytest.mark.parametrize('mode', ['fp32', 'bf16', 'fp16'])
def test_equal_tokens(mode: str) -> None:
    inputs, grad_y = draw(1, 16, 24, 64, DTYPES[mode])
    inputs[0] = inputs[0][:, :1].expand_as(inputs[0])
    inputs[1] = inputs[1][:, :1].expand_as(inputs[1])
    check(mode, inputs, grad_y, (16, 24), 2, factor=2.0, cancelling=True)


@pytest.mark.parametrize('mode', ['fp32', 'bf16', 'fp16'])
def test_values_with_a_large_mean(mode: str) -> None:
    inputs, grad_y = draw(1, 16, 24, 64, DTYPES[mode])
    inputs[1] = (inputs[1].float() + 1000).to(DTYPES[mode])
    # Gradients of qk are differences of values that agree in their leading digits: bounded against those values.
    check(mode, inputs, grad_y, (16, 24), 2, factor=2.0, cancelling=True)


def test_loss_scale_in_fp16() -> None:
    inputs, grad_y = draw(1, 20, 40, 64, FP16, mean=-6.0)
    check('fp16', inputs, grad_y * 2**10, (20, 40), 2, factor=2.0)


def test_overflowing_loss_scale_gives_inf_or_nan_and_no_error() -> None:
    inputs, grad_y = draw(1, 8, 8, 64, FP16)
    got = run(mila_attention, inputs, grad_y * math.inf, (8, 8), 2, backend='triton')
    assert not got['grad_v'].isfinite().all()


def test_nan_and_inf_stay_in_their_image() -> None:
    inputs, grad_y = draw(3, 20, 23, 64, BF16)
    want = run(mila_attention, inputs, grad_y, (20, 23), 2, backend='triton')
    for x in (inputs[0], inputs[1], inputs[4], grad_y):
        x[0, 77] = math.nan
        x[2, 3] = math.inf
    got = run(mila_attention, inputs, grad_y, (20, 23), 2, backend='triton')
    for name in ('y', 'grad_qk', 'grad_v', 'grad_gate'):
        assert torch.equal(got[name][1], want[name][1]), name
        assert got[name][0].isnan().any(), f'{name} hides the NaN'


@pytest.mark.parametrize('mode', ['fp32', 'bf16'])
def test_bitwise_equal_over_runs_and_batches(mode: str) -> None:
    inputs, grad_y = draw(4, 100, 167, 64, DTYPES[mode])
    size = (100, 167)
    want = run(mila_attention, inputs, grad_y, size, 2, backend='triton')
    for _ in range(20):
        for name, x in run(mila_attention, inputs, grad_y, size, 2, backend='triton').items():
            assert torch.equal(x, want[name]), name
    one = [x if x is None or index in {2, 3} else x[2:3] for index, x in enumerate(inputs)]
    alone = run(mila_attention, one, grad_y[2:3], size, 2, backend='triton')
    for name in ('y', 'grad_qk', 'grad_v', 'grad_gate'):
        assert torch.equal(alone[name][0], want[name][2]), f'{name} depends on the batch'


def as_slice(x: Tensor) -> Tensor:
    """``x`` inside a wider buffer, at an odd offset: strided and misaligned."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 7), math.nan, dtype=x.dtype, device=x.device)
    wide[..., 3:-4] = x
    return wide[..., 3:-4]


def as_channels_first(x: Tensor) -> Tensor:
    """``x`` with tokens adjacent in memory: the channels are strided."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def as_image(x: Tensor) -> Tensor:
    """``x`` from a channels_last image, as a convolution leaves it."""
    image = x.transpose(1, 2).unflatten(2, (13, 20)).contiguous(memory_format=torch.channels_last)
    return image.flatten(2).transpose(1, 2)


@pytest.mark.parametrize('layout', [as_slice, as_channels_first, as_image])
@pytest.mark.parametrize('dtype', [FP32, BF16])
def test_layouts_give_the_same_bits(dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    inputs, grad_y = draw(2, 13, 20, 64, dtype)
    want = run(mila_attention, inputs, grad_y, (13, 20), 2, backend='triton')
    for index in (0, 1, 4):
        inputs[index] = layout(inputs[index])
    got = run(mila_attention, inputs, layout(grad_y), (13, 20), 2, backend='triton')
    for name, x in got.items():
        assert torch.equal(x, want[name]), name


def test_expanded_gradient() -> None:
    inputs, _ = draw(2, 13, 20, 64, FP32)
    check('fp32', inputs, torch.tensor(0.7, device='cuda').expand(2, 260, 64), (13, 20), 2)


@pytest.mark.parametrize('batch', [0, 1])
def test_small_batches(batch: int) -> None:
    inputs, grad_y = draw(batch, 5, 6, 64, BF16)
    got = run(mila_attention, inputs, grad_y, (5, 6), 2, backend='triton')
    assert got['y'].shape == (batch, 30, 64)
    assert bool(got['grad_lepe_weight'].any()) == bool(batch)
