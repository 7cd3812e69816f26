"""BatchNorm with its ReLU as one op: the numbers, gradients and running statistics of the modules, and when not."""

import copy

import pytest
import torch
from torch import nn

from mila_mm.nn import batch_norm
from mila_mm.nn.layers import ConvLayer, Downsample, Stem
from mila_mm.nn.step_weights import CastConvolutions
from mila_mm.nn.trunk import MILATrunk


@pytest.fixture
def taken(monkeypatch):
    """Let the op be taken without a GPU; how often it was, as a list that grows."""
    called = []
    original = batch_norm.run
    monkeypatch.setattr(batch_norm, '_by_triton', lambda x: True)
    monkeypatch.setattr(batch_norm, 'run', lambda *args: called.append(1) or original(*args))
    return called


def layer(act=True, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    module = ConvLayer(3, 8, 3, norm_layer=norm, act=act)
    if isinstance(module.norm, nn.BatchNorm2d) and module.norm.affine:
        nn.init.normal_(module.norm.weight, 1, 0.5)
        nn.init.normal_(module.norm.bias)
    return module.to(memory_format=torch.channels_last)


def image(*shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 2
    return x.contiguous(memory_format=torch.channels_last)


def given(module):
    return module.conv.weight, module.conv.bias


def step(module, x, *args):
    """The result, all gradients and all buffers after a step with fixed random weights."""
    x = x.clone().requires_grad_()
    y = module(x, *args)
    y = y[0] if isinstance(y, tuple) else y
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()


def close(got, want, rtol=1e-4):
    for one, right in zip(got, want, strict=True):
        assert one.dtype == right.dtype and one.shape == right.shape
        torch.testing.assert_close(one, right, rtol=rtol, atol=rtol * max(0.1, right.abs().max().item()))


@pytest.mark.parametrize('act', [True, False])
@pytest.mark.parametrize('size', [(2, 5, 7), (3, 1, 1), (1, 1, 2), (1, 9, 4)], ids=str)
def test_equals_the_modules(size, act, taken):
    module = layer(act)
    x = image(size[0], 3, *size[1:])
    want = step(copy.deepcopy(module), x)
    assert not taken
    close(step(module, x, given(module)), want)
    assert len(taken) == 1


def test_running_statistics_of_several_steps_and_momenta(taken):
    module, plain = layer(), layer()
    for index, momentum in enumerate((0.1, 0.5, 1.0, 0.0)):
        x = image(2, 3, 4, 5) * (index + 1)
        for each, args in ((module, [given(module)]), (plain, [])):
            each.norm.momentum = momentum
            each(x, *args)
        close(module.norm.buffers(), plain.norm.buffers(), 1e-6)
    assert len(taken) == 4 and module.norm.num_batches_tracked == 4


def test_a_recomputed_layer_counts_twice_as_pytorch_has_it(taken):
    from torch.utils.checkpoint import checkpoint

    module, plain = layer(), layer()
    for each, args in ((module, [given(module)]), (plain, [])):
        x = image(2, 3, 4, 5).requires_grad_()
        checkpoint(each, x, *args, use_reentrant=False).sum().backward()
    assert len(taken) == 2 and module.norm.num_batches_tracked == plain.norm.num_batches_tracked == 2
    close(module.norm.buffers(), plain.norm.buffers(), 1e-6)


CHANGES = {
    'eval': lambda layer: layer.norm.eval(),
    'momentum None': lambda layer: setattr(layer.norm, 'momentum', None),
    'hook': lambda layer: layer.norm.register_forward_hook(lambda *_: None),
    'backward hook': lambda layer: layer.norm.register_full_backward_hook(lambda *_: None),
    'own forward': lambda layer: setattr(layer.norm, 'forward', type(layer.norm).forward.__get__(layer.norm)),
    'no affine': lambda layer: setattr(layer, 'norm', nn.BatchNorm2d(8, affine=False)),
    'no running statistics': lambda layer: setattr(layer, 'norm', nn.BatchNorm2d(8, track_running_stats=False)),
    'another norm': lambda layer: setattr(layer, 'norm', nn.GroupNorm(2, 8)),
    'a subclass': lambda layer: setattr(layer, 'norm', type('Mine', (nn.BatchNorm2d,), {})(8)),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_what_the_kernels_do_not_know_is_called(change, taken):
    module = layer(act=False)  # PyTorch refuses the ReLU, which is in place, behind a backward hook
    change(module)
    x, plain = image(2, 3, 4, 5), copy.deepcopy(module)
    close(step(module, x, given(module)), step(plain, x))
    assert not taken


def test_sync_batch_norm_is_called(taken):
    module = nn.SyncBatchNorm.convert_sync_batchnorm(layer())
    assert not batch_norm.fits(module.norm, image(2, 8, 4, 5))


def test_an_image_that_is_not_channels_last_goes_to_the_module(taken):
    norm = layer().norm
    assert batch_norm.fits(norm, image(2, 8, 4, 5)) and not batch_norm.fits(norm, image(2, 8, 4, 5).contiguous())
    assert not batch_norm.fits(norm.double(), image(2, 8, 4, 5))


def test_one_value_a_channel_is_refused_as_by_pytorch(taken):
    module = layer()
    with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
        module(image(1, 3, 1, 1), given(module))
    assert not taken and module.norm.num_batches_tracked == 1  # PyTorch counts before it refuses


def test_frozen_parameters_get_no_gradient(taken):
    module = layer()
    module.norm.weight.requires_grad_(False)
    module(image(2, 3, 4, 5), given(module)).sum().backward()
    assert module.norm.weight.grad is None and module.norm.bias.grad is not None and len(taken) == 1


def test_a_second_differentiation_is_refused(taken):
    module, x = layer(), image(2, 3, 4, 5).requires_grad_()
    (grad,) = torch.autograd.grad(module(x, given(module)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='expected one differentiation, got a second'):
        grad.sum().backward()


def cast(module, dtype):
    """What a pass in ``dtype`` hands to a stem or a downsampling."""
    pairs = [given(each) for each in module.modules() if isinstance(each, ConvLayer)]
    values = [tuple(None if p is None else p.detach().to(dtype) for p in pair) for pair in pairs]
    return CastConvolutions(values, pairs)


def test_the_norms_of_a_stem(taken):
    torch.manual_seed(0)
    module = Stem(3, 8, nn.BatchNorm2d)
    want = step(copy.deepcopy(module), image(2, 3, 33, 30))
    close(step(module, image(2, 3, 33, 30), cast(module, torch.float32).with_gradients()), want, 1e-3)
    assert len(taken) == 5


@pytest.mark.parametrize('recompute', [False, True], ids=['', 'checkpointed'])
def test_the_norm_of_a_downsampling_sees_a_batch_once(recompute, taken, monkeypatch):
    from mila_mm.nn import down_node

    monkeypatch.setattr(down_node, 'by_triton', lambda *_: True)
    torch.manual_seed(0)
    module = Downsample(4, nn.BatchNorm2d)
    x = torch.randn(2, 30, 4)
    want = step(copy.deepcopy(module), x, 5, 6, recompute)
    close(step(module, x, 5, 6, recompute, cast(module, torch.float32)), want, 1e-3)
    assert len(taken) == 1


@pytest.mark.parametrize('with_cp', [False, True, 'stage'], ids=str)
def test_a_whole_backbone(with_cp, taken):
    """Under autocast as on a GPU: every norm of stem and downsamplings, state-dict names as they were."""
    arch = {'embed_dim': 16, 'depths': (1, 1, 1, 1), 'num_heads': (1, 2, 4, 8)}
    torch.manual_seed(0)
    model = MILATrunk(arch, fused=True, with_cp=with_cp)
    plain = copy.deepcopy(model)
    x = torch.randn(2, 3, 64, 80)

    def train(model):
        with torch.autocast('cpu', torch.bfloat16):
            maps = model(x)
        torch.autograd.backward(maps, [torch.ones_like(y) for y in maps])
        return [*maps, *(p.grad for name, p in model.named_parameters() if 'norm' in name)]

    got = train(model)
    assert len(taken) == 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_norm, '_by_triton', lambda x: False)
        want = train(plain)
    assert len(taken) == 8 and list(model.state_dict()) == list(plain.state_dict())
    close(model.buffers(), plain.buffers(), 2e-2)
    for one, right in zip(got, want, strict=True):
        assert (one - right).norm() <= 0.1 * right.norm().clamp(min=1e-3)
    model.eval()(x)
    assert len(taken) == 8
