"""The kernels of ``batch_norm`` against fp64 autograd of PyTorch's BatchNorm, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip('triton')

pytestmark = [pytest.mark.usefixtures('poisoned_memory'), pytest.mark.interpreted]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize('dtype', [FP32, FP16, BF16], ids=['fp32', 'fp16', 'bf16'])
# Root mean square error of y and of gradients, relative; the interpreter truncates to bf16.
LIMITS = {FP32: (1e-6, 2e-6), FP16: (5e-4, 1e-3), BF16: (6e-3, 1.2e-2)}
EPS, MOMENTUM = 1e-5, 0.3


def draw(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """x, away from zero, weight, bias and the gradient of y."""
    random = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=random) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=random) for _ in range(2))
    return [(1.5 * x + 3).to(dtype), weight, bias, grad.to(dtype)]


def run(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor, relu: bool = True) -> tuple[Tensor, ...]:
    """y, the gradients of x, weight and bias, and the running statistics after a step."""
    from mila_mm.ops.batch_norm import launch

    running = torch.full_like(weight, 0.5), torch.full_like(weight, 2.0), torch.tensor(7)
    y, statistics = launch.batch_norm_forward(x, weight, bias, running, MOMENTUM, EPS, relu)
    grads = launch.batch_norm_backward(grad_y, x, weight, bias, statistics, relu)
    for got, source in zip((y, *grads), (grad_y, x, weight, bias), strict=True):
        assert got.dtype == source.dtype and got.shape == source.shape and got.is_contiguous()
    assert running[2] == 8
    return y, *grads, *running[:2]


def exact(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor, relu: bool = True) -> tuple[Tensor, ...]:
    """The same from PyTorch's module in fp64."""
    norm = nn.BatchNorm1d(x.shape[-1], EPS, MOMENTUM).double()
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
        norm.running_mean.fill_(0.5)
        norm.running_var.fill_(2.0)
    leaf = x.double().requires_grad_()
    y = norm(leaf.flatten(0, 1)).view(x.shape)
    y = F.relu(y) if relu else y
    grads = torch.autograd.grad(y, [leaf, norm.weight, norm.bias], grad_y.double())
    return y.detach(), *grads, norm.running_mean, norm.running_var


def check(got: tuple[Tensor, ...], want: tuple[Tensor, ...], inputs: list[Tensor]) -> None:
    """Hold all to fp64.

    The gradient of x is a difference, which all but vanishes for two values a channel: its error is measured by what it
    is a difference of.
    """
    x, weight, _, grad = (t.double() for t in inputs)
    scale = weight * (x.var((0, 1), correction=0) + EPS).rsqrt()
    for index, (one, right) in enumerate(zip(got, want, strict=True)):
        size = max(right.norm(), (scale * grad).norm()) if index == 1 else right.norm()
        error = ((one.double() - right).norm() / size).item()
        limit = LIMITS[inputs[0].dtype][index > 0] if index < 4 else 1e-6
        assert error <= limit, (index, error, limit)


@DTYPES
@pytest.mark.parametrize(
    ('shape', 'relu'),
    [
        ((2, 77, 64), True),
        ((2, 77, 64), False),
        ((3, 1, 96), True),
        ((1, 2, 32), True),
        ((1, 35, 24), False),
        ((2, 150, 20), True),
        ((1, 9, 200), True),
    ],
    ids=str,
)
def test_equals_fp64(shape: tuple[int, int, int], relu: bool, dtype: torch.dtype) -> None:
    inputs = draw(shape, dtype)
    got, again = run(*inputs, relu), run(*inputs, relu)
    assert all(torch.equal(one, twice) for one, twice in zip(got, again, strict=True))
    check(got, exact(*inputs, relu), inputs)


def test_in_several_splits_and_steps_of_the_second_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    from mila_mm.ops.batch_norm import launch
    from mila_mm.ops.triton import configs

    monkeypatch.setattr(launch, 'ROWS', configs.Launch(4, 64, 4))
    monkeypatch.setattr(launch, 'MOMENTS', configs.Launch(4, 16, 4))
    monkeypatch.setattr(configs, 'COLUMN_REDUCE', configs.Launch(4, 16, 4))
    launch.forget_plans()
    inputs = draw((3, 51, 72), FP32)
    check(run(*inputs), exact(*inputs), inputs)
    launch.forget_plans()


def test_a_mean_far_from_zero_costs_the_variance_nothing() -> None:
    inputs = draw((2, 300, 32), FP32)
    inputs[0] = (inputs[0] - 3) * 0.01 + torch.tensor([1e3, 0.0]).repeat(16)
    y, *_, variance = run(*inputs, relu=False)
    want = exact(*inputs, relu=False)
    torch.testing.assert_close(variance.double(), want[-1], rtol=1e-6, atol=0)
    assert (y - want[0]).norm() <= 1e-2 * want[0].norm()  # x itself has five digits less there


@DTYPES
def test_a_constant_channel(dtype: torch.dtype) -> None:
    """Its variance is 0 to the last bit, and y is the bias."""
    inputs = draw((2, 333, 32), dtype)
    inputs[0][..., 5] = 3.3
    y, grad_x, grad_weight, *_, variance = run(*inputs, relu=False)
    assert torch.equal(y[..., 5], inputs[2][5].to(dtype).expand(2, 333))
    assert variance[5] == (1 - torch.tensor(MOMENTUM)) * 2.0 and grad_weight[5] == 0
    want = exact(*inputs, relu=False)[1][..., 5]
    assert (grad_x[..., 5].double() - want).norm() <= LIMITS[dtype][1] * want.norm()


def as_second_half(x: Tensor) -> Tensor:
    return torch.cat((x, x), -1).chunk(2, -1)[1]


def as_channels_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def as_expanded(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


@pytest.mark.parametrize('layout', [as_second_half, as_channels_first, as_expanded])
@pytest.mark.parametrize('index', [0, 3], ids=['x', 'grad_y'])
def test_layouts_give_the_same_bits(index: int, layout: Callable[[Tensor], Tensor]) -> None:
    inputs = draw((2, 70, 64), FP16)
    inputs[index] = layout(inputs[index])
    got = run(*inputs)
    inputs[index] = inputs[index].contiguous()
    assert all(torch.equal(a, b) for a, b in zip(run(*inputs), got, strict=True))


def test_nan_stays_in_its_channel() -> None:
    inputs = draw((2, 70, 32), FP32)
    inputs[0][1, 3, 7] = float('nan')
    y, grad_x, grad_weight, *_ = run(*inputs)
    assert y.isnan().all((0, 1)).nonzero().flatten().tolist() == [7] and not y[..., :7].isnan().any()
    assert grad_x.isnan().any((0, 1)).nonzero().flatten().tolist() == [7]
    assert grad_weight.isnan().nonzero().flatten().tolist() == [7]


def test_without_running_statistics() -> None:
    from mila_mm.ops.batch_norm import launch

    x, weight, bias, grad = draw((2, 33, 32), FP32)
    y, statistics = launch.batch_norm_forward(x, weight, bias, None, MOMENTUM, EPS, True)
    assert torch.equal(y, run(x, weight, bias, grad)[0])
    variance, mean = torch.var_mean(x.double(), (0, 1), correction=0)
    want = torch.stack((mean, (variance + EPS).rsqrt(), variance))
    torch.testing.assert_close(statistics.double(), want, rtol=1e-6, atol=1e-6)
