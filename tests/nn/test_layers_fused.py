"""The fused forms of a block: the same numbers, gradients and names as the modules one after the other."""

import copy

import pytest
import torch
from torch import Tensor, nn

from mila_mm import MILA
from mila_mm.nn import layers
from mila_mm.nn.layers import FUSIONS
from mila_mm.nn.step_weights import CastConvolutions

SMALL = dict(arch=dict(embed_dim=16, depths=(1, 2), num_heads=(1, 2)), out_indices=(0, 1))
CHOICES = [*((name,) for name in FUSIONS), True]


def pair(fused, **options):
    """A model and its fused twin."""
    torch.manual_seed(0)
    plain = MILA(**SMALL, fused=False, **options)
    twin = MILA(**SMALL, fused=fused, **options)
    twin.load_state_dict(plain.state_dict())
    return plain, twin


def step(model, image):
    maps = model(image)
    model.zero_grad()
    sum(m.float().square().mean() for m in maps).backward()
    return maps, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize('with_cp', [False, True], ids=['', 'checkpointed'])
@pytest.mark.parametrize('fused', CHOICES, ids=str)
def test_equals_the_modules(fused, with_cp):
    plain, twin = pair(fused, with_cp=with_cp)
    assert list(plain.state_dict()) == list(twin.state_dict())
    image = torch.rand(2, 3, 45, 70)
    (maps, grads), (fused_maps, fused_grads) = step(plain, image), step(twin, image)
    for a, b in zip(fused_maps, maps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(
            fused_grads[name],
            grad,
            rtol=1e-3,
            atol=1e-4 * grad.abs().max().item() + 1e-7,
            msg=lambda m, name=name: f'{name}: {m}',
        )


def test_each_choice_changes_what_runs(monkeypatch):
    from mila_mm.nn import layers

    called = []
    for name in ('cpe_norm', 'dwc_silu'):
        original = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *a, o=original, n=name, **k: called.append(n) or o(*a, **k))
    monkeypatch.setattr(MILA, 'prepare', lambda model, x: None)  # blocks as one node: tests/nn/test_block_node.py
    image = torch.rand(1, 3, 32, 32)
    expected = {
        False: [],
        ('cpe_norm',): ['cpe_norm'] * 6,
        ('dwc_silu',): ['dwc_silu'] * 3,
        True: ['cpe_norm', 'dwc_silu', 'cpe_norm'] * 3,
    }
    for fused, calls in expected.items():
        called.clear()
        MILA(**SMALL, fused=fused).eval()(image)
        assert called == calls


@pytest.mark.parametrize('fused', CHOICES, ids=str)
@pytest.mark.parametrize('part', ['act_proj', 'dwc', 'norm2', 'cpe1'])
def test_a_hooked_part_is_called(fused, part):
    plain, twin = pair(fused)
    image = torch.rand(1, 3, 32, 32)
    called = []
    for model in (plain, twin):
        model.eval().layers[1].blocks[0].get_submodule(part).register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(twin(image), plain(image), rtol=1e-4, atol=1e-5)
    assert len(called) == 2


def test_autocast():
    plain, twin = pair(True)
    image = torch.rand(2, 3, 45, 70)
    with torch.autocast('cpu', torch.bfloat16):
        maps, grads = step(plain, image)
        fused_maps, fused_grads = step(twin, image)
    for a, b in zip(fused_maps, maps, strict=True):
        assert (a.float() - b.float()).norm() / b.float().norm() < 3e-2
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in fused_grads.values())
    assert fused_grads.keys() == grads.keys()


def test_compiles_for_any_size_and_traces_to_plain_operators():
    torch._dynamo.reset()
    _, model = pair(True)
    model.eval()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for size in [(64, 96), (75, 101), (40, 130)]:
            image = torch.rand(2, 3, *size)
            for a, b in zip(compiled(image), model(image), strict=True):
                torch.testing.assert_close(a, b)
        traced = torch.jit.trace(model, image)
    assert len(graphs) == 1, 'a new size must not compile again'
    assert 'mila_mm::' not in str(traced.inlined_graph)


@pytest.mark.parametrize('fused', ['cpe_norm', ['mlp'], [True]], ids=str)
def test_no_such_fusion(fused):
    with pytest.raises(ValueError, match="fused to be True, False, 'auto' or names of cpe_norm, dwc_silu, projections"):
        MILA(**SMALL, fused=fused)


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('size', [(6, 8), (5, 7), (1, 1)], ids=str)
def test_a_downsampling_in_one_pass_equals_its_layers(
    size: tuple[int, int], recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    ours = layers.Downsample(8, nn.BatchNorm2d).double()
    plain = copy.deepcopy(ours)
    x = torch.randn(2, size[0] * size[1], 8, dtype=torch.float64, requires_grad=True)
    asked: list[tuple[int, int]] = []

    def yes(x: Tensor, height: int, width: int) -> bool:
        asked.append((height, width))
        return True

    monkeypatch.setattr(layers, 'by_triton', yes)
    pairs = [(layer.conv.weight, layer.conv.bias) for layer in ours.conv]
    params = CastConvolutions([(weight.detach(), bias.detach()) for weight, bias in pairs], pairs)
    (y, *grid), (want, *want_grid) = ours(x, *size, recompute, params), plain(x, *size)
    assert asked and all(side % 2 == 0 for side in asked[0])
    assert grid == want_grid and y.shape == want.shape
    torch.testing.assert_close(y, want)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, *ours.parameters()), grad)
    for a, b in zip(got, torch.autograd.grad(want, (x, *plain.parameters()), grad), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())


def test_a_norm_without_position_encoding_is_one_op_too(monkeypatch):
    torch.manual_seed(0)
    one, other = (
        layers.Block(16, lambda dim: layers.LinearAttention(dim, 1), cpe=False, fused=fused)
        for fused in (('cpe_norm',), ())
    )
    other.load_state_dict(one.state_dict())
    calls = []
    called = layers.layer_norm
    monkeypatch.setattr(layers, 'layer_norm', lambda *a, **k: calls.append(1) or called(*a, **k))
    x = torch.randn(2, 35, 16)
    for low in (None, torch.bfloat16):
        with torch.no_grad(), torch.autocast('cpu', low or torch.bfloat16, enabled=low is not None):
            torch.testing.assert_close(one(x, 5, 7), other(x, 5, 7), rtol=1e-5, atol=1e-2 if low else 1e-5)
    assert len(calls) == 4
