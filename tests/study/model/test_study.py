"""The model of the study: its rows, its costs, its switches, and what it shares with MILA."""

import copy
import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mila_mm import MILA, LinearAttentionTransformer
from mila_mm.engine.complexity import operation_counter
from mila_mm.study.model import STUDY_ROWS, LinearAttentionClassifier, LinearAttentionTrunk

MICRO = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))
# Every row, and combinations that no row has
VARIANTS = {
    **STUDY_ROWS,
    'mamba': dict(
        block='mamba', input_gate=True, forget_gate=True, shortcut=True, normalization=False, single_head=True
    ),
    'all encodings': dict(positional_encoding=('ape', 'lepe', 'cpe', 'rope'), forget_gate=True),
    'mila, gated': dict(block='mila', positional_encoding=('lepe', 'cpe', 'rope'), input_gate=True),
    'single head, rope': dict(single_head=True, positional_encoding='rope'),
}
EACH = pytest.mark.parametrize('options', VARIANTS.values(), ids=VARIANTS)


def micro(**options):
    return LinearAttentionTransformer(MICRO, **options)


# Table 1 and 2 of the paper: millions of parameters and 10^9 multiply-adds, with 1000 classes at 224 x 224
PRINTED = {
    'baseline': (28, 4.5),
    'input_gate': (29, 4.5),
    'forget_gate': (29, 4.8),
    'shortcut': (28, 4.5),
    'no_normalization': (28, 4.5),
    'single_head': (24, 3.9),
    'block_all': (28, 4.7),
    'block_substitute': (31, 4.8),
    'ape': (30, 4.5),
    'lepe': (28, 4.5),
    'cpe': (28, 4.5),
    'rope': (28, 4.5),
}


@functools.cache
def costs(row):
    """Parameters and multiply-adds of a row."""
    with torch.no_grad(), torch.device('meta'):
        model = LinearAttentionClassifier('tiny', **STUDY_ROWS[row]).to_empty(device='cpu').eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()  # what was in the memory may be slow to compute with
        macs = operation_counter(model, torch.zeros(1, 3, 224, 224)).total()
    return sum(p.numel() for p in model.parameters()), macs


@pytest.mark.parametrize('row', PRINTED)
def test_costs_round_to_the_printed_figures(row):
    params, macs = costs(row)
    assert (round(params / 1e6), round(macs / 1e9, 1)) == PRINTED[row]


def test_costs_by_the_formulas():
    """Counted parameters and multiply-adds against the formulas of the paper, written out here."""
    weights, macs = ({row: costs(row)[i] for row in ('baseline', 'forget_gate', 'block_substitute')} for i in (0, 1))
    stages = [(2, 3136, 96), (2, 784, 192), (6, 196, 384), (2, 49, 768)]  # blocks, N, C
    # A block: 12 N C^2 of linear layers, 2 N C d of attention and N C of its norm, 5 for each element of LayerNorms.
    blocks = sum(b * (12 * n * c**2 + 2 * n * c * 32 + n * c + 10 * n * c) for b, n, c in stages)
    merging = sum(n // 4 * 4 * c * 2 * c + 5 * n * c for _, n, c in stages[:3])
    ends = 3136 * 48 * 96 + 5 * 3136 * 96 + 5 * 49 * 768 + 768 * 1000
    assert macs['baseline'] == pytest.approx(blocks + merging + ends, rel=1e-6)
    # Equation 13 has one more product of N C^2 than a Transformer's block, and k^2 N C.
    assert macs['block_substitute'] - macs['baseline'] == sum(b * (n * c**2 + 25 * n * c) for b, n, c in stages)
    gate = sum(b * (2 * n * c * (c // 16) + 9 * n * c * 32 - 2 * n * c * 32 - n * c) for b, n, c in stages)
    assert macs['forget_gate'] - macs['baseline'] == gate
    extra = sum(b * (2 * c * (c // 16) + c + 32 * c) for b, _, c in stages)
    assert weights['forget_gate'] - weights['baseline'] == extra


def mila_options():
    return dict(layout='mila', block='mila', positional_encoding=('lepe', 'cpe', 'rope'))


@pytest.mark.parametrize('fused', [True, False], ids=['fused op', 'operator of the study'])
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_with_milas_settings_it_is_mila(fused, training, weighted_sum, same_gradients):
    torch.manual_seed(0)
    mila = MILA(MICRO, drop_path_rate=0.2).train(training)
    study = LinearAttentionTransformer(MICRO, drop_path_rate=0.2, **mila_options()).train(training)
    assert list(study.state_dict()) == list(mila.state_dict())
    study.load_state_dict(mila.state_dict())
    for stage in study.layers:
        for block in stage.blocks:
            assert block.attn.fused
            block.attn.fused = fused
    image = torch.rand(2, 3, 45, 75)
    outputs, grads = [], []
    for model in (mila, study):
        torch.manual_seed(1)
        maps = model(image)
        weighted_sum(maps).backward()
        outputs.append(maps)
        grads.append({n: p.grad for n, p in model.named_parameters()})
    tolerance = dict(rtol=0, atol=0) if fused else dict(rtol=1e-4, atol=1e-5)
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    same_gradients(grads[1], grads[0], 0 if fused else 1e-4)


@pytest.mark.parametrize('arch', ['nano', 'tiny', 'small', 'base'])
def test_milas_published_sizes_have_the_same_state_dict(arch):
    with torch.device('meta'):
        ours, milas = (m.state_dict() for m in (LinearAttentionTransformer(arch, **mila_options()), MILA(arch)))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in milas.items()}


@EACH
def test_every_parameter_receives_a_gradient_and_recomputing_changes_nothing(options):
    torch.manual_seed(0)
    plain = micro(drop_path_rate=0.3, **options).train()
    saving = micro(drop_path_rate=0.3, with_cp=True, **options).train()
    saving.load_state_dict(plain.state_dict())
    image, grads = torch.rand(2, 3, 39, 57), []
    for model in (plain, saving):
        torch.manual_seed(7)
        sum((m * torch.randn_like(m)).sum() for m in model(image)).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert [n for n, g in grads[0].items() if g is None] == []
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item())
    torch.manual_seed(7)
    with torch.no_grad():
        plain.eval()
    plain.zero_grad()
    sum((m * torch.randn_like(m)).sum() for m in plain(image)).backward()
    silent = [n for n, p in plain.named_parameters() if not p.grad.abs().sum() > 0]
    assert silent == []


@settings(deadline=None, max_examples=15)
@given(height=st.integers(1, 70), width=st.integers(1, 70), name=st.sampled_from(sorted(VARIANTS)))
def test_any_size(height, width, name):
    model = micro(img_size=(64, 32), **VARIANTS[name]).eval()
    with torch.no_grad():
        maps = model(torch.rand(1, 3, height, width))
    h, w = -(-height // 4), -(-width // 4)
    for i, m in enumerate(maps):
        assert m.shape == (1, 16 * 2**i, h, w) and m.isfinite().all()
        h, w = -(-h // 2), -(-w // 2)


@EACH
def test_an_image_alone_equals_the_image_in_a_batch(options):
    model = micro(**options).eval()
    images = torch.rand(3, 3, 50, 70)
    with torch.no_grad():
        for a, b in zip(model(images), model(images[1:2]), strict=True):
            torch.testing.assert_close(a[1:2], b, rtol=1e-4, atol=1e-4)


@EACH
def test_bf16_autocast(options):
    model = micro(**options).eval()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(image)
        with torch.autocast('cpu', torch.bfloat16):
            maps = model(image)
    for got, want in zip(maps, expected, strict=True):
        assert got.isfinite().all()
        assert F.cosine_similarity(got.float().flatten(), want.flatten(), 0) > 0.99


def test_only_a_forget_gate_makes_the_past_blind_to_the_future():
    torch.manual_seed(0)
    first = dict(embed_dim=16, depths=(1,), num_heads=(2,))
    image = torch.rand(1, 3, 32, 32)
    changed = image.clone()
    changed[:, :, 16:] += 1
    for row, options in STUDY_ROWS.items():
        if 'cpe' in row or 'lepe' in row or 'block' in row:
            continue  # their convolutions look one row ahead by themselves
        model = LinearAttentionTransformer(first, out_indices=(0,), **options).eval()
        with torch.no_grad():
            above = [model(x)[0][:, :, :4] for x in (image, changed)]
        assert torch.equal(*above) == (row == 'forget_gate'), row


def test_a_switch_changes_what_it_says_and_nothing_else():
    def names(**options):
        return {k: tuple(v.shape) for k, v in micro(**options).state_dict().items()}

    base = names()
    for row, added in {
        'input_gate': ['delta.down.weight', 'delta.up.weight', 'delta.up.bias'],
        'forget_gate': ['delta.down.weight', 'delta.up.weight', 'delta.up.bias', 'forget_gate.log_rate'],
        'shortcut': ['shortcut'],
        'no_normalization': [],
        'rope': [],
        'lepe': ['lepe.weight', 'lepe.bias'],
    }.items():
        now = names(**STUDY_ROWS[row])
        assert base.items() <= now.items()
        assert sorted(k for k in now if k not in base and k.startswith('layers.0.')) == sorted(
            f'layers.0.blocks.0.attn.{a}' for a in added
        )
    single = names(single_head=True)
    assert single['layers.3.blocks.0.attn.qk.weight'] == (2 * 32, 128)
    assert [k for k in base if single[k] != base[k] and '.qk.' not in k] == []
    states = names(forget_gate=True)['layers.1.blocks.0.attn.forget_gate.log_rate']
    assert states == (16, 32), 'd x C'


def test_gates_can_be_watched():
    torch.manual_seed(0)
    model = micro(input_gate=True, forget_gate=True).eval()
    attn = model.layers[1].blocks[0].attn
    seen = {}
    attn.input_gate.register_forward_hook(lambda m, args, out: seen.update(input=out))
    attn.forget_gate.register_forward_hook(lambda m, args, out: seen.update(forget=out))
    with torch.no_grad():
        model(torch.rand(2, 3, 40, 48))
        delta, rate = seen['forget']
        assert delta.shape == seen['input'].shape == (2, 5 * 6, 32) and (delta > 0).all() and (rate < 0).all()
        explicit = torch.exp(rate[None, None] * delta[:, :, None]).mean(dim=2)
        torch.testing.assert_close(attn.forget_gate.mean_gate(delta), explicit)


def test_where_delta_and_the_rates_start():
    torch.manual_seed(0)
    blocks = micro(forget_gate=True).layers[3].blocks
    delta = blocks[0].attn.delta(torch.zeros(1, 1, 128))
    assert 1e-3 * 0.99 <= delta.min() < 0.005, 'log-uniform from 0.001 as in Mamba'
    assert 0.05 < delta.max() <= 0.1 * 1.01
    rate = blocks[0].attn.forget_gate(delta)[1]
    torch.testing.assert_close(rate[:, 0], -torch.arange(1.0, 33.0))
    open_gate = micro(input_gate=True).layers[3].blocks[0].attn.delta(torch.zeros(1, 1, 128))
    torch.testing.assert_close(open_gate, torch.ones(1, 1, 128))


@pytest.mark.parametrize('type_', ['mila_mm.LinearAttentionTransformer', 'LinearAttentionTransformer'])
@pytest.mark.parametrize('library', ['mmengine', 'mmdet', 'mmseg', 'mila_mm'])
def test_builds_by_name_in_any_registry(library, type_):
    registry = importlib.import_module(f'{library}.registry').MODELS
    assert isinstance(registry.build(dict(type=type_, arch=MICRO)), LinearAttentionTransformer)


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (3,), (2, 0), (-1,)], ids=str)
@pytest.mark.parametrize('layout', ['swin', 'mila'])
def test_out_indices(out_indices, layout):
    model = micro(layout=layout, out_indices=out_indices).train()
    maps = model(torch.rand(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [16 * 2 ** (i % 4) for i in out_indices]
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters()), 'a parameter that no output uses breaks DDP'


@pytest.mark.parametrize('frozen_stages', [-1, 0, 2])
def test_frozen_stages_and_norm_eval(frozen_stages):
    model = micro(layout='mila', forget_gate=True, frozen_stages=frozen_stages, norm_eval=True)
    frozen = ('patch_embed.',) * (frozen_stages >= 0) + tuple(
        f'{part}{i}.' for i in range(max(frozen_stages, 0)) for part in ('layers.', 'norm')
    )
    for _ in range(2):
        model.train()
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == (not (frozen and name.startswith(frozen))), name
        before = copy.deepcopy(model.state_dict())
        model(torch.rand(2, 3, 32, 32))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if 'running' in k)
    with pytest.raises(ValueError, match='LinearAttentionTransformer: expected frozen_stages from -1 to 4'):
        micro(frozen_stages=5)


def test_learning_rates_by_depth_and_pretrained_weights(tmp_path):
    model = micro(forget_gate=True)
    assert model.get_layer_depth('patch_embed.proj.weight') == (0, 7)
    assert model.get_layer_depth('backbone.layers.2.blocks.1.attn.delta.up.bias', 'backbone.') == (4, 7)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    loaded = micro(forget_gate=True, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'model.pth')))
    loaded.init_weights()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_the_trunk_needs_no_framework_and_traces():
    trunk = LinearAttentionTrunk(MICRO, forget_gate=True, positional_encoding=('ape', 'rope'), img_size=32).eval()
    image = torch.rand(1, 3, 40, 56)
    with torch.no_grad():
        traced = torch.jit.trace(trunk, image)
        for a, b in zip(traced(image), trunk(image), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(block='conv'), "expected block to be one of transformer, mamba, mila, got 'conv'"),
        (dict(layout='vit'), "expected layout to be one of swin, mila, got 'vit'"),
        (dict(positional_encoding=('rope', 'alibi')), 'positional_encoding to be any of ape, lepe, cpe, rope'),
        (dict(expansion=2.0), "no expansion with block 'transformer'"),
        (dict(block='mila', expansion=-1.0), r'expected expansion and qk_ratio above 0, got \(-1.0, -1.0\)'),
        (dict(block='mila', conv_kernel_size=4), 'expected conv_kernel_size to be an odd number, got 4'),
        (dict(gate_reduction=0), 'expected gate_reduction of at least 1, got 0'),
        (
            dict(qk_ratio=0.8),
            r'expected widths divisible by 1 heads, and that of q and k with RoPE by 4|divisible by 2',
        ),
        (dict(img_size=(1, 2, 3)), r'expected img_size to be a side or \(height, width\)'),
        (dict(arch='small'), 'expected arch to be one of nano, tiny or a dict'),
        (dict(drop_path_rate=1.0), 'expected drop_path_rate in'),
        (dict(out_indices=(4,)), 'expected out_indices to be different stages'),
    ],
    ids=lambda value: '-'.join(value) if isinstance(value, dict) else '',
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        LinearAttentionTransformer(**{'arch': MICRO} | options)
    assert str(caught.value).startswith('LinearAttentionTransformer: ')
