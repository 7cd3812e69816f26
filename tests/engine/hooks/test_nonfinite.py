"""The hook that names the module a NaN or an infinity comes from."""

import pytest
import torch
from torch import nn

from mila_mm import MILA
from mila_mm.engine.hooks.nonfinite import Tracer, describe

PLACES = [
    'patch_embed.conv2.1.norm',
    'layers.0.blocks.0.attn',
    'layers.0.downsample.conv.1.conv',
    'layers.1.blocks.0.mlp.fc1',
    'norm1',
]


class Plant(torch.autograd.Function):
    """The identity, with one bad number in the forward or in the backward."""

    @staticmethod
    def forward(ctx, x, where, value):
        ctx.where, ctx.value = where, value
        x = x.contiguous().clone(memory_format=torch.contiguous_format)
        if where == 'forward':
            x.view(-1)[3] = value
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone(memory_format=torch.contiguous_format)
        if ctx.where == 'backward':
            grad.view(-1)[2] = ctx.value
        return grad, None, None


def plant(module: nn.Module, where: str, value: float) -> None:
    original = module.forward
    module.forward = lambda *args, **kwargs: Plant.apply(original(*args, **kwargs), where, value)


def trace(model: nn.Module, *inputs: torch.Tensor):
    tracer = Tracer(model)
    with tracer.watching():
        outputs = model(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(y.float().square().mean() for y in outputs)
        if tracer.found is None:
            torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), 'nothing stays behind'
    return tracer.found


def small(**options) -> MILA:
    torch.manual_seed(0)
    return MILA(dict(embed_dim=16, depths=(1, 1), num_heads=(1, 2)), out_indices=(0, 1), **options).train()


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('where', ['forward', 'backward'])
@pytest.mark.parametrize('place', PLACES)
def test_names_the_module(place, where, value):
    model = small()
    plant(model.get_submodule(place), where, value)
    found = trace(model, torch.randn(2, 3, 40, 44))
    assert found.module == place
    assert where in found.what and 'from' in str(found)
    assert 'NaN' not in found.inputs and 'mean' in found.inputs, 'statistics of finite inputs'
    assert 'NaN' in found.result or 'infinite' in found.result


@pytest.mark.parametrize('with_cp', [True, 'stage'])
@pytest.mark.parametrize('where', ['forward', 'backward'])
def test_under_activation_checkpointing(with_cp, where):
    model = small(with_cp=with_cp)
    plant(model.get_submodule('layers.1.blocks.0.attn'), where, float('nan'))
    assert trace(model, torch.randn(2, 3, 40, 44)).module.startswith('layers.1.blocks.0')


def test_a_sound_model_is_left_alone():
    model = small()
    image = torch.randn(2, 3, 40, 44)
    assert trace(model, image) is None


def test_weights_that_are_not_finite():
    model = small()
    with torch.no_grad():
        model.layers[0].blocks[0].in_proj.weight[0, 0] = float('nan')
    found = trace(model, torch.randn(2, 3, 40, 44))
    assert found.module == 'layers.0.blocks.0.in_proj' and 'weight is not finite' in found.what


def test_inputs_that_are_not_finite():
    image = torch.randn(2, 3, 40, 44)
    image[0, 0, 0, 0] = float('inf')
    found = trace(small(), image)
    assert found.module == '' and 'inputs are not finite' in found.what


class Between(nn.Module):
    """Code of its own between two modules."""

    def __init__(self, code):
        super().__init__()
        self.first, self.second, self.code = nn.Linear(4, 4), nn.Linear(4, 4), code

    def forward(self, x):
        return self.second(self.code(self.first(x)))


def test_code_between_modules_in_the_forward():
    found = trace(nn.Sequential(nn.Linear(4, 4), Between(lambda x: x / 0)), torch.randn(3, 4))
    assert found.module == '1' and 'in its own code before it calls 1.second' in found.what


def test_code_between_modules_in_the_backward():
    # sqrt has an infinite slope at 0, where its value is finite
    found = trace(nn.Sequential(nn.Linear(4, 4), Between(lambda x: (x * 0).sqrt())), torch.randn(3, 4))
    assert found.module == '1' and 'behind 1.first' in found.what and 'in the backward' in found.what


def test_describe_tells_what_is_wrong():
    text = describe([torch.tensor([1.0, float('nan'), float('-inf'), 3.0]), torch.zeros(2, 3, dtype=torch.bfloat16)])
    assert text == (
        '4 float32, 1 NaN and 1 infinite of 4, from 1 to 3, mean 2, std 1; 2x3 bfloat16, from 0 to 0, mean 0, std 0'
    )
    assert describe(torch.tensor(float('nan'))) == 'scalar float32, 1 NaN and 0 infinite of 1'
