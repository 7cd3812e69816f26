"""The attention op among PyTorch's machinery on a GPU: compilation, graphs, streams, autocast, memory, large offsets.

Needs torch, triton, numpy and pytest, and nothing of OpenMMLab.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mila_mm.ops import clear_rope_cache, mila_attention
from mila_mm.ops.attention import closed_form

pytestmark = pytest.mark.gpu
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def draw(batch: int, height: int, width: int, channels: int = 64, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Random leaves (qk, v, lepe_weight, lepe_bias, gate)."""
    random = torch.Generator('cuda').manual_seed(0)
    tokens = height * width

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=random, device='cuda', dtype=dtype).requires_grad_()

    return (
        normal(batch, tokens, 2 * channels, dtype=dtype),
        normal(batch, tokens, channels, dtype=dtype),
        normal(channels, 1, 3, 3),
        normal(channels),
        normal(batch, tokens, channels, dtype=dtype),
    )


def attend(qk: Tensor, v: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, height: int, width: int) -> Tensor:
    """The op on two heads (or as many as there are of 32 channels), by Triton or not at all."""
    heads = v.shape[-1] // 32
    return mila_attention(qk, v, weight, bias, (height, width), heads, gate, backend='triton')


def forward_backward(inputs: Inputs, height: int, width: int, grad_y: Tensor | None = None) -> tuple[Tensor, ...]:
    """Output and gradients."""
    y = attend(*inputs, height, width)
    return y, *torch.autograd.grad(y, inputs, torch.ones_like(y) if grad_y is None else grad_y)


def assert_bitwise(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    """Equal in every bit."""
    for index, (x, y) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(x, y), f'result {index} differs'


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    qk, v, weight, bias, gate = (x.detach() for x in draw(2, 5, 7, dtype=dtype))
    options = (5, 7, 2, 1e-6, 10000.0)
    forward, backward = torch.ops.mila_mm.attention_forward.default, torch.ops.mila_mm.attention_backward.default
    y, state, mean = forward(qk, v, weight, bias, gate, *options)
    dense_permuted = v.transpose(1, 2).contiguous().transpose(1, 2)
    for variant in (v, dense_permuted):
        torch.library.opcheck(forward, (qk, variant, weight, bias, gate, *options))
        torch.library.opcheck(backward, (y, qk, variant, weight, bias, gate, state, mean, *options))
    torch.library.opcheck(forward, (qk, v, None, None, None, *options))
    torch.library.opcheck(backward, (y, qk, v, None, None, None, state, mean, *options))


def test_compiled_once_for_all_sizes() -> None:
    def loss(*args: object) -> Tensor:
        return attend(*args).float().square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for count, (height, width) in enumerate([(5, 7), (9, 8), (16, 33), (40, 12), (50, 64)]):
        inputs = draw(2, height, width)
        want = torch.autograd.grad(loss(*inputs, height, width), inputs)
        # One more compilation is fair after the first size, when sizes turn out to vary.
        with torch.compiler.set_stance('fail_on_recompile' if count > 1 else 'default'):
            got = torch.autograd.grad(compiled(*inputs, height, width), inputs)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-6)


def test_no_binary_depends_on_the_size() -> None:
    triton = pytest.importorskip('triton')
    compilations: list[str] = []

    def note(*, src: object, **_: object) -> None:
        compilations.append(getattr(src, 'name', '?'))

    forward_backward(draw(2, 7, 11), 7, 11)
    forward_backward(draw(2, 40, 40), 40, 40)  # more than one split: the summing kernel as well
    before = triton.knobs.compilation.listener
    triton.knobs.compilation.listener = note
    try:
        for height, width in [(1, 1), (1, 16), (16, 1), (16, 16), (31, 33), (64, 64), (200, 334), (5, 128)]:
            forward_backward(draw(1, height, width), height, width)
    finally:
        triton.knobs.compilation.listener = before
    assert not compilations, compilations


def test_waits_for_nothing() -> None:
    inputs = draw(2, 40, 50)
    forward_backward(inputs, 40, 50)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        forward_backward(inputs, 40, 50)
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_cuda_graph_replays_on_new_numbers() -> None:
    inputs = draw(2, 40, 50)
    grad_y = torch.randn_like(inputs[1])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_backward(inputs, 40, 50, grad_y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(inputs, 40, 50, grad_y)
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
        grad_y.copy_(torch.randn_like(grad_y))
    graph.replay()
    assert_bitwise(captured, forward_backward(inputs, 40, 50, grad_y))


def test_cuda_graph_survives_a_larger_map() -> None:
    """The rotation tables grow by being replaced; the graph reads those of its capture."""
    clear_rope_cache()
    inputs = draw(2, 40, 50)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            attend(*inputs, 40, 50)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attend(*inputs, 40, 50)
        want = attend(*inputs, 40, 50)
        attend(*draw(1, 2, 300), 2, 300)
        torch.cuda.empty_cache()
        rubbish = [torch.full((64, 16), float('nan'), device='cuda') for _ in range(64)]
        captured.zero_()
        graph.replay()
    assert torch.equal(captured, want) and len(rubbish) == 64


def test_a_capture_without_a_run_before_says_so() -> None:
    clear_rope_cache()
    inputs = draw(1, 8, 9)
    attend(*inputs, 8, 9)
    clear_rope_cache()
    refused = pytest.raises(RuntimeError, match='expected a run on a map of this size before the capture')
    with refused, torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        attend(*inputs, 8, 9)


@pytest.mark.parametrize('backend', ['triton', 'auto'])
def test_reduce_overhead_caches_nothing_in_a_graphs_pool(backend: str) -> None:
    """The first call of each size runs inside of the pool, whose memory later calls overwrite."""
    clear_rope_cache()
    torch._dynamo.reset()
    closed_form._members.cache_clear()
    heads, channels = (2, 64) if backend == 'triton' else (1, 128)  # heads of 128 channels take the closed form

    def loss(qk: Tensor, v: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, height: int, width: int) -> Tensor:
        y = mila_attention(qk, v, weight, bias, (height, width), heads, gate, backend=backend)
        return y.float().square().mean()

    compiled = torch.compile(loss, mode='reduce-overhead', fullgraph=True, dynamic=False)
    for step in range(4):
        for height, width in ((7, 9), (70, 9)):
            inputs = draw(2, height, width, channels)
            torch.compiler.cudagraph_mark_step_begin()
            got = [x.clone() for x in torch.autograd.grad(compiled(*inputs, height, width), inputs)]
            want = torch.autograd.grad(loss(*inputs, height, width), inputs)
            for x, y in zip(got, want, strict=True):
                torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-6, msg=lambda m, step=step: f'step {step}: {m}')


def test_another_stream() -> None:
    inputs = draw(2, 40, 50)
    want = forward_backward(inputs, 40, 50)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = forward_backward(inputs, 40, 50)
    stream.synchronize()
    assert_bitwise(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_another_device_than_the_current() -> None:
    inputs = draw(2, 40, 50)
    want = forward_backward(inputs, 40, 50)
    moved = tuple(x.detach().to('cuda:1').requires_grad_() for x in inputs)
    with torch.cuda.device(0):
        got = forward_backward(moved, 40, 50)
    assert_bitwise(tuple(x.to('cuda:0') for x in got), want)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_autocast_with_master_weights(dtype: torch.dtype) -> None:
    inputs = draw(2, 20, 30, dtype=torch.float32)
    with torch.autocast('cuda', dtype):
        y = attend(*inputs, 20, 30)
    grads = torch.autograd.grad(y, inputs, torch.ones_like(y))
    assert y.dtype == dtype
    assert all(grad.dtype == torch.float32 for grad in grads)
    low = tuple(x.detach().to(dtype).requires_grad_() for x in inputs)
    mixed = (low[0], low[1], inputs[2], inputs[3], low[4])
    want = forward_backward(mixed, 20, 30)
    assert_bitwise((y, *grads), (want[0], *(x.float() for x in want[1:])))


def test_activation_checkpointing() -> None:
    inputs = draw(2, 20, 30)
    y = checkpoint(attend, *inputs, 20, 30, use_reentrant=False)
    got = (y, *torch.autograd.grad(y, inputs, torch.ones_like(y)))
    assert_bitwise(got, forward_backward(inputs, 20, 30))


def test_saves_only_inputs_and_the_state() -> None:
    inputs = draw(2, 100, 167)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attend(*inputs, 100, 167)
    own = {x.data_ptr() for x in inputs}
    extra = sum(x.numel() * x.element_size() for x in saved if x.data_ptr() not in own)
    assert extra <= 2 * 2 * (32 * 32 + 32) * 4  # batch, heads, S and key mean, fp32


def test_peak_memory() -> None:
    inputs = draw(8, 200, 320)
    unit = inputs[1].numel() * inputs[1].element_size()
    forward_backward(inputs, 200, 320)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    forward_backward(inputs, 200, 320)
    # y and dy; dqk twice the size; dv, du, do; then the partial sums.
    assert torch.cuda.max_memory_allocated() - before <= 7.5 * unit


def test_offsets_beyond_2_to_the_31() -> None:
    batch, height, width, channels = 260, 200, 334, 64
    elements = batch * height * width * 2 * channels
    assert elements > 2**31
    free, _ = torch.cuda.mem_get_info()
    if free < 15 * elements:
        pytest.skip(f'needs {15 * elements / 2**30:.0f} GiB of free GPU memory, has {free / 2**30:.0f}')
    inputs = draw(batch, height, width, channels)
    results = forward_backward(inputs, height, width)
    for image in (0, batch // 2, batch - 1):
        one = tuple(x if x.dim() != 3 else x[image : image + 1] for x in inputs)
        one = tuple(x.detach().clone().requires_grad_() for x in one)
        alone = forward_backward(one, height, width)
        for index in (0, 1, 2, 5):
            assert torch.equal(results[index][image], alone[index][0]), f'result {index} of image {image}'
