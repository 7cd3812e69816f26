import copy
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from mmcv.ops import SyncBatchNorm


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('stats_mode', ['default', 'N'])
@pytest.mark.parametrize('shape', [(3, 4, 5, 6), (8, 4, 1), (1, 4, 3)])
def test_one_process_equals_batch_norm(shape: tuple[int, ...], stats_mode: str) -> None:
    layer = SyncBatchNorm(4, momentum=0.3, stats_mode=stats_mode)
    reference = copy.deepcopy(layer.state_dict())
    torch.nn.init.uniform_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    given = torch.randn(shape, requires_grad=True)
    mean, var = reference['running_mean'], reference['running_var']
    expected = torch.nn.functional.batch_norm(given, mean, var, layer.weight, layer.bias, True, 0.3, layer.eps)
    got = layer(given)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)
    wanted = (given, layer.weight, layer.bias)
    direction = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, wanted, direction), torch.autograd.grad(expected, wanted, direction), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_empty_batch_leaves_the_statistics() -> None:
    layer = SyncBatchNorm(4, stats_mode='N')
    given = torch.zeros(0, 4, 5, 5, requires_grad=True)
    layer(given).sum().backward()
    assert layer.running_mean.abs().sum() == 0 and (layer.running_var == 1).all()


def test_half_precision() -> None:
    layer, given = SyncBatchNorm(4), torch.randn(3, 4, 5)
    half = layer(given.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), layer(given), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('processes', [2, 3])
def test_each_process_of_a_group_has_its_part_of_the_whole_batch(processes: int, stand_in: ModuleType) -> None:
    """What mmcv's Python does between the pieces (means over the processes) is done here by hand."""
    layer = torch.nn.BatchNorm1d(4, momentum=0.3, dtype=torch.float32)
    torch.nn.init.uniform_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    whole = (torch.randn(2 * processes, 4, 3) * 2 + 1).requires_grad_()
    direction = torch.randn_like(whole)
    expected = layer(whole)
    expected.backward(direction)
    parts, directions = whole.detach().chunk(processes), direction.chunk(processes)

    def mean_of(function, tensors) -> torch.Tensor:
        results = [torch.empty(4) for _ in range(processes)]
        for result, given in zip(results, tensors, strict=True):
            function(*given, result)
        return torch.stack(results).mean(0)

    mean = mean_of(stand_in.sync_bn_forward_mean, [(part,) for part in parts])
    var = mean_of(stand_in.sync_bn_forward_var, [(part, mean) for part in parts])
    weight, bias = layer.weight.detach(), layer.bias.detach()
    norms, gradients = [], []
    for part, grad, wanted in zip(parts, directions, expected.detach().chunk(processes), strict=True):
        running, norm, std, out = (torch.zeros(4), torch.ones(4)), torch.empty_like(part), torch.empty(4), part.clone()
        stand_in.sync_bn_forward_output(
            part, mean, var, weight, bias, *running, norm, std, out, eps=layer.eps, momentum=0.3, group_size=processes
        )
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(running, (layer.running_mean, layer.running_var))
        norms.append(norm)
        gradients.append([torch.empty(4), torch.empty(4)])
        stand_in.sync_bn_backward_param(grad, norm, *gradients[-1])
    by_weight, by_bias = (torch.stack(side) for side in zip(*gradients, strict=True))
    torch.testing.assert_close((by_weight.sum(0), by_bias.sum(0)), (layer.weight.grad, layer.bias.grad))
    for norm, grad, wanted in zip(norms, directions, whole.grad.chunk(processes), strict=True):
        got = torch.empty_like(grad)
        stand_in.sync_bn_backward_data(grad, weight, by_weight.mean(0), by_bias.mean(0), norm, std, got)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
