"""The choice of a backend, without a GPU: compiled, where something is missing, and what the caches keep."""

from __future__ import annotations

import shutil
import sysconfig
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mila_mm.nn import layers
from mila_mm.ops import clear_rope_cache, mila_attention, rope_tables
from mila_mm.ops.attention import launch
from mila_mm.ops.attention import op as attention
from mila_mm.ops.rope import rope_grid
from mila_mm.ops.stencil import op as stencil
from mila_mm.ops.triton import capability

triton = pytest.importorskip('triton')


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What the predicates have found out is forgotten before and after."""
    asked = (
        capability._why_no_triton,
        capability._why_no_compiler,
        capability._why_not_device,
        capability.warn_of_what_is_missing,
    )
    for predicate in asked:
        predicate.cache_clear()
    yield
    for predicate in asked:
        predicate.cache_clear()


@pytest.fixture
def gpu(forgetful: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that can run the kernels, as far as the predicates ask."""
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (9, 0))
    for name in ('CC', 'CPATH', 'C_INCLUDE_PATH'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, 'which', {'gcc': '/usr/bin/gcc'}.get)
    monkeypatch.setattr(sysconfig, 'get_paths', lambda scheme: {'include': str(tmp_path)})
    (tmp_path / 'Python.h').touch()


CUDA = torch.device('cuda', 0)


def on_cuda(x: Tensor) -> SimpleNamespace:
    """What the predicates see of a CUDA tensor."""
    return SimpleNamespace(device=CUDA, is_cuda=True, dtype=x.dtype, shape=x.shape)


QK, V = on_cuda(torch.zeros(1, 4, 128)), on_cuda(torch.zeros(1, 4, 64))


def test_predicates_compile_into_one_graph() -> None:
    """As they must for ``backend='triton'`` under fullgraph: they end in a search for packages."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    def function(qk: Tensor, v: Tensor) -> Tensor:
        reasons = capability.why_not(qk, v, 2), capability.why_not_stencil(v)
        return qk + sum(reason is not None for reason in reasons)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for tokens in (4, 9, 12):
            qk, v = torch.zeros(1, tokens, 128), torch.zeros(1, tokens, 64)
            assert torch.equal(compiled(qk, v), function(qk, v))
    assert len(graphs) == 1


@pytest.mark.parametrize('set_cc', [False, True], ids=['unset', 'not there'])
def test_without_a_c_compiler_the_kernels_do_not_run(set_cc: bool, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert capability.why_not(QK, V, 2) is None and capability.why_not_stencil(V) is None
    capability._why_no_compiler.cache_clear()
    if set_cc:
        monkeypatch.setenv('CC', '/nowhere/cc')
    else:
        monkeypatch.setattr(shutil, 'which', lambda name: None)
    named = '/nowhere/cc' if set_cc else 'gcc or clang'
    expected = f'expected a C compiler for Triton ({named}), got none installed'
    assert capability.why_not(QK, V, 2) == expected and capability.why_not_stencil(V) == expected


def test_without_pythons_headers_the_kernels_do_not_run(
    gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / 'Python.h').unlink()
    assert capability.why_not(QK, V, 2) == f"expected Python's headers for Triton, got no {tmp_path / 'Python.h'}"
    capability._why_no_compiler.cache_clear()
    (tmp_path / 'Python.h').touch()
    assert capability.why_not(QK, V, 2) is None


def test_auto_warns_once_of_an_old_triton(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, '__version__', '3.2.0')
    with pytest.warns(UserWarning, match=r'expected triton >= 3.5, got 3.2.0; the slower form'):
        assert attention._kernels(QK, V, 2, (2, 2)) is not launch
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert attention._kernels(QK, V, 2, (2, 2)) is not launch
        assert not stencil._by_triton(V, 2, 2)


def test_auto_warns_of_a_missing_compiler_for_the_stencils_too(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    with pytest.warns(UserWarning, match='expected a C compiler'):
        assert not stencil._by_triton(V, 2, 2)


def test_auto_is_silent_where_nothing_is_missing(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert attention._kernels(QK, V, 2, (2, 2)) is launch and stencil._by_triton(V, 2, 2)
        for size in [(1, 65536), (65536, 1)]:
            assert attention._kernels(QK, V, 2, size) is not launch and not stencil._by_triton(V, *size)
        odd_heads = on_cuda(torch.zeros(1, 4, 20))
        assert attention._kernels(on_cuda(torch.zeros(1, 4, 40)), odd_heads, 1, (2, 2)) is not launch
        capability._why_not_device.cache_clear()
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (7, 5))
        monkeypatch.setattr(triton, '__version__', '3.2.0')
        capability._why_no_triton.cache_clear()
        assert attention._kernels(QK, V, 2, (2, 2)) is not launch, 'a newer Triton would not help an old GPU'


def test_a_larger_table_leaves_the_smaller_one_alive() -> None:
    """A captured CUDA graph goes on reading it."""
    clear_rope_cache()
    tables = [rope_tables(60, 64, 10000.0, torch.device('cpu')) for _ in range(2)]
    alive = [weakref.ref(table) for table in tables[0]]
    del tables
    larger = rope_tables(65, 64, 10000.0, torch.device('cpu'))[0]
    assert larger.shape[0] == 128 and all(table() is not None for table in alive)
    clear_rope_cache()
    assert all(table() is None for table in alive)


class Allocations(TorchDispatchMode):
    """Notes what the calling thread makes on a device: where allocations go is a matter of the thread, as this is."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.made = device, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type == self.device:
            self.made.append(str(func))
        return result


def test_cached_tables_are_not_made_in_the_pool_of_a_cuda_graph() -> None:
    """Such a pool serves the thread that warms up or captures; its memory is reused behind the cache's back."""
    clear_rope_cache()
    device = torch.device('meta')
    with Allocations('meta') as allocations:
        tables = rope_tables(7, 64, 10000.0, device)
        grid = rope_grid(3, 5, 64, 10000.0, device)
        assert all(x.device == device for x in (*tables, grid))
        assert allocations.made == []
        torch.zeros(1, device=device)
        assert len(allocations.made) == 1, 'it sees what it is there for'
    clear_rope_cache()


def test_a_capture_without_a_run_before_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_rope_cache()
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    with pytest.raises(RuntimeError, match='expected a run on a map of this size before the capture'):
        rope_tables(7, 64, 10000.0, CUDA)


def to_tf32(x: Tensor) -> Tensor:
    """Round fp32 to the 10 bits of TF32's mantissa, without subclass."""
    bits = x.detach().as_subclass(Tensor).contiguous().view(torch.int32)
    return (bits + 0x1000 & ~0x1FFF).view(torch.float32)


class Pretender(Tensor):
    """A CPU tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize('rounds', [True, False], ids=['tf32', 'fp32'])
def test_a_residual_is_not_rounded_to_tf32(rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """x + conv(x) is one convolution only where that one keeps all bits of x."""
    torch.manual_seed(0)
    conv, convolve, weights = layers.DepthwiseConv(16), F.conv2d, []

    def like_cudnn(x: Tensor, weight: Tensor, *args: object, **options: object) -> Tensor:
        weights.append(weight)
        x, weight = (to_tf32(x), to_tf32(weight)) if rounds else (x.as_subclass(Tensor), weight)
        return convolve(x, weight, *args, **options)

    x = torch.randn(2, 35, 16) * 100
    want = conv.double()(x.double(), 5, 7, residual=True)
    conv.float()
    monkeypatch.setattr(layers.F, 'conv2d', like_cudnn)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', rounds)
    with torch.no_grad():
        got = conv(x.as_subclass(Pretender), 5, 7, residual=True).as_subclass(Tensor)
        plain = x + like_cudnn(
            x.transpose(1, 2).unflatten(2, (5, 7)), conv.weight, conv.bias, padding=1, groups=16
        ).flatten(2).transpose(1, 2)
    error, allowed = ((y.double() - want).norm().item() for y in (got, plain))
    assert error <= 1.01 * allowed + 1e-5 * want.norm().item() * (not rounds)
    assert torch.equal(weights[0], conv.weight) == rounds, 'where nothing is rounded it is one convolution'


def test_an_infinite_key_leaves_other_images_alone() -> None:
    """Within an image the closed form lets an infinity of one head into others, as its docstring says."""
    torch.manual_seed(0)
    qk, v = torch.randn(2, 6, 128), torch.randn(2, 6, 64)
    clean = mila_attention(qk, v, None, None, (2, 3), 2)
    qk[0, 2, 0] = float('inf')
    y = mila_attention(qk, v, None, None, (2, 3), 2)
    assert torch.equal(y[1], clean[1]) and y[0, 2].isnan().any()
