"""Detectors and segmentors of mmdet 2 / mmseg 0 load whole under mmdet 3 / mmseg 1, and learn layer by layer."""

import copy
from collections import OrderedDict

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint as mmengine_load_checkpoint

from mila_mm import MILA
from mila_mm.errors import UserError
from mila_mm.weights import MismatchError, load_backbone, load_model
from mila_mm.weights.names import rope_tables

BOTH = ('weight', 'bias')
# Names of the heads as mmdet 2.11 and mmseg 0.11 write them, the versions that the released code vendors.
MMDET_2 = [
    *(f'neck.{kind}_convs.{i}.conv.{what}' for kind in ('lateral', 'fpn') for i in range(4) for what in BOTH),
    *(f'rpn_head.rpn_{kind}.{what}' for kind in ('conv', 'cls', 'reg') for what in BOTH),
    *(
        f'roi_head.bbox_head.{kind}.{what}'
        for kind in ('fc_cls', 'fc_reg', 'shared_fcs.0', 'shared_fcs.1')
        for what in BOTH
    ),
    *(f'roi_head.mask_head.convs.{i}.conv.{what}' for i in range(4) for what in BOTH),
    *(f'roi_head.mask_head.{kind}.{what}' for kind in ('upsample', 'conv_logits') for what in BOTH),
]
CONV_BN = ('conv.weight', 'bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var', 'bn.num_batches_tracked')
MMSEG_0 = [
    *(f'{head}.conv_seg.{what}' for head in ('decode_head', 'auxiliary_head') for what in BOTH),
    *(f'decode_head.psp_modules.{i}.1.{what}' for i in range(4) for what in CONV_BN),
    *(f'decode_head.{kind}_convs.{i}.{what}' for kind in ('lateral', 'fpn') for i in range(3) for what in CONV_BN),
    *(f'decode_head.{kind}.{what}' for kind in ('bottleneck', 'fpn_bottleneck') for what in CONV_BN),
    *(f'auxiliary_head.convs.0.{what}' for what in CONV_BN),
]
WIDTHS = [16, 32, 64, 128]


@pytest.fixture(scope='module')
def build(root):
    """Build one of the project's model configs, narrow."""

    def build(name, arch, **backbone):
        cfg = Config.fromfile(root / 'configs' / '_base_' / 'models' / name).model
        cfg.backbone = dict(type='mila_mm.MILA', arch=arch, **backbone)
        if name.startswith('mask'):
            init_default_scope('mmdet')
            cfg.neck.update(in_channels=WIDTHS, out_channels=16)
            cfg.rpn_head.update(in_channels=16, feat_channels=16)
            for head in ('bbox', 'mask'):
                cfg.roi_head[f'{head}_roi_extractor'].out_channels = 16
                cfg.roi_head[f'{head}_head'].in_channels = 16
            cfg.roi_head.bbox_head.fc_out_channels = 16
            cfg.roi_head.mask_head.conv_out_channels = 16
        else:
            init_default_scope('mmseg')
            cfg.decode_head.update(in_channels=WIDTHS, channels=16, norm_cfg=dict(type='BN'))
            cfg.auxiliary_head.update(in_channels=64, channels=16, norm_cfg=dict(type='BN'))
        return MODELS.build(cfg)

    return build


CASES = [
    pytest.param('mask_rcnn_mila.py', MMDET_2, id='Mask R-CNN'),
    pytest.param('upernet_mila.py', MMSEG_0, id='UperNet'),
]


def file_of_that_era(path, model, dense, heads):
    """Write what the released detection and segmentation code leaves behind."""
    shapes, generator = model.state_dict(), torch.Generator().manual_seed(5)
    weights = OrderedDict((f'backbone.{name}', value) for name, value in dense.items())
    for name in heads:
        count = name.endswith('num_batches_tracked')
        weights[name] = torch.tensor(7) if count else torch.rand(shapes[name].shape, generator=generator)
    weights.update(rope_tables(weights, 'backbone.', 224))  # buffers also in its dense backbones
    torch.save(
        {
            'meta': {
                'mmdet_version': '2.11.0',
                'config': 'raise SystemExit(9)',
                'CLASSES': ('a', 'b'),
                'epoch': 36,
                'iter': 5,
            },
            'state_dict': weights,
            'optimizer': {'state': {}, 'param_groups': []},
        },
        path,
    )
    return weights


@pytest.mark.parametrize(('config', 'heads'), CASES)
def test_published_file_loads_whole(config, heads, build, dense, micro, tmp_path):
    model = build(config, micro['arch'])
    weights = file_of_that_era(tmp_path / 'old.pth', model, dense, heads)
    report = load_model(model, tmp_path / 'old.pth')
    assert report.complete
    assert not report.fresh
    assert report.loaded == len(dense) + len(heads) == len(model.state_dict())
    assert [len(names) for names in report.dropped.values()] == [5]  # a RoPE table for each block
    own = model.state_dict()
    assert all(torch.equal(own[name], weights[name]) for name in own)
    # the same into the backbone alone, and through the functions of mmdet and mmseg
    backbone = MILA(**micro)
    assert load_backbone(backbone, tmp_path / 'old.pth').loaded == len(dense)
    again = build(config, micro['arch'])
    mmengine_load_checkpoint(again, str(tmp_path / 'old.pth'), map_location='cpu', strict=True)
    assert all(torch.equal(value, own[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize(('config', 'heads'), CASES)
def test_other_number_of_classes_is_an_error_unless_told(config, heads, build, dense, micro, tmp_path):
    model = build(config, micro['arch'])
    file_of_that_era(tmp_path / 'old.pth', model, dense, heads)
    content = torch.load(tmp_path / 'old.pth')
    last = next(name for name in heads if name.endswith(('fc_cls.weight', 'decode_head.conv_seg.weight')))
    content['state_dict'][last] = content['state_dict'][last][:3]
    torch.save(content, tmp_path / 'old.pth')
    kept = model.state_dict()[last].clone()
    with pytest.raises(MismatchError, match=last):
        load_model(model, tmp_path / 'old.pth')
    report = load_model(model, tmp_path / 'old.pth', strict=False)
    assert [entry.partition(': ')[0] for entry in report.mismatched] == [last]
    assert torch.equal(model.state_dict()[last], kept)


def test_detector_of_mmdet_1_is_not_taken_for_one_of_mmdet_2(build, dense, micro, tmp_path):
    """Its classes are numbered otherwise: renaming its heads would load wrong weights without a word."""
    model = build('mask_rcnn_mila.py', micro['arch'])
    weights = file_of_that_era(tmp_path / 'old.pth', model, dense, MMDET_2)
    old = {name.removeprefix('roi_head.'): value for name, value in weights.items()}
    torch.save({'state_dict': old}, tmp_path / 'older.pth')
    with pytest.raises(MismatchError, match=r'20 missing: roi_head'):
        load_model(model, tmp_path / 'older.pth')


# Layer-wise learning rates


@pytest.mark.parametrize(
    ('recipe', 'heads_prefix'),
    [('mask_rcnn_mila_t_1x_layer_decay.py', 'roi_head.'), ('upernet_mila_t_160k_layer_decay.py', 'decode_head.')],
)
def test_layers_of_the_backbone_learn_at_their_own_rates(recipe, heads_prefix, build, micro, root):
    cfg = Config.fromfile(root / 'configs' / recipe)
    model = build('mask_rcnn_mila.py' if 'mask' in recipe else 'upernet_mila.py', micro['arch'])
    rate, base = cfg.optim_wrapper.paramwise_cfg.layer_decay_rate, cfg.optim_wrapper.optimizer.lr
    wrapper = build_optim_wrapper(model, copy.deepcopy(cfg.optim_wrapper))
    names = {id(param): name for name, param in model.named_parameters()}
    groups = {names[id(group['params'][0])]: group for group in wrapper.optimizer.param_groups}
    assert set(groups) == set(names.values())
    depths = {
        'patch_embed.conv1.conv.weight': 0,
        'layers.0.blocks.0.cpe1.weight': 1,
        'layers.0.downsample.conv.0.conv.weight': 1,
        'layers.1.blocks.0.mlp.fc1.bias': 2,
        'layers.2.blocks.0.cpe1.bias': 3,
        'layers.2.blocks.1.cpe1.bias': 4,
        'layers.2.downsample.conv.2.norm.weight': 4,
        'layers.3.blocks.0.norm2.weight': 5,
        'norm0.weight': 6,
        'norm3.bias': 6,
    }
    for name, depth in depths.items():
        group = groups['backbone.' + name]
        assert group['lr'] == pytest.approx(base * rate ** (6 - depth)), name
        expected = 0.0 if 'norm' in name else cfg.optim_wrapper.optimizer.weight_decay
        assert group['weight_decay'] == expected, name
    assert all(group['lr'] == base for name, group in groups.items() if not name.startswith('backbone.'))
    assert any(name.startswith(heads_prefix) for name in groups)
    rates = [groups[f'backbone.layers.2.blocks.{i}.attn.qk.weight']['lr'] for i in range(2)]
    assert rates[0] < rates[1] < base


def test_depth_counts_only_what_is_built():
    model = MILA('nano', out_indices=(0, 1))
    depths = {name: model.get_layer_depth(name) for name, _ in model.named_parameters()}
    assert {total for _, total in depths.values()} == {4}
    assert depths['norm1.weight'] == (3, 4)
    assert depths['layers.1.blocks.0.attn.qk.weight'] == (2, 4)
    assert model.get_layer_depth('a.b.patch_embed.conv1.conv.weight', 'a.b.') == (0, 4)


@pytest.mark.parametrize(
    'paramwise', [None, {}, {'layer_decay_rate': 0}, {'layer_decay_rate': 1.5}, {'layer_decay_rate': 'fast'}]
)
def test_wrong_decay_rate_is_named(paramwise, build, micro):
    model = build('upernet_mila.py', micro['arch'])
    with pytest.raises(UserError, match='layer_decay_rate: expected a number'):
        build_optim_wrapper(
            model,
            dict(
                constructor='mila_mm.LayerDecayOptimWrapperConstructor',
                optimizer=dict(type='SGD', lr=1.0),
                paramwise_cfg=paramwise,
            ),
        )


def test_backbone_without_depths_is_named():
    model = torch.nn.Module()
    model.backbone = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match='get_layer_depth'):
        build_optim_wrapper(
            model,
            dict(
                constructor='mila_mm.LayerDecayOptimWrapperConstructor',
                optimizer=dict(type='SGD', lr=1.0),
                paramwise_cfg=dict(layer_decay_rate=0.5),
            ),
        )
