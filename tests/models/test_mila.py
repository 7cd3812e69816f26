"""The backbone as detectors and segmentors use it."""

import copy
import importlib
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.registry import DefaultScope

import mila_mm
from mila_mm import MILA

MICRO = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))


def expected_shapes(batch, height, width, dim=16):
    shapes, h, w = [], -(-height // 4), -(-width // 4)
    for i in range(4):
        shapes.append((batch, dim * 2**i, h, w))
        h, w = -(-h // 2), -(-w // 2)
    return shapes


@settings(deadline=None, max_examples=15)
@given(height=st.integers(1, 90), width=st.integers(1, 90), batch=st.integers(0, 3))
def test_any_size(height, width, batch):
    model = MILA(MICRO).eval()
    with torch.no_grad():
        maps = model(torch.rand(batch, 3, height, width))
    assert [tuple(m.shape) for m in maps] == expected_shapes(batch, height, width)
    assert all(m.isfinite().all() for m in maps)


def test_every_parameter_receives_a_gradient():
    model = MILA(MICRO, drop_path_rate=0.0).train()
    sum((m * torch.randn_like(m)).sum() for m in model(torch.rand(2, 3, 65, 97))).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_an_image_alone_equals_the_image_in_a_batch():
    model = MILA(MICRO).eval()
    images = torch.rand(3, 3, 50, 70)
    with torch.no_grad():
        together, alone = model(images), model(images[1:2])
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('type_', ['mila_mm.MILA', 'MILA'])
@pytest.mark.parametrize('library', ['mmengine', 'mmdet', 'mmseg', 'mila_mm'])
def test_builds_by_name_in_any_registry_and_scope(library, type_):
    import mila_mm.models  # noqa: F401 - 'MILA' alone works once this is imported

    registry = importlib.import_module(f'{library}.registry').MODELS
    assert isinstance(registry.build(dict(type=type_, arch=MICRO)), MILA)
    DefaultScope.get_instance('test', scope_name='mmdet' if library == 'mmseg' else 'mmseg')
    assert isinstance(registry.build(dict(type=type_, arch=MICRO)), MILA)


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (3,), (1, 2), (2, 0), (-1,)], ids=str)
def test_out_indices(out_indices):
    model = MILA(MICRO, out_indices=out_indices).train()
    full = MILA(MICRO).eval()
    full.load_state_dict(model.state_dict(), strict=False)
    maps = model.eval()(image := torch.rand(1, 3, 64, 64))
    expected = full(image)
    assert len(maps) == len(out_indices)
    for i, got in zip(out_indices, maps, strict=True):
        if f'norm{i % 4}.weight' in model.state_dict():
            torch.testing.assert_close(got, expected[i])
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters()), 'a parameter that no output uses breaks DDP'


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 3, 4])
def test_frozen_stages(frozen_stages):
    model = MILA(MICRO, frozen_stages=frozen_stages)
    for _ in range(2):  # the mode is set anew before every epoch
        model.train()
        frozen = ('patch_embed',) * (frozen_stages >= 0) + tuple(
            f'{part}{i}' for i in range(max(frozen_stages, 0)) for part in ('layers.', 'norm')
        )
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (not name.startswith(tuple(f + '.' for f in frozen))), name
        before = copy.deepcopy(model.patch_embed.state_dict())
        model(torch.rand(2, 3, 32, 32))
        moved = any((model.patch_embed.state_dict()[k] != v).any() for k, v in before.items())
        assert moved == (frozen_stages < 0), 'running statistics of a frozen stem must stand still'
    if frozen_stages < 4:
        sum(m.sum() for m in model(torch.rand(2, 3, 32, 32))).backward()


def test_norm_eval_keeps_running_statistics():
    model = MILA(MICRO, norm_eval=True).train()
    before = {k: v.clone() for k, v in model.state_dict().items() if 'running' in k}
    model(torch.rand(2, 3, 32, 32))
    assert model.training and model.layers[0].blocks[0].training
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_norm_cfg():
    model = MILA(MICRO, norm_cfg=dict(type='SyncBN', requires_grad=False))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.SyncBatchNorm)]
    assert len(norms) == 8 and not norms[0].weight.requires_grad
    assert set(model.state_dict()) == set(MILA(MICRO).state_dict())
    one_stage = dict(embed_dim=32, depths=(1,), num_heads=(1,))
    grouped = MILA(one_stage, out_indices=(0,), norm_cfg=dict(type='GN', num_groups=8))
    assert grouped(torch.rand(1, 3, 32, 32))[0].shape == (1, 32, 8, 8)


@pytest.mark.parametrize('trained', [False, True])
def test_folding_a_batch_norm_equals_applying_it(trained):
    from mila_mm.nn.layers import ConvLayer

    layer = ConvLayer(6, 8, 3, bias=trained, norm_layer=torch.nn.BatchNorm2d).double()
    with torch.no_grad():
        layer.norm.running_mean.normal_()
        layer.norm.running_var.uniform_(0.5, 2)
        layer.norm.weight.normal_()
        layer.norm.bias.normal_()
    layer.eval()
    x = torch.randn(2, 6, 9, 7, dtype=torch.double, requires_grad=True)
    weight = torch.randn(2, 8, 9, 7, dtype=torch.double)
    folded = layer(x)
    plain = torch.relu(layer.norm(layer.conv(x)))
    torch.testing.assert_close(folded, plain)
    leaves = [x, *layer.parameters()]
    for a, b in zip(
        torch.autograd.grad((folded * weight).sum(), leaves),
        torch.autograd.grad((plain * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_hooks_on_a_folded_layer_fire():
    from mila_mm.nn.layers import ConvLayer

    layer = ConvLayer(3, 4, 3, norm_layer=torch.nn.BatchNorm2d).eval()
    seen = []
    handle = layer.norm.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    hooked = layer(image := torch.rand(1, 3, 8, 8))
    handle.remove()
    assert seen == [(1, 4, 8, 8)]
    torch.testing.assert_close(layer(image), hooked)


@pytest.mark.parametrize('backend', ['auto', 'reference'])
def test_on_the_meta_device(backend):
    with torch.device('meta'):
        maps = MILA(MICRO, attn_backend=backend)(torch.rand(2, 3, 75, 101))
    assert [tuple(m.shape) for m in maps] == expected_shapes(2, 75, 101)


def test_with_cp_changes_neither_outputs_nor_gradients(weighted_sum, same_gradients):
    torch.manual_seed(0)
    plain = MILA(MICRO, drop_path_rate=0.3).train()
    saving = MILA(MICRO, drop_path_rate=0.3, with_cp=True).train()
    saving.load_state_dict(plain.state_dict())
    image = torch.rand(2, 3, 40, 56)
    outputs, grads = [], []
    for model in (plain, saving):
        torch.manual_seed(1)
        maps = model(image)
        torch.manual_seed(2)  # the masks of drop path are drawn again as they were, not from here
        weighted_sum(maps).backward()
        outputs.append(maps)
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)
    same_gradients(grads[1], grads[0], 1e-6)
    torch.manual_seed(3)
    assert not torch.equal(saving(image)[3], outputs[1][3]), 'drop path drops something'


def test_with_cp_stores_less():
    one_stage = dict(embed_dim=16, depths=(4,), num_heads=(1,))

    def stored(with_cp):
        total = 0

        def count(t):
            nonlocal total
            total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            MILA(one_stage, out_indices=(0,), with_cp=with_cp)(torch.rand(1, 3, 128, 128))
        return total

    assert stored(True) < 0.6 * stored(False)


def test_drop_path_rises_linearly():
    rates = [b.drop_path.drop_prob for s in MILA(MICRO, drop_path_rate=0.4).layers for b in s.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_rope_is_in_no_state_dict_and_computed_once_per_size(monkeypatch):
    from mila_mm.ops import rope

    assert not any('rope' in k or 'rotation' in k for k in MILA(MICRO).state_dict())
    mila_mm.ops.clear_rope_cache()
    built = []
    original = rope.build_rope_grid
    monkeypatch.setattr(rope, 'build_rope_grid', lambda *a: built.append(a[:3]) or original(*a))
    model = MILA(dict(embed_dim=16, depths=(3, 2), num_heads=(1, 1)), out_indices=(0, 1)).eval()
    for _ in range(2):
        model(torch.rand(1, 3, 36, 52))
    assert built == [(9, 13, 16), (5, 7, 32)]
    for _ in range(2):
        sum(m.sum() for m in model(torch.rand(1, 3, 36, 52))).backward()
    assert len(built) == 4, 'the backward turns back by tables of its own, built once as well'


def test_a_table_built_in_inference_mode_serves_training():
    mila_mm.ops.clear_rope_cache()
    model = MILA(MICRO)
    with torch.inference_mode():
        model.eval()(torch.rand(1, 3, 44, 60))
    model.train()(torch.rand(2, 3, 44, 60))[3].sum().backward()
    assert model.patch_embed.conv1.conv.weight.grad is not None


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, weighted_sum):
    torch.manual_seed(0)
    model = MILA(MICRO).train()
    image = torch.rand(2, 3, 64, 96)
    with torch.autocast('cpu', dtype=dtype):
        maps = model(image)
        weighted_sum(maps).backward()
    low = {name: p.grad for name, p in model.named_parameters()}
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in low.values())
    model.zero_grad()
    exact = model(image)
    weighted_sum(exact).backward()
    near = [
        torch.nn.functional.cosine_similarity(low[name].flatten(), p.grad.flatten(), dim=0).item()
        for name, p in model.named_parameters()
        if p.numel() > 1 and p.grad.abs().max() > 1e-3
    ]
    assert len(near) > 0.9 * len(low) and sorted(near)[len(near) // 10] > (0.9 if dtype == torch.bfloat16 else 0.98)
    for got, expected in zip(maps, exact, strict=True):
        error = (got.float() - expected).abs().max() / expected.abs().max()
        assert error < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_channels_last_in_channels_last_out():
    model = MILA(MICRO).eval()
    image = torch.rand(2, 3, 40, 48)
    with torch.no_grad():
        plain, last = model(image), model(image.contiguous(memory_format=torch.channels_last))
    for a, b in zip(plain, last, strict=True):
        assert a.is_contiguous() and b.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a, b)


def test_deepcopy_and_pickle():
    model = MILA(MICRO, norm_cfg=dict(type='BN', eps=1e-4)).eval()
    image = torch.rand(1, 3, 33, 47)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    expected = model(image)
    for other in copies:
        for a, b in zip(other(image), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_in_channels():
    assert MILA(MICRO, in_channels=5)(torch.rand(2, 5, 32, 32))[0].shape == (2, 16, 8, 8)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(arch='huge'), r'one of nano, tiny, small, base.*huge'),
        (dict(arch=dict(embed_dim=16, depths=(1, 1))), r'exactly embed_dim, depths, num_heads'),
        (dict(arch=dict(embed_dim=18, depths=(1,), num_heads=(1,))), r'multiple of 4.*18'),
        (dict(arch=dict(embed_dim=16, depths=(1, 1), num_heads=(1, 3))), r'3 heads for width 32 in stage 1'),
        (dict(arch=dict(embed_dim=16, depths=(1, 1), num_heads=(1,))), r'one for each stage'),
        (dict(arch=MICRO, out_indices=(0, 4)), r'stages from 0 to 3'),
        (dict(arch=MICRO, out_indices=()), r'stages from 0 to 3'),
        (dict(arch=MICRO, frozen_stages=5), r'frozen_stages from -1 to 4'),
        (dict(arch=MICRO, frozen_stages=-2), r'frozen_stages from -1 to 4'),
        (dict(arch=MICRO, drop_path_rate=1.0), r'drop_path_rate in \[0, 1\)'),
        (dict(arch=MICRO, attn_backend='cuda'), r'attn_backend to be one of auto, triton, reference'),
        (dict(arch=MICRO, mlp_ratio=0), r'mlp_ratio above 0'),
    ],
    ids=lambda v: v if isinstance(v, str) else '',
)
def test_a_wrong_argument_says_expected_and_got(options, message):
    with pytest.raises(ValueError, match=message):
        MILA(**options)
