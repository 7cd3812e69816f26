"""``batch_norm`` without a GPU: what it returns, running statistics, autocast, autograd, registration, mistakes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops import batch_norm, batch_norm_reference

DTYPES = pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=random) for shape in ((2, 35, 24), (24,), (24,)))
    return [t.requires_grad_() for t in ((x + 2).to(dtype), weight, bias)]


def running() -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(24), torch.ones(24), torch.tensor(3)


@DTYPES
@pytest.mark.parametrize('relu', [True, False])
@pytest.mark.parametrize('backend', ['auto', 'reference'])
def test_equals_pytorch(backend: str, relu: bool, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(dtype)
    mean, variance, batches = running()
    y = batch_norm(
        x, weight, bias, eps=1e-3, relu=relu, running=(mean, variance, batches), momentum=0.3, backend=backend
    )
    exact = torch.zeros(24).double(), torch.ones(24).double()
    doubles = weight.double(), bias.double()
    want = F.batch_norm(x.double().flatten(0, 1), *exact, *doubles, True, 0.3, 1e-3).view(x.shape)
    want = F.relu(want) if relu else want
    eps = max(torch.finfo(dtype).eps, 1e-7)  # the parameters are of 32 bits, and so are their gradients
    torch.testing.assert_close(y, want.to(dtype), rtol=4 * eps, atol=8 * eps)
    torch.testing.assert_close((mean.double(), variance.double()), exact, rtol=1e-6, atol=1e-6)
    assert batches == 4
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, weight, bias), grad)
    right = torch.autograd.grad(want, (x, weight, bias), grad.double())
    for ours, theirs in zip(got, right, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - theirs.double()).norm() <= 8 * eps * theirs.double().norm()


def test_the_reference_returns_its_statistics() -> None:
    x, weight, bias = inputs()
    _, mean, variance = batch_norm_reference(x, weight, bias)
    torch.testing.assert_close(mean, x.mean((0, 1)))
    torch.testing.assert_close(variance, x.flatten(0, 1).var(0, correction=0))


def test_under_autocast_the_dtype_is_that_of_x() -> None:
    x, weight, bias = inputs()
    with torch.autocast('cpu', torch.bfloat16):
        assert batch_norm(x, weight, bias).dtype == torch.float32
        y = batch_norm(x.bfloat16(), weight, bias)
    assert y.dtype == torch.bfloat16
    assert [grad.dtype for grad in torch.autograd.grad(y.sum(), (x, weight, bias))] == [torch.float32] * 3


def test_running_statistics_know_that_they_have_been_written_to() -> None:
    x, weight, bias = inputs()
    buffers = running()
    before = [t._version for t in buffers]
    batch_norm(x, weight, bias, running=buffers)
    assert all(t._version > version for t, version in zip(buffers, before, strict=True))


def test_is_a_registered_op() -> None:
    x, weight, bias = (t.detach() for t in inputs())
    for buffers in (running(), (None, None, None)):
        torch.library.opcheck(torch.ops.mila_mm.batch_norm_forward, (x, weight, bias, *buffers, 0.1, 1e-5, True))
    _, statistics = torch.ops.mila_mm.batch_norm_forward(x, weight, bias, None, None, None, 0.1, 1e-5, True)
    torch.library.opcheck(torch.ops.mila_mm.batch_norm_backward, (x, x, weight, bias, statistics, True))


def test_compiles_as_plain_operators() -> None:
    x, weight, bias = inputs()
    compiled = torch.compile(lambda x: batch_norm(x, weight, bias, relu=True), backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(x), batch_norm(x, weight, bias, relu=True))


def test_mistakes_are_named() -> None:
    x, weight, bias = inputs()
    with pytest.raises(ValueError, match=r'expected weight of shape \(24,\), got \(23,\)'):
        batch_norm(x, weight[:23], bias)
    with pytest.raises(ValueError, match=r'expected x of shape \(B, N, C\)'):
        batch_norm(x[0], weight, bias)
    with pytest.raises(ValueError, match='expected more than one value a channel'):
        batch_norm(x[:1, :1], weight, bias)
    with pytest.raises(ValueError, match=r'expected running\[1\] of shape \(24,\), got \(2,\)'):
        batch_norm(x, weight, bias, running=(torch.zeros(24), torch.ones(2), torch.tensor(0)))
    with pytest.raises(ValueError, match=r'expected running\[2\] to be one int64'):
        batch_norm(x, weight, bias, running=(torch.zeros(24), torch.ones(24), torch.tensor(0.0)))
    with pytest.raises(ValueError, match='expected backend'):
        batch_norm(x, weight, bias, backend='cuda')
    with pytest.raises(RuntimeError, match='cannot run here: expected CUDA tensors'):
        batch_norm(x, weight, bias, backend='triton')
    with pytest.raises(RuntimeError, match='expected one differentiation'):
        (grad,) = torch.autograd.grad(batch_norm(x, weight, bias).square().sum(), x, create_graph=True)
        grad.sum().backward()


@pytest.mark.parametrize('backward', [False, True])
def test_kernels_that_are_bound_start_by_the_addresses_of_their_tensors(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip('triton')
    from mila_mm.ops.batch_norm import launch

    started: list[tuple[str, list[int]]] = []

    class Kernel:
        bound = True

        def at(self, stream: int, *addresses: int) -> None:
            started.append(('address', list(addresses)))

        def __call__(self, *tensors: Tensor) -> None:
            started.append(('tensor', [x.data_ptr() for x in tensors]))

    monkeypatch.setattr(launch.kept, 'current_stream', lambda: 0)
    plan = launch.Plan(70, 32, (32, 32) if backward else (32,), relu=True)
    plan = plan.backward() if backward else plan.forward(0.1, 1e-5, True)
    plan.launches = [(Kernel(), places) for _, places in plan.launches]
    tensors = [torch.zeros(64) for _ in range(9)]
    plan.run(*tensors)
    monkeypatch.setattr(Kernel, 'bound', False)
    plan.run(*tensors)
    assert [way for way, _ in started] == ['address'] * 3 + ['tensor'] * 3
    assert [places for _, places in started[:3]] == [places for _, places in started[3:]]
    monkeypatch.setattr(Kernel, 'bound', True)
    plan.run(tensors[0][1:], *tensors[1:])
    assert [way for way, _ in started[6:]] == ['tensor'] * 3
