"""The convolutions of a downsampling as one node: the numbers and gradients of the modules, and when not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mila_mm.nn import down_node, inspection
from mila_mm.nn.layers import Downsample
from mila_mm.nn.step_weights import CastConvolutions


def node_pass(module, dtype=torch.float32):
    """What a pass in ``dtype`` hands to a downsampling."""
    pairs = [(layer.conv.weight, layer.conv.bias) for layer in module.conv]
    return CastConvolutions([tuple(p.detach().to(dtype) for p in pair) for pair in pairs], pairs)


@pytest.fixture
def taken(monkeypatch):
    """Let the node be taken without a GPU; how often it was, as a list that grows."""
    called = []
    original = down_node.run
    monkeypatch.setattr(down_node, 'by_triton', lambda *a: True)
    monkeypatch.setattr(down_node, 'run', lambda *a: called.append(1) or original(*a))
    return called


def make(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    module = Downsample(4, norm)
    if norm is nn.BatchNorm2d:
        nn.init.normal_(module.conv[2].norm.weight, 1, 0.3)
    return module


def step(module, x, size, recompute, params):
    """The result and all gradients, from a loss with fixed random weights."""
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y, height, width = module(x, *size, recompute, **({} if params is None else {'params': params}))
    assert y.shape[1] == height * width
    (y.double() * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return y, x.grad, *(p.grad for p in module.parameters())


@pytest.mark.parametrize('recompute', [False, True], ids=['', 'checkpointed'])
@pytest.mark.parametrize('size', [(6, 8), (5, 8), (4, 7), (3, 3), (1, 1)], ids=str)
def test_equals_the_modules(size, recompute, taken):
    module = make().double()  # a bias before a norm has no gradient but rounding
    x = torch.randn(3, size[0] * size[1], 4, generator=torch.Generator().manual_seed(1)).double()
    want = step(module, x, size, recompute, None)
    assert not taken
    got = step(module, x, size, recompute, node_pass(module, torch.float64))
    assert len(taken) == 1 + recompute
    scale = max(value.abs().max() for value in want).item()
    for value, expected in zip(got, want, strict=True):
        assert value.dtype == expected.dtype and value.stride() == expected.stride()
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10 * scale)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_in_16_bits(dtype):
    """Every gradient is near fp64's, and in the dtype of its parameter."""
    module = make()
    low = node_pass(module, dtype)
    params = [p for pair in low.params for p in pair]
    random = torch.Generator().manual_seed(1)
    x = torch.randn(2, 30, 4, generator=random).to(dtype).requires_grad_()
    y = down_node.run(x, (*low.values[0], *low.values[2]), (5, 6), tuple(params))
    grad = torch.randn(y.shape, generator=random).to(dtype)
    got = torch.autograd.grad(y, [x, *params], grad)
    leaves = [x.detach().double().requires_grad_()]
    leaves += [v.double().requires_grad_() for pair in low.values for v in pair]
    image = leaves[0].transpose(1, 2).unflatten(2, (5, 6))
    image = F.relu(F.conv2d(image, *leaves[1:3]))
    image = F.relu(F.conv2d(image, *leaves[3:5], stride=2, padding=1, groups=32))
    exact = F.conv2d(image, *leaves[5:]).flatten(2).transpose(1, 2)
    assert (y.double() - exact).norm() <= 2e-2 * exact.norm()
    want = torch.autograd.grad(exact, leaves, grad.double())
    for value, expected, source in zip(got, want, [x, *params], strict=True):
        assert value.dtype == source.dtype
        assert (value.double() - expected).norm() <= 5e-2 * expected.norm()


def test_without_gradients(taken):
    module, x = make(), torch.randn(1, 12, 4)
    with torch.no_grad():
        torch.testing.assert_close(module(x, 3, 4, params=node_pass(module))[0], module(x, 3, 4)[0])
    assert len(taken) == 1


def test_frozen_parameters_get_no_gradient(taken):
    module, x = make(), torch.randn(1, 12, 4)
    for p in module.conv[1].parameters():
        p.requires_grad_(False)
    module(x, 3, 4, params=node_pass(module))[0].square().sum().backward()
    assert [p.grad is None for p in module.conv.parameters()] == [not p.requires_grad for p in module.parameters()]
    assert len(taken) == 1


def test_a_norm_that_is_folded_and_weights_in_channels_last(taken):
    """In eval mode the norm goes into the last convolution's weights, which then are not those that were cast."""
    module = make().to(memory_format=torch.channels_last)
    x = torch.randn(2, 12, 4)
    got = step(module, x, (3, 4), False, node_pass(module))
    assert len(taken) == 1
    for value, p in zip(got[2:], module.parameters(), strict=True):
        assert value.shape == p.shape and value.stride() == p.stride()
    module.eval()
    torch.testing.assert_close(module(x, 3, 4, params=node_pass(module))[0], module(x, 3, 4)[0])
    assert len(taken) == 1


def test_a_second_differentiation_is_refused(taken):
    module, x = make(lambda dim: nn.Identity()), torch.randn(1, 4, 4, requires_grad=True)
    y = module(x, 2, 2, params=node_pass(module))[0]
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='expected one differentiation, got a second'):
        grad.sum().backward()


REPLACED = {
    '5x5': (1, dict(kernel_size=5, padding=2, stride=2, groups=32)),
    'full': (1, dict(kernel_size=3, padding=1, stride=2)),
    'dilated': (1, dict(kernel_size=3, padding=2, stride=2, dilation=2, groups=32)),
    'mirrored': (1, dict(kernel_size=3, padding=1, stride=2, groups=32, padding_mode='reflect')),
    'dense': (1, dict(kernel_size=3, padding=1, groups=32)),
    'strided 1x1': (0, dict(in_channels=4, kernel_size=1, stride=2)),
}


@pytest.mark.parametrize(('place', 'options'), REPLACED.values(), ids=REPLACED)
def test_another_convolution_is_called(place, options, taken, monkeypatch):
    """Nor does the pass that fuses what lies between the products take it for its own."""
    from mila_mm.nn import layers

    module = make()
    module.conv[place].conv = nn.Conv2d(**{'in_channels': 32, 'out_channels': 32, **options})
    x = torch.randn(1, 64, 4)
    want = module(x, 8, 8)[0]
    if place:
        monkeypatch.setattr(layers, 'by_triton', lambda *_: True)
    torch.testing.assert_close(module(x, 8, 8, params=node_pass(module))[0], want)
    assert not taken


def test_another_number_of_convolutions_is_called(taken):
    module, x = make(), torch.randn(1, 12, 4)
    module.conv.append(type(module.conv[2])(8, 8, 1, bias=True))
    pairs = [(layer.conv.weight, layer.conv.bias) for layer in module.conv]
    assert not down_node.fits(module.conv, x, CastConvolutions(pairs, pairs)) and not taken


@pytest.mark.parametrize('change', [lambda w: w.double(), lambda w: w.repeat(1, 2, 1, 1)[:, ::2]], ids=['fp64', 'gaps'])
def test_weights_of_another_dtype_or_layout_are_not_cast_together(change):
    module = make()
    assert inspection.layers_of(module, Downsample) is not None
    conv = module.conv[0].conv
    conv.weight = nn.Parameter(change(conv.weight.detach()))
    assert inspection.layers_of(module, Downsample) is None


def test_a_second_differentiation_is_refused_behind_a_frozen_stencil(taken):
    """Nor may it go unseen where neither the input nor the stencil needs gradients."""
    module, x = make(lambda dim: nn.Identity()), torch.randn(1, 4, 4)
    for p in module.conv[1].parameters():
        p.requires_grad_(False)
    y = module(x, 2, 2, params=node_pass(module))[0]
    weights = [module.conv[0].conv.weight, module.conv[2].conv.weight]
    grads = torch.autograd.grad(y.sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match='expected one differentiation, got a second'):
        sum(grad.square().sum() for grad in grads).backward()
