import copy
from collections.abc import Iterator

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
