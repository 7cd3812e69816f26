"""What only a GPU can show of ``cpe_norm`` and ``dwc_silu``: accuracy, determinism, layouts, compilation, offsets.

Needs torch, triton, numpy and pytest, and nothing of OpenMMLab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mila_mm.ops import cpe_norm, cpe_norm_reference, dwc_silu, dwc_silu_reference, why_not_triton_stencil

pytestmark = pytest.mark.gpu
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize('dtype', [FP32, FP16, BF16], ids=['fp32', 'fp16', 'bf16'])
BOTH = pytest.mark.parametrize('name', ['cpe_norm', 'dwc_silu'])
REFERENCES = {'cpe_norm': cpe_norm_reference, 'dwc_silu': dwc_silu_reference}
NAMES = {
    'cpe_norm': ('out', 'y', 'x', 'conv_weight', 'conv_bias', 'norm_weight', 'norm_bias'),
    'dwc_silu': ('y', 'x', 'weight', 'bias'),
}
# Root mean square and maximum relative error of outputs and of gradients.
LIMITS = {FP32: ((1e-6, 5e-6), (1e-6, 5e-6)), FP16: ((5e-4, 2e-3), (1e-3, 3e-3)), BF16: ((3e-3, 1e-2), (6e-3, 1.5e-2))}


@pytest.fixture(autouse=True)
def triton_runs() -> None:
    reason = why_not_triton_stencil(torch.zeros(1, 4, 64, device='cuda'))
    assert reason is None, reason


def draw(name: str, batch: int, height: int, width: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    """Activations of ``dtype`` and fp32 parameters."""
    random = torch.Generator('cuda').manual_seed(0)
    vectors = 3 if name == 'cpe_norm' else 1
    shapes = [(batch, height * width, channels), (channels, 1, 3, 3), *[(channels,)] * vectors]
    x, *parameters = (torch.randn(shape, generator=random, device='cuda') for shape in shapes)
    return [(x + 0.5).to(dtype), *parameters]


def by_triton(name: str, tensors: list[Tensor], size: tuple[int, int]) -> tuple[Tensor, ...]:
    result = {'cpe_norm': cpe_norm, 'dwc_silu': dwc_silu}[name](*tensors, size, backend='triton')
    return result if isinstance(result, tuple) else (result,)


def gradients_like(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    random = torch.Generator('cuda').manual_seed(1)
    return [torch.randn(y.shape, generator=random, device='cuda').to(y.dtype) for y in outputs]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN, so that an element which no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run(
    name: str, inputs: list[Tensor], size: tuple[int, int], grads: list[Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Outputs and gradients of the Triton kernels."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    with poisoned_memory():
        outputs = by_triton(name, leaves, size)
        grads = gradients_like(outputs) if grads is None else grads
        return *(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, grads)


def check(
    name: str, inputs: list[Tensor], size: tuple[int, int], grads: list[Tensor] | None = None, factor: float = 1.0
) -> None:
    """Hold outputs and gradients to fp64."""
    got = run(name, inputs, size, grads)
    outputs = len(got) - len(inputs)
    grads = gradients_like(got[:outputs]) if grads is None else grads
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    exact = REFERENCES[name](*leaves, size)
    exact = exact if isinstance(exact, tuple) else (exact,)
    want = *exact, *torch.autograd.grad(exact, leaves, [g.double() for g in grads])
    bad = []
    for index, (label, x, y) in enumerate(zip(NAMES[name], got, want, strict=True)):
        limits = LIMITS[inputs[0].dtype][index >= outputs]
        rms = ((x.double() - y).norm() / y.norm()).item()
        largest = ((x.double() - y).abs().max() / y.abs().max()).item()
        if not (rms <= factor * limits[0] and largest <= factor * limits[1]):
            bad.append(f'{index} {label}: rms {rms:.2e}, max {largest:.2e}, limits {limits}')
    assert not bad, '\n'.join(bad)


@BOTH
@DTYPES
@pytest.mark.parametrize('channels', [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024])
def test_widths(name: str, dtype: torch.dtype, channels: int) -> None:
    check(name, draw(name, 2, 13, 21, channels, dtype), (13, 21))


@BOTH
@DTYPES
@pytest.mark.parametrize(
    'size', [(1, 1), (1, 15), (16, 1), (1, 17), (8, 8), (16, 16), (31, 33), (63, 64), (200, 333)], ids=str
)
def test_maps(name: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    check(name, draw(name, 3, *size, 64, dtype), size)


@BOTH
@pytest.mark.parametrize('channels', [4, 20, 30, 33])
def test_odd_widths(name: str, channels: int) -> None:
    check(name, draw(name, 2, 9, 10, channels, FP32), (9, 10))


@BOTH
def test_loss_scale_and_large_mean_in_fp16(name: str) -> None:
    inputs = draw(name, 2, 20, 23, 64, FP16)
    inputs[0] = (inputs[0].float() + 30).half()
    grads = [g * 2**8 for g in gradients_like(by_triton(name, inputs, (20, 23)))]
    check(name, inputs, (20, 23), grads, factor=4.0)  # x' of 16 bits is coarse beside its own variance


@BOTH
def test_more_than_the_widest_raises(name: str) -> None:
    with pytest.raises(RuntimeError, match='expected at most 1024 channels, got 1056'):
        run(name, draw(name, 1, 2, 2, 1056, FP32), (2, 2))


@BOTH
@DTYPES
def test_bitwise_equal_over_runs_and_batches(name: str, dtype: torch.dtype) -> None:
    inputs, size = draw(name, 4, 50, 83, 64, dtype), (50, 83)
    want = run(name, inputs, size)
    for _ in range(20):
        for index, x in enumerate(run(name, inputs, size)):
            assert torch.equal(x, want[index]), NAMES[name][index]
    count = len(want) - len(inputs)
    grads = [g[2:3] for g in gradients_like(want[:count])]
    alone = run(name, [inputs[0][2:3], *inputs[1:]], size, grads)
    for index in range(count + 1):
        assert torch.equal(alone[index][0], want[index][2]), f'{NAMES[name][index]} depends on the batch'


@BOTH
def test_nan_and_inf_stay_in_their_image(name: str) -> None:
    inputs, size = draw(name, 3, 20, 23, 64, BF16), (20, 23)
    want = run(name, inputs, size)
    inputs[0][0, 77], inputs[0][2, 3] = math.nan, math.inf
    count = len(want) - len(inputs)
    got = run(name, inputs, size)
    for index in range(count + 1):
        assert torch.equal(got[index][1], want[index][1]), NAMES[name][index]
        assert got[index][0].isnan().any(), f'{NAMES[name][index]} hides the NaN'


def as_slice(x: Tensor) -> Tensor:
    """``x`` inside a wider buffer, at an odd offset: strided and misaligned."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 7), math.nan, dtype=x.dtype, device=x.device)
    wide[..., 3:-4] = x
    return wide[..., 3:-4]


def as_first_half(x: Tensor) -> Tensor:
    """``x`` as the first half of a joint projection."""
    return torch.cat((x, torch.full_like(x, math.nan)), dim=-1).chunk(2, dim=-1)[0]


def as_channels_first(x: Tensor) -> Tensor:
    """``x`` with tokens adjacent in memory: the channels are strided."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@BOTH
@pytest.mark.parametrize('layout', [as_slice, as_first_half, as_channels_first])
@pytest.mark.parametrize('dtype', [FP32, BF16], ids=['fp32', 'bf16'])
def test_layouts_give_the_same_bits(name: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]) -> None:
    inputs, size = draw(name, 2, 13, 20, 64, dtype), (13, 20)
    want = run(name, inputs, size)
    grads = [layout(g) for g in gradients_like(want[: len(want) - len(inputs)])]
    for index, x in enumerate(run(name, [layout(inputs[0]), *inputs[1:]], size, grads)):
        assert torch.equal(x, want[index]), NAMES[name][index]


@BOTH
def test_expanded_gradients(name: str) -> None:
    inputs = draw(name, 2, 13, 20, 64, FP32)
    count = len(by_triton(name, inputs, (13, 20)))
    grads = [torch.tensor(0.7 + i, device='cuda').expand(2, 260, 64) for i in range(count)]
    check(name, inputs, (13, 20), grads, factor=4.0)


@BOTH
@pytest.mark.parametrize('batch', [0, 1])
def test_small_batches(name: str, batch: int) -> None:
    got = run(name, draw(name, batch, 5, 6, 64, BF16), (5, 6))
    assert got[0].shape == (batch, 30, 64)
    assert bool(got[-1].any()) == bool(batch)


@BOTH
@pytest.mark.parametrize('dtype', [FP16, BF16], ids=['fp16', 'bf16'])
def test_autocast_with_master_weights(name: str, dtype: torch.dtype) -> None:
    leaves = [t.requires_grad_() for t in draw(name, 2, 9, 14, 64, FP32)]
    with torch.autocast('cuda', dtype):
        outputs = by_triton(name, leaves, (9, 14))
    assert outputs[-1].dtype == dtype and outputs[0].dtype == (FP32 if name == 'cpe_norm' else dtype)
    grads = torch.autograd.grad(outputs, leaves, gradients_like(outputs))
    assert all(g.dtype == FP32 and g.isfinite().all() for g in grads)


@BOTH
def test_opcheck(name: str) -> None:
    ops = torch.ops.mila_mm
    inputs = draw(name, 2, 5, 7, 64, BF16)
    for x in (inputs[0], as_channels_first(inputs[0])):
        tensors = (x, *inputs[1:])
        if name == 'cpe_norm':
            out, y, mean, rstd = ops.cpe_norm_forward(*tensors, 5, 7, 1e-5, BF16)
            torch.library.opcheck(ops.cpe_norm_forward.default, (*tensors, 5, 7, 1e-5, BF16))
            torch.library.opcheck(ops.cpe_norm_backward.default, (out, y, *tensors, out, mean, rstd, 5, 7))
        else:
            torch.library.opcheck(ops.dwc_silu_forward.default, (*tensors, 5, 7))
            torch.library.opcheck(ops.dwc_silu_backward.default, (x, *tensors, 5, 7))


@BOTH
def test_compiled_once_for_all_sizes(name: str) -> None:
    def loss(*tensors: Tensor, size: tuple[int, int]) -> Tensor:
        return sum(y.float().square().mean() for y in by_triton(name, list(tensors), size))

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for count, size in enumerate([(5, 7), (9, 8), (16, 33), (40, 12), (50, 64)]):
        leaves = [t.requires_grad_() for t in draw(name, 2, *size, 64, BF16)]
        want = torch.autograd.grad(loss(*leaves, size=size), leaves)
        # One more compilation is fair after the first size, when sizes turn out to vary.
        with torch.compiler.set_stance('fail_on_recompile' if count > 1 else 'default'):
            got = torch.autograd.grad(compiled(*leaves, size=size), leaves)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-5)


@BOTH
def test_no_binary_depends_on_the_size(name: str) -> None:
    triton = pytest.importorskip('triton')
    binaries: list[str] = []
    run(name, draw(name, 2, 7, 11, 64, BF16), (7, 11))
    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = lambda *, src, **_: binaries.append(getattr(src, 'name', '?'))
    try:
        for size in [(1, 1), (1, 16), (16, 1), (16, 16), (31, 33), (64, 64), (200, 334), (5, 128)]:
            run(name, draw(name, 1, *size, 64, BF16), size)
    finally:
        triton.knobs.compilation.listener = before
    assert not binaries, binaries


@BOTH
def test_cuda_graph_waits_for_nothing_and_replays(name: str) -> None:
    inputs, size = draw(name, 2, 40, 50, 64, BF16), (40, 50)
    grads = gradients_like(by_triton(name, inputs, size))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(name, inputs, size, grads)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(name, inputs, size, grads)
    for x in (*inputs, *grads):
        x.copy_(torch.randn_like(x))
    graph.replay()
    for x, y in zip(captured, run(name, inputs, size, grads), strict=True):
        assert torch.equal(x, y)


@BOTH
def test_offsets_beyond_2_to_the_31(name: str) -> None:
    batch, height, width, channels = 520, 200, 334, 64
    elements = batch * height * width * channels
    assert elements > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 22 * elements:
        pytest.skip(f'needs {22 * elements / 2**30:.0f} GiB of free GPU memory, has {free / 2**30:.0f}')
    inputs, size = draw(name, 1, height, width, channels, BF16), (height, width)
    one = run(name, inputs, size)
    count = len(one) - len(inputs)
    grads = [g.repeat(batch, 1, 1) for g in gradients_like(one[:count])]
    many = run(name, [inputs[0].repeat(batch, 1, 1), *inputs[1:]], size, grads)
    for index in range(count + 1):
        for image in (0, batch // 2, batch - 1):
            assert torch.equal(many[index][image], one[index][0]), f'{NAMES[name][index]} of image {image}'
