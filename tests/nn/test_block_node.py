"""Blocks as one node each, on weights cast once a pass: the numbers and gradients of the modules, and when not."""

import copy
import logging
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from mila_mm import MILA
from mila_mm.nn import block_node, fast_path, inspection
from mila_mm.nn.classifier import MILAClassifier
from mila_mm.nn.layers import DepthwiseConv

SMALL = dict(arch=dict(embed_dim=16, depths=(1, 2), num_heads=(1, 2)), out_indices=(0, 1))
LOW = [torch.bfloat16, torch.float16]


def pair(dtype=torch.float32, **options):
    """A model that runs module by module, and the same whose blocks are nodes."""
    torch.manual_seed(0)
    plain = MILA(**SMALL, fused=False, **options).to(dtype)
    for name, p in plain.named_parameters():
        if p.dim() == 1:  # norms of 1 and biases of 0 would hide what belongs to which
            nn.init.normal_(p, 1.0 if 'norm' in name and name.endswith('weight') else 0.0, 0.3)
    twin = MILA(**SMALL, fused=True, **options).to(dtype)
    twin.load_state_dict(plain.state_dict())
    return plain, twin


def image(dtype=torch.float32, size=(2, 3, 45, 70)):
    return torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(model, x, low=None):
    """Maps, gradient of the image and gradients of the parameters, from a loss with fixed random weights."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    with nullcontext() if low is None else torch.autocast('cpu', low):
        maps = model(x)
    fixed = torch.Generator().manual_seed(2)
    sum((m.double() * torch.randn(m.shape, generator=fixed)).sum() for m in maps).backward()
    return maps, {'image': x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def assert_equal(one, other, rtol):
    (maps, grads), (expected_maps, expected_grads) = one, other
    torch.testing.assert_close(maps, expected_maps, rtol=rtol, atol=rtol)
    # Where a norm follows, a bias has no gradient but rounding: what counts is small beside the gradients around it.
    scale = max(grad.abs().max().item() for grad in expected_grads.values() if grad is not None)
    for name, grad in expected_grads.items():
        assert (grad is None) == (grads[name] is None), name
        if grad is not None:
            assert grads[name].dtype == grad.dtype and grads[name].stride() == grad.stride(), name
            limit = rtol * (grad.abs().max().item() + 5e-3 * scale)
            torch.testing.assert_close(grads[name], grad, rtol=0, atol=limit, msg=lambda m, n=name: f'{n}: {m}')


def nodes(monkeypatch):
    """How many blocks have run as nodes, as a list that grows."""
    called = []
    original = block_node.run
    monkeypatch.setattr(block_node, 'run', lambda *a: called.append(1) or original(*a))
    return called


@pytest.mark.parametrize('with_cp', [False, 'block', 'stage'], ids=str)
@pytest.mark.parametrize(('dtype', 'rtol'), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=['fp64', 'fp32'])
def test_equals_the_modules(dtype, rtol, with_cp, monkeypatch):
    plain, twin = pair(dtype, with_cp=with_cp)
    called = nodes(monkeypatch)
    assert_equal(step(twin, image(dtype)), step(plain, image(dtype)), rtol)
    assert len(called) == (6 if with_cp else 3)


@pytest.mark.parametrize('low', LOW, ids=str)
def test_in_16_bits_it_is_as_near_to_fp64_as_the_modules(low):
    plain, twin = pair()
    exact, _ = pair(torch.float64)
    maps, grads = step(exact, image(torch.float64))
    own, theirs = step(twin, image(), low), step(plain, image(), low)
    assert all(grad.dtype == torch.float32 for grad in own[1].values())
    assert [m.dtype for m in own[0]] == [m.dtype for m in theirs[0]]
    scale = max(grad.norm().item() / grad.numel() ** 0.5 for grad in grads.values())
    for i, m in enumerate(maps):
        error, other = ((each[0][i].double() - m).norm() / m.norm() for each in (own, theirs))
        assert error <= 2 * other + 1e-4
    for name, grad in grads.items():
        norm = grad.norm() + 1e-2 * scale * grad.numel() ** 0.5
        error, other = ((each[1][name].double() - grad).norm() / norm for each in (own, theirs))
        assert error <= 2 * other + 3e-3, f'{name}: {error:.1e}, the modules {other:.1e}'


@pytest.mark.parametrize('low', LOW, ids=str)
def test_maps_are_in_autocasts_dtype_whatever_runs(low, monkeypatch):
    """PyTorch's norm returns fp32 on a GPU, which what comes next would cast: the same bits."""
    plain, twin = pair()
    hooked = copy.deepcopy(twin)
    hooked.norm0.register_forward_hook(lambda *_: None)
    seen = []
    called = fast_path.NormNode.apply
    monkeypatch.setattr(fast_path.NormNode, 'apply', lambda *a: seen.append((a[0], called(*a))) or seen[-1][1])
    monkeypatch.setattr(fast_path, '_norms_in_fp32', lambda x: True)
    with torch.no_grad(), torch.autocast('cpu', low):
        maps = {name: model(image()) for name, model in (('plain', plain), ('twin', twin), ('hooked', hooked))}
    assert {m.dtype for each in maps.values() for m in each} == {low}
    assert len(seen) == 3, 'two of the one, and one of that whose other norm is hooked'
    for (x, y), norm in zip(seen, (twin.norm0, twin.norm1, hooked.norm1), strict=True):
        exact = nn.functional.layer_norm(x.float(), x.shape[-1:], norm.weight, norm.bias)
        assert exact.dtype == torch.float32 and torch.equal(y, exact.to(low))
    (_, grads), (_, expected) = step(twin, image(), low), step(plain, image(), low)
    for name in ('norm0.weight', 'norm0.bias', 'norm1.weight', 'norm1.bias'):
        torch.testing.assert_close(
            grads[name], expected[name], rtol=0.05, atol=0.05 * expected[name].abs().max().item()
        )


def test_frozen_parameters_get_no_gradient():
    plain, twin = pair(torch.float64)
    for model in (plain, twin):
        for name, p in model.named_parameters():
            p.requires_grad_('layers.0' not in name and 'in_proj' not in name and 'cpe2' not in name)
    assert_equal(step(twin, image(torch.float64)), step(plain, image(torch.float64)), 1e-9)
    plain, twin = (MILA(**SMALL, fused=fused, frozen_stages=1).double().train() for fused in (False, True))
    twin.load_state_dict(plain.state_dict())
    assert_equal(step(twin, image(torch.float64)), step(plain, image(torch.float64)), 1e-9)


REPLACED = {
    'cpe1 5x5': ('cpe1', lambda c: DepthwiseConv(c, 5)),
    'dwc 5x5': ('dwc', lambda c: DepthwiseConv(c, 5)),
    'cpe2 5x5': ('cpe2', lambda c: DepthwiseConv(c, 5)),
    'lepe 5x5': ('attn.lepe', lambda c: nn.Conv2d(c, c, 5, padding=2, groups=c)),
    'lepe full': ('attn.lepe', lambda c: nn.Conv2d(c, c, 3, padding=1)),
}


@pytest.mark.parametrize(('name', 'make'), REPLACED.values(), ids=REPLACED)
def test_a_convolution_of_another_shape_is_no_part_of_a_node(name, make):
    block = MILA(**SMALL).layers[0].blocks[0]
    assert not isinstance(inspection.parameters_of(block), str)
    block.set_submodule(name, make(block.in_proj.in_features))
    assert 'another kernel size' in inspection.parameters_of(block)


def test_a_convolution_without_padding_is_no_part_of_a_node():
    block = MILA(**SMALL).layers[0].blocks[0]
    block.cpe2.padding = (0, 0)
    assert 'another kernel size' in inspection.parameters_of(block)


@pytest.mark.parametrize('low', [None, torch.bfloat16], ids=str)
def test_without_gradients(low, monkeypatch):
    plain, twin = pair()
    called = nodes(monkeypatch)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, nullcontext() if low is None else torch.autocast('cpu', low):
            for a, b in zip(twin.eval()(image()), plain.eval()(image()), strict=True):
                assert (a - b).norm() / b.norm() < (1e-5 if low is None else 3e-2)
    assert len(called) == 6


def test_stochastic_depth(monkeypatch):
    plain, twin = pair(torch.float64, drop_path_rate=0.5)
    chosen = {2: (torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])), 1: (torch.tensor([0.0, 0.0]), torch.ones(2))}
    chosen = {i: tuple(s.double() for s in scales) for i, scales in chosen.items()}
    monkeypatch.setattr(fast_path, '_scales', lambda blocks, *_: [chosen.get(i, (None, None)) for i in range(3)])
    blocks = [block for stage in plain.layers for block in stage.blocks]
    for i, scales in chosen.items():
        turns = iter(scales)
        monkeypatch.setattr(blocks[i].drop_path, 'forward', lambda x, turns=turns: x * next(turns)[:, None, None])
    assert_equal(step(twin, image(torch.float64)), step(plain, image(torch.float64)), 1e-9)


def test_what_stochastic_depth_draws():
    blocks = list(MILA(**SMALL, drop_path_rate=0.5).train().layers[1].blocks)
    torch.manual_seed(0)
    scales = fast_path._scales(blocks, torch.empty(4000, 0), torch.bfloat16)
    for (one, other), keep in zip(scales, (0.75, 0.5), strict=True):
        for each in (one, other):
            assert each.shape == (4000,) and each.dtype == torch.bfloat16
            assert set(each.unique().tolist()) == {0.0, torch.tensor(1 / keep, dtype=torch.bfloat16).item()}
            assert abs((each > 0).float().mean().item() - keep) < 0.03
        assert (one != other).any()
    assert fast_path._scales([block.eval() for block in blocks], torch.empty(4, 0), torch.float32) == [(None, None)] * 2


@pytest.mark.parametrize('batch', [1, 2, 3, 16, 17])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_scales_of_branches_lie_where_kernels_can_be_started_by_address(batch, dtype):
    blocks = list(MILA(**SMALL, drop_path_rate=0.5).train().layers[1].blocks)
    for scales in fast_path._scales(blocks, torch.empty(batch, 0), dtype):
        assert all(each.data_ptr() % 16 == 0 and each.is_contiguous() and len(each) == batch for each in scales)


def test_weights_are_read_in_every_pass():
    _, twin = pair()
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        before = twin(image())
        for p in twin.parameters():
            p.data.copy_(p.data * 1.5)  # as averages of weights are swapped in: no version is counted up
        changed = twin(image())
        for p in twin.parameters():
            p.data = p.data / 1.5
        again = twin(image())
    assert not torch.equal(changed[0], before[0])
    assert (again[0] - before[0]).norm() / before[0].norm() < 1e-2


def test_two_passes_before_their_backwards():
    plain, twin = pair(torch.float64)
    results = []
    for model in (plain, twin):
        one, other = model(image(torch.float64)), model(image(torch.float64, (1, 3, 32, 40)))
        (sum(m.sin().sum() for m in (*one, *other))).backward()
        results.append(((), {name: p.grad for name, p in model.named_parameters()}))
    assert_equal(results[1], results[0], 1e-9)


def test_a_second_differentiation_is_refused():
    _, twin = pair(torch.float64)
    x = image(torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(twin(x)[1].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="attn_backend='reference'"):
        grad.square().sum().backward()
    model = MILA(**SMALL, attn_backend='reference', fused='auto').double()
    (grad,) = torch.autograd.grad(model(x)[1].square().sum(), x, create_graph=True)
    grad.square().sum().backward()


def test_a_second_differentiation_is_refused_where_only_a_product_is_trained():
    _, twin = pair()
    twin.requires_grad_(False)
    twin.norm1 = nn.Identity()  # so that nothing behind the block depends on its result
    weight = twin.layers[1].blocks[1].mlp.fc1.weight.requires_grad_()
    (grad,) = torch.autograd.grad(twin(image())[1].sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match='expected one differentiation, got a second'):
        grad.sum().backward()


class LowRank(nn.Module):
    """An adapter as LoRA puts one in the place of a Linear."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias
        self.down = nn.Linear(linear.in_features, 2, bias=False)

    def forward(self, x):
        return self.linear(x) + self.down(x).sum(-1, keepdim=True)


class Twice(nn.Module):
    def forward(self, weight):
        return 2 * weight


def lower(block):
    block.act_proj = LowRank(block.act_proj)


CHANGES = {
    'act_proj has hooks': lambda block: block.act_proj.register_forward_hook(lambda m, args, y: 2 * y),
    'mlp.fc1 has hooks': lambda block: block.mlp.fc1.register_full_backward_hook(lambda m, i, o: (2 * i[0],)),
    'block has hooks': lambda block: block.register_forward_hook(lambda m, args, y: 2 * y),
    'act_proj is a LowRank': lower,
    'attn.qk is a Parametrized': lambda block: parametrize.register_parametrization(block.attn.qk, 'weight', Twice()),
    'norm2 has a forward of its own': lambda block: setattr(block.norm2, 'forward', lambda x: 2 * x),
}


@pytest.mark.parametrize('reason', list(CHANGES))
@pytest.mark.parametrize('low', [None, torch.bfloat16], ids=str)
def test_a_changed_block_runs_module_by_module(reason, low, monkeypatch, caplog):
    plain, twin = pair()
    called = nodes(monkeypatch)
    for model in (plain, twin):
        torch.manual_seed(1)
        CHANGES[reason](model.layers[1].blocks[0])
    with caplog.at_level(logging.WARNING, 'mila_mm'):
        own, theirs = (step(model, image(), low) for model in (twin, plain))
        step(twin, image(), low)
    assert len(called) == 4, 'the other two blocks stay nodes'
    lines = [r.getMessage() for r in caplog.records if r.name == 'mila_mm']
    assert len(lines) == 1 and reason in lines[0]
    if low is None:
        assert_equal(own, theirs, 5e-4)
    else:
        assert all((a - b).norm() / b.norm() < 5e-2 for a, b in zip(own[0], theirs[0], strict=True))


def test_copies_and_pickles_start_afresh():
    _, twin = pair()
    expected = twin(image())
    for model in (copy.deepcopy(twin), pickle.loads(pickle.dumps(twin))):
        with torch.no_grad():
            next(model.layers[0].blocks[0].parameters()).zero_()
            assert not torch.equal(model(image())[0], expected[0])
    torch.testing.assert_close(twin(image()), expected)


def test_channels_last_weights():
    plain, twin = pair()
    twin.to(memory_format=torch.channels_last)
    x = image().contiguous(memory_format=torch.channels_last)
    with torch.autocast('cpu', torch.bfloat16):
        own, theirs = twin(x), plain(image())
    assert all((a - b).norm() / b.norm() < 3e-2 for a, b in zip(own, theirs, strict=True))
    sum(m.float().square().sum() for m in own).backward()
    weight = twin.patch_embed.conv1.conv.weight
    assert weight.grad.stride() == weight.stride()


def test_auto_takes_it_in_16_bits_and_leaves_fp32_on_a_cpu(monkeypatch):
    called = nodes(monkeypatch)
    model = MILA(**SMALL)
    model(image())
    assert not called
    with torch.autocast('cpu', torch.bfloat16):
        model(image())
    assert len(called) == 3


def test_transforms_and_traces_see_plain_operators(monkeypatch):
    called = nodes(monkeypatch)
    _, twin = pair()
    twin.eval()
    torch.func.jvp(lambda x: twin(x)[1], (image(),), (image(),))
    torch.jit.trace(twin, image(), check_trace=False)
    torch.compile(twin, backend='eager')(image())
    assert not called


def test_the_classifier_takes_it_too(monkeypatch):
    called = nodes(monkeypatch)
    torch.manual_seed(0)
    model = MILAClassifier('nano', num_classes=3).eval()
    x = image(size=(1, 3, 64, 64))
    with torch.no_grad():
        expected = model(x)
        assert not called
        with torch.autocast('cpu', torch.bfloat16):
            assert (model(x) - expected).norm() / expected.norm() < 5e-2
    assert len(called) == 5
