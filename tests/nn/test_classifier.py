"""The classifiers as models of timm, in the sense of timm's own tests of every model; and equal to the released one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import create_model

from mila_mm import MILA, MILAClassifier
from mila_mm.arch import ARCHS

DATA = Path(__file__).resolve().parent.parent
MICRO = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))
NAMES = ['mila_tiny', 'mila_small', 'mila_base']
MILLIONS = {'mila_tiny': 24.392, 'mila_small': 43.015, 'mila_base': 95.984}


@pytest.fixture(scope='module', params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope='module')
def model(name):
    torch.manual_seed(0)
    return create_model(name).eval()


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def micro(**kwargs):
    torch.manual_seed(0)
    return MILAClassifier(MICRO, **{'num_classes': 10, **kwargs}).eval()


@pytest.fixture(scope='module')
def released(released_weights):
    """A state dict as released files hold it, RoPE tables included."""
    shapes = json.loads((DATA / 'weights' / 'data' / 'micro_classifier_keys.json').read_text())
    weights = released_weights({k: v for k, v in shapes.items() if not k.endswith('rope.rotations')})
    return {k: weights[k] if k in weights else torch.rand(shapes[k]) for k in shapes}


# What timm tests of every model.


def test_timm_knows_the_names_and_their_weights():
    assert timm.list_models('mila*') == sorted(NAMES)
    assert timm.list_models('mila*', pretrained=True) == [f'{n}.in1k' for n in sorted(NAMES)]


@pytest.mark.parametrize('order', ['import mila_mm, timm', 'import timm, mila_mm', 'import timm, mila_mm.nn.timm'])
def test_timm_knows_the_names_whatever_is_imported_first(order):
    code = f'{order}, sys; assert "mila_mm.models" not in sys.modules; assert timm.is_model("mila_small")'
    subprocess.run([sys.executable, '-c', code], check=True, timeout=120)


@torch.no_grad()
def test_forward(model, name):
    logits = model(image(2, 3, 64, 96))
    assert logits.shape == (2, 1000) and logits.isfinite().all()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == MILLIONS[name]


def test_backward(name):
    model = create_model(name, num_classes=42, drop_path_rate=0.1).train()
    logits = model(image(2, 3, 64, 64))
    logits.mean().backward()
    assert logits.shape == (2, 42) and logits.isfinite().all()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@torch.no_grad()
def test_default_cfg_tells_the_truth(model):
    cfg, keys = model.default_cfg, model.state_dict()
    assert keys[f'{cfg["classifier"]}.weight'].shape[0] == cfg['num_classes'] == model.num_classes
    assert keys[f'{cfg["first_conv"]}.weight'].shape[1] == cfg['input_size'][0] == 3
    # the pool size is that of 224; a smaller image gives the same ratio
    side = cfg['input_size'][-1] // 2
    features = model.forward_features(image(1, 3, side, side))
    assert features.shape == (1, model.num_features, *(-(-n // 2) for n in cfg['pool_size']))


@torch.no_grad()
def test_forward_is_features_then_head(model):
    x = image(1, 3, 64, 64)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean(dim=(2, 3)))
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))


@torch.no_grad()
def test_reset_classifier():
    model, x = create_model('mila_tiny').eval(), image(1, 3, 64, 64)
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features) == (1, 512)
    model.reset_classifier(0, '')
    assert model(x).shape == (1, 512, 2, 2)
    model.reset_classifier(7, 'catavgmax')
    assert model(x).shape == (1, 7) and model.get_classifier().in_features == 1024 and model.num_classes == 7
    assert create_model('mila_tiny', num_classes=0).eval()(x).shape == (1, 512)
    assert create_model('mila_tiny', num_classes=0, global_pool='').eval()(x).shape == (1, 512, 2, 2)


@torch.no_grad()
def test_features_only(name):
    model = create_model(name, features_only=True).eval()
    arch = ARCHS[name.removeprefix('mila_')]
    assert model.feature_info.channels() == list(arch.dims) and model.feature_info.reduction() == [4, 8, 16, 32]
    maps = model(image(1, 3, 75, 101))
    assert [tuple(m.shape) for m in maps] == [
        (1, c, h, w) for c, h, w in zip(arch.dims, (19, 10, 5, 3), (26, 13, 7, 4), strict=True)
    ]
    assert all(m.isfinite().all() for m in maps)


def test_features_only_of_some_stages_builds_no_others():
    model = create_model('mila_tiny', features_only=True, out_indices=(0, 2))
    maps = model(image(2, 3, 64, 64))
    assert [m.shape[1] for m in maps] == model.feature_info.channels() == [64, 256]
    sum(m.sum() for m in maps).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    own = set(model.model.state_dict())
    assert not any(n.startswith(('layers.3', 'norm.', 'head.', 'layers.2.downsample')) for n in own)


@torch.no_grad()
def test_forward_intermediates():
    model, x = micro(), image(2, 3, 50, 34)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert [m.shape[1] for m in maps] == [16, 32, 64, 128]
    torch.testing.assert_close(model.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2), final)
    only = model.forward_intermediates(x, indices=[1, -2], intermediates_only=True, output_fmt='NHWC')
    for got, expected in zip(only, maps[1:3], strict=True):
        torch.testing.assert_close(got.permute(0, 3, 1, 2), expected)
    torch.testing.assert_close(model.forward_intermediates(x, indices=1, norm=True)[1][0], final)
    early, _ = model.forward_intermediates(x, indices=[0], stop_early=True)
    torch.testing.assert_close(early, maps[0])
    with pytest.raises(ValueError, match='NLC'):
        model.forward_intermediates(x, output_fmt='NLC')


@pytest.mark.parametrize('prune_norm', [True, False])
@torch.no_grad()
def test_pruning_keeps_the_maps(prune_norm):
    model, x = micro(), image(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2], prune_norm=prune_norm) == [0, 2]
    got = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert model(x).shape == (1, 64, 4, 4) and len(model.layers) == 3


def test_state_dict_round_trip(name, tmp_path):
    source, target = create_model(name), create_model(name)
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    timm.models.load_checkpoint(target, str(tmp_path / 'weights.pth'))
    for (key, a), b in zip(source.state_dict().items(), target.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    # what a dense backbone has and a classifier not: norms of the first stages
    ours, dense = set(source.state_dict()), set(MILA(name.removeprefix('mila_')).state_dict())
    assert dense - ours == {f'norm{i}.{p}' for i in range(4) for p in ('weight', 'bias')}
    assert ours - dense == {f'{m}.{p}' for m in ('norm', 'head') for p in ('weight', 'bias')}


def test_grad_checkpointing_changes_nothing():
    grads = []
    for enable in (False, True):
        model = micro().train()
        model.set_grad_checkpointing(enable)
        loss = model(image(2, 3, 64, 64)).square().sum()
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad)


@pytest.mark.parametrize('coarse', [False, True])
def test_layer_groups_rise_with_depth(coarse):
    from timm.models import group_parameters

    model = micro()
    groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
    assert set(groups) == {n for n, _ in model.named_parameters()}
    assert groups['patch_embed.conv1.conv.weight'] == 0
    order = [
        'patch_embed.conv1.conv.weight',
        'layers.0.blocks.0.norm1.weight',
        'layers.2.blocks.0.norm1.weight',
        'layers.2.blocks.1.norm1.weight',
        'layers.3.blocks.0.norm1.weight',
        'head.weight',
    ]
    depths = [groups[n] for n in order]
    assert depths == sorted(depths) and (coarse or depths[2] < depths[3])


def test_drop_path_and_dropout_reach_the_model():
    model = create_model('mila_tiny', drop_path_rate=0.3, drop_rate=0.5).train()
    rates = [b.drop_path.drop_prob for s in model.layers for b in s.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.3) and rates == sorted(rates)
    features = torch.ones(1, 512, 2, 2)
    assert set(model.forward_head(features, pre_logits=True).unique().tolist()) == {0.0, 2.0}
    assert model.eval().forward_head(features, pre_logits=True).unique().tolist() == [1.0]


# Weights.


@pytest.mark.parametrize('how', ['load_state_dict', 'load_pretrained', 'checkpoint_path', 'overlay'])
@torch.no_grad()
def test_equals_the_released_classifier(how, released, tmp_path, monkeypatch):
    file = tmp_path / 'released.pth'
    torch.save({'model': released, 'epoch': 299}, file)
    model = micro()
    if how == 'load_state_dict':
        model.load_state_dict(released)
    elif how == 'load_pretrained':
        model.load_pretrained(file)
    else:
        monkeypatch.setitem(ARCHS, 'tiny', ARCHS['nano'].__class__(**MICRO))
        where = (
            dict(checkpoint_path=str(file))
            if how == 'checkpoint_path'
            else dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file), num_classes=10))
        )
        model = create_model('mila_tiny', num_classes=10, **where).eval()
    x = torch.from_numpy(np.random.default_rng(7).standard_normal((2, 3, 64, 64)).astype(np.float32))
    expected = np.load(DATA / 'data' / 'parity' / 'outputs.npz')['micro_cls_64x64_logits']
    assert np.abs(model(x).numpy() - expected).max() <= 1e-5 * np.abs(expected).max()


def test_pretrained_fetches_by_name_and_adapts_head_and_stem(tmp_path, monkeypatch):
    monkeypatch.setenv('MILA_HOME', str(tmp_path))
    monkeypatch.setenv('MILA_OFFLINE', '1')
    monkeypatch.setitem(ARCHS, 'tiny', ARCHS['nano'])
    published = MILAClassifier('nano')
    torch.save({'model': published.state_dict()}, tmp_path / 'mila-tiny-in1k.pth')
    model = create_model('mila_tiny', pretrained=True)
    assert torch.equal(model.head.weight, published.head.weight)
    model = create_model('mila_tiny', pretrained=True, num_classes=5, in_chans=1).eval()
    assert torch.equal(model.norm.weight, published.norm.weight)
    assert torch.equal(model.layers[3].blocks[0].attn.qk.weight, published.layers[3].blocks[0].attn.qk.weight)
    grey = image(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(grey),
            published.eval().forward_features(grey.expand(1, 3, 32, 32)),
            rtol=1e-3,
            atol=1e-4,
        )
    assert create_model('mila_tiny', pretrained=True, num_classes=0).num_classes == 0
    features = create_model('mila_tiny', pretrained=True, features_only=True)
    assert torch.equal(features.model.layers[0].blocks[0].mlp.fc1.weight, published.layers[0].blocks[0].mlp.fc1.weight)


def test_weights_of_another_size_are_refused(tmp_path):
    from mila_mm.weights import MismatchError

    torch.save({'model': MILAClassifier('nano').state_dict()}, tmp_path / 'nano.pth')
    model = micro()
    with pytest.raises(MismatchError, match='MILA nano'):
        model.load_pretrained(tmp_path / 'nano.pth')


def test_needs_nothing_of_openmmlab(tmp_path):
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'):
            raise ModuleNotFoundError(name, name=name.partition('.')[0])
sys.meta_path.insert(0, Absent())
import mila_mm, timm, torch
model = timm.create_model('mila_tiny', num_classes=3).eval()
torch.save({'model': model.state_dict()}, sys.argv[1])
timm.create_model('mila_tiny', num_classes=3).load_pretrained(sys.argv[1])
print(model(torch.rand(1, 3, 32, 32)).shape)
"""
    done = subprocess.run(
        [sys.executable, '-c', code, str(tmp_path / 'w.pth')], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == 'torch.Size([1, 3])'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(num_classes=-1), 'num_classes'),
        (dict(global_pool='middle'), 'middle'),
        (dict(global_pool=''), 'num_classes=0'),
    ],
)
def test_arguments_that_make_no_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        micro(**arguments)
