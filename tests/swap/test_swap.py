"""Swaps of whole configs: what is rewired, what is refused, and what the written child reads back as."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

import mila_mm
from mila_mm.errors import UserError
from mila_mm.swap import SwapFailed, SwapRefused, plan_swap, swap_backbone, write_child
from mila_mm.swap.light import build, in_scope

ROOT = Path(__file__).resolve().parents[2]

DETECTOR = """
_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'
default_scope = 'mmdet'
"""


@pytest.fixture
def write(tmp_path):
    """Write a config of a user's and return its path."""

    def write(text: str, name: str = 'mine.py') -> str:
        path = tmp_path / 'configs' / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


def quick(config, **options):
    """Swap, running the heads only where they see a change."""
    return plan_swap(config, 'nano', whole_models=False, **options)


def why(result) -> dict[str, object]:
    return {change.key: change.new for change in result.changes}


def test_retinanet_whole() -> None:
    result = plan_swap('mmdet::retinanet/retinanet_r50_fpn_1x_coco')
    model = result.config.model
    assert model.backbone.type == 'mila_mm.MILA' and model.backbone.arch == 'tiny'
    # stage 0 has no reader: its output norm would be a parameter without a gradient
    assert model.backbone.out_indices == (1, 2, 3)
    assert (model.neck.in_channels, model.neck.start_level, model.neck.out_channels) == ([128, 256, 512], 0, 256)
    assert 'training loss computed' in result.checked
    assert result.old_maps.channels == (256, 512, 1024, 2048) and result.old_maps.strides == (4, 8, 16, 32)
    assert str(result.new_maps) == '128 at 1/8, 256 at 1/16, 512 at 1/32'
    assert any('SGD' in u for u in result.unknowns) and any('--weights' in u for u in result.unknowns)


def test_every_parameter_of_a_swapped_model_gets_a_gradient(write) -> None:
    """Maps that nothing reads are gone: distributed training stops at parameters without a gradient."""
    from mila_mm.swap.samples import make_batch
    from mila_mm.swap.trial import for_trial, sum_of_losses

    cfg = quick('mmseg::_base_/models/deeplabv3plus_r50-d8.py').config
    assert cfg.model.backbone.out_indices == (0, 2, 3)
    assert (cfg.model.decode_head.in_index, cfg.model.auxiliary_head.in_index) == (2, 1)
    assert (cfg.model.decode_head.in_channels, cfg.model.decode_head.c1_in_channels) == (256, 32)
    plain = for_trial(cfg.model.to_dict(), 'mmseg')
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(build(plain, 'mmseg'))
    from mmengine.model import revert_sync_batchnorm

    model = revert_sync_batchnorm(model).train()
    model.data_preprocessor.size = (64, 96)
    with in_scope('mmseg'):
        data = model.data_preprocessor(make_batch(plain, 'mmseg', (64, 96)), True)
        sum_of_losses(model(**data, mode='loss')).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ('config', 'expected'),
    [
        (
            'mmdet::ssd/ssd300_coco',
            {
                'model.neck.in_channels': (64, 128),
                'model.neck.out_channels': (64, 128, 512, 256, 256, 256),
                'model.bbox_head.in_channels': (64, 128, 512, 256, 256, 256),
            },
        ),
        # as wide as the image is long
        (
            'mmdet::ssd/ssd512_coco',
            {
                'model.neck.out_channels': (64, 128, 512, 256, 256, 256, 256),
                'model.bbox_head.anchor_generator.input_size': 'unchanged',
            },
        ),
        ('mmdet::yolo/yolov3_d53_8xb8-320-273e_coco', {'model.neck.in_channels': [256, 128, 64]}),
        ('mmdet::yolof/yolof_r50-c5_8xb8-1x_coco', {'model.neck.in_channels': 256}),
        (
            'mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco',
            {'model.rpn_head.in_channels': 128, 'model.roi_head.bbox_head.in_channels': 128},
        ),
        (
            'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco',
            {'model.panoptic_head.in_channels': [32, 64, 128, 256]},
        ),
        (
            'mmdet::qdtrack/qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval',
            {'model.detector.neck.in_channels': [32, 64, 128, 256]},
        ),
        ('mmdet::nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco', {'model.neck.in_channels': [64, 128, 256]}),
        (
            'mmseg::_base_/models/upernet_r50.py',
            {'model.decode_head.in_channels': [32, 64, 128, 256], 'model.auxiliary_head.in_channels': 128},
        ),
        (
            'mmseg::_base_/models/ocrnet_r50-d8.py',
            {'model.decode_head.0.in_channels': 256, 'model.decode_head.1.in_channels': 256},
        ),
        ('mmseg::_base_/models/fcn_hr18.py', {'model.decode_head.in_channels': [32, 64, 128, 256]}),
        ('mmseg::_base_/models/upernet_vit-b16_ln_mln.py', {'model.neck.scales': [1, 1, 1, 1]}),
        (
            'mmseg::_base_/models/upernet_beit.py',
            {'model.neck': None, 'model.decode_head.in_channels': [32, 64, 128, 256]},
        ),
        ('mmseg::_base_/models/fastfcn_r50-d32_jpu_psp.py', {'model.neck.in_channels': (64, 128, 256)}),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_consumers_are_rewired(config, expected) -> None:
    found = why(quick(config))
    assert {key: found.get(key, 'unchanged') for key in expected} == expected


@pytest.mark.parametrize(
    ('config', 'words'),
    [
        ('mmdet::_base_/datasets/coco_detection.py', 'fragment'),
        ('mmdet::faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco', 'shared_head'),
        ('mmdet::cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco', 'tied to the strides'),
        ('mmdet::detectors/detectors_htc-r50_1x_coco', 'image itself'),
        ('mmseg::_base_/models/bisenetv1_r18-d32.py', 'wraps another backbone'),
        ('mmseg::_base_/models/stdc.py', 'wraps another backbone'),
        ('mmseg::_base_/models/fcn_unet_s5-d16.py', 'decoder'),
        ('mmseg::_base_/models/dpt_vit-b16.py', 'class tokens'),
        ('mmseg::_base_/models/setr_mla.py', 'maps of one size'),
        ('mmseg::_base_/models/lraspp_m-v3-d8.py', 'fixed input grid'),
        ('mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes', 'in training'),
        ('mmseg::_base_/models/san_vit-b16.py', 'image_encoder'),
        # does not fit its own backbone, an argument that no FPN of the library takes
        ('mmseg::_base_/models/fpn_poolformer_s12.py', r'own backbone either: neck FPN'),
        ('mmdet::v3det/fcos_swinb_fpn_8x4_sample1e-3_mstrain_v3det_2x', 'own backbone either: .* .force_grad_on_level'),
    ],
)
def test_refusals_name_their_reason(config, words) -> None:
    with pytest.raises(UserError, match=words) as caught:
        quick(config)
    assert not isinstance(caught.value, SwapFailed)
    assert len(str(caught.value).splitlines()) <= 2


def test_what_belongs_to_the_old_backbone_goes() -> None:
    changed = why(quick('mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640'))
    assert changed['model.pretrained'] is None
    assert changed['optim_wrapper.constructor'] == 'mila_mm.LayerDecayOptimWrapperConstructor'
    assert changed['optim_wrapper.paramwise_cfg']['layer_decay_rate'] == 0.9
    changed = why(quick('mmdet::faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco'))
    assert changed['model.data_preprocessor.std'] == [58.395, 57.12, 57.375]
    assert changed['model.data_preprocessor.bgr_to_rgb'] is True


def test_norms_of_mila_take_the_place_of_the_old_norms() -> None:
    """Where a general entry for the backbone hides 'norm', each norm is named; the optimizer then agrees."""
    result = quick('mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco')
    keys = result.config.optim_wrapper.paramwise_cfg.custom_keys
    assert not any('stages' in key or 'absolute_pos' in key for key in keys) and 'query_feat' in keys
    model = torch.nn.Module()
    model.backbone = build(result.config.model.backbone.to_dict(), 'mmdet')
    cfg = result.config.optim_wrapper.copy()
    cfg.pop('constructor', None)
    groups = build_optim_wrapper(model, cfg).optimizer.param_groups
    decays = {
        name: group['weight_decay']
        for group in groups
        for name, p in model.named_parameters()
        if p is group['params'][0]
    }
    assert all((decay == 0) == ('norm' in name) for name, decay in decays.items())
    assert {round(group['lr'], 8) for group in groups} == {1e-5}


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_mila_recipe(scope) -> None:
    name = {
        'mmdet': 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco',
        'mmseg': 'mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512',
    }[scope]
    cfg = quick(name, recipe='mila').config
    optimizer = cfg.optim_wrapper.optimizer
    expected = {'mmdet': ('AdamW', 1e-4, 0.05), 'mmseg': ('AdamW', 6e-5, 0.01)}[scope]
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == expected and 'momentum' not in optimizer
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys == {'norm': {'decay_mult': 0.0}}
    warmup = cfg.param_scheduler[0]
    assert (warmup.type, warmup.by_epoch, warmup.end) == ('LinearLR', False, {'mmdet': 500, 'mmseg': 1500}[scope])
    if scope == 'mmseg':
        assert cfg.param_scheduler[1].begin == 1500
        # 1e-4 was a hundredth of SGD's rate; under AdamW's 6e-5 it would make the rate grow
        assert cfg.param_scheduler[1].eta_min == pytest.approx(6e-7)
    untouched = quick(name).config
    assert untouched.optim_wrapper.optimizer.type == 'SGD'


def test_recipe_scales_to_the_batch_and_keeps_adamw(write) -> None:
    base = "_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n"
    cfg = quick(write(base + 'auto_scale_lr = dict(base_batch_size=64)'), recipe='mila').config
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(4e-4)
    adam = "optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=2e-3))"
    result = quick(write(base + adam), recipe='mila')
    assert result.config.optim_wrapper.optimizer.lr == 2e-3
    assert any('AdamW already' in u for u in result.unknowns)


def test_a_config_of_a_user(write) -> None:
    """Deleted and nested parts, a backbone of another width, an image of four channels, frozen, weights to drop."""
    path = write(
        DETECTOR
        + """
load_from = 'old_detector.pth'
model = dict(
    data_preprocessor=dict(mean=[0.0] * 4, std=[1.0] * 4),
    backbone=dict(_delete_=True, type='ResNet', depth=18, in_channels=4, out_indices=(1, 2, 3), frozen_stages=4,
                  norm_cfg=dict(type='SyncBN'), with_cp=True),
    neck=dict(_delete_=True, type='FPN', in_channels=[128, 256, 512], out_channels=32, num_outs=5),
    bbox_head=dict(in_channels=32, feat_channels=32, num_classes=3))
"""
    )
    result = quick(path, drop_path_rate=0.05)
    backbone = result.config.model.backbone
    assert backbone == dict(
        type='mila_mm.MILA',
        arch='nano',
        in_channels=4,
        out_indices=(1, 2, 3),
        drop_path_rate=0.05,
        norm_cfg=dict(type='SyncBN'),
        with_cp=True,
        frozen_stages=4,
        norm_eval=True,
    )
    assert result.config.model.neck.in_channels == [64, 128, 256] and result.config.load_from is None
    told = ' '.join(result.unknowns)
    for words in ('old_detector.pth', '4 channels', 'did not learn at all'):
        assert words in told


def test_a_backbone_that_cannot_be_built_is_known_by_its_consumers(write) -> None:
    path = write(
        DETECTOR
        + """
custom_imports = dict(imports=['nobody_has_this.models'], allow_failed_imports=False)
model = dict(
    backbone=dict(_delete_=True, type='nobody_has_this.Net', out_indices=[0, 1, 2, 3]),
    neck=dict(in_channels=[80, 160, 320, 640]))
"""
    )
    result = quick(path)
    assert result.config.model.neck.in_channels == [64, 128, 256]
    assert any('cannot be built here' in u and '80 at 1/4' in u for u in result.unknowns)
    # without this the child could not be read where the package is missing
    assert result.config.custom_imports.imports == []
    hook = "custom_hooks = [dict(type='HookOfNobody')]\n"
    kept = quick(write(Path(path).read_text() + hook))
    assert kept.config.custom_imports.imports == ['nobody_has_this.models']
    assert any('nobody_has_this.models cannot be imported here' in u and 'it stays' in u for u in kept.unknowns)


def test_a_teacher_keeps_its_backbone() -> None:
    result = quick('mmdet::lad/lad_r101-paa-r50_fpn_2xb8_coco_1x')
    assert result.config.model.teacher_backbone.type == 'ResNet' and result.config.model.backbone.type == 'mila_mm.MILA'
    assert any('teacher_backbone' in u for u in result.unknowns)


def test_semi_supervised_detector_is_swapped_inside() -> None:
    result = quick('mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco')
    assert result.config.model.detector.backbone.type == 'mila_mm.MILA'
    assert result.config.model.detector.neck.in_channels == [32, 64, 128, 256]
    assert result.config.model.data_preprocessor.data_preprocessor.std == [58.395, 57.12, 57.375]


def test_a_head_that_never_fitted_its_backbone_is_refused(write) -> None:
    heads = 'model = dict(backbone=dict(depth=18), decode_head=dict(in_channels=2048), auxiliary_head=None)\n'
    path = write("_base_ = 'mmseg::_base_/models/fcn_r50-d8.py'\ndefault_scope = 'mmseg'\n" + heads)
    with pytest.raises(SwapRefused, match='own backbone either'):
        quick(path)


def test_config_in_memory_is_not_changed() -> None:
    original = Config.fromfile(ROOT / 'configs/mask_rcnn_mila_t_1x.py')
    with pytest.raises(SwapRefused, match='MILA already'):
        swap_backbone(original)
    original.model.backbone = dict(type='ResNet', depth=50, out_indices=(0, 1, 2, 3))
    original.model.neck.in_channels = [256, 512, 1024, 2048]
    before = original._cfg_dict.to_dict()
    swapped = mila_mm.swap_backbone(original, 'base')
    assert swapped.model.neck.in_channels == [96, 192, 384, 768]
    assert original._cfg_dict.to_dict() == before


@pytest.mark.parametrize(
    'config',
    [
        'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco',
        'mmseg::ocrnet/ocrnet_hr18_4xb4-160k_ade20k-512x512',
        'mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640',
    ],
)
def test_written_child_reads_back_as_the_function_returns(config, tmp_path) -> None:
    result = plan_swap(config, recipe='mila', weights='mila://tiny-in1k', whole_models=False)
    out = tmp_path / 'deep' / 'child.py'
    write_child(result, out)
    assert Config.fromfile(out)._cfg_dict.to_dict() == result.config._cfg_dict.to_dict()
    text = out.read_text()
    assert len(text.splitlines()) < 60 and f"_base_ = '{config}.py'" in text
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize(
    'config', ['mmdet::gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco', 'mmdet::legacy_1.x/retinanet_r50_fpn_1x_coco_v1']
)
def test_a_folder_that_mmengine_cannot_name_is_reached_by_its_path(config, tmp_path) -> None:
    result = plan_swap(config, whole_models=False)
    out = tmp_path / 'child.py'
    write_child(result, out)
    assert '::' not in out.read_text()
    assert Config.fromfile(out)._cfg_dict.to_dict() == result.config._cfg_dict.to_dict()


def test_child_of_a_file_inherits_by_a_relative_path(write, tmp_path) -> None:
    result = quick(write(DETECTOR))
    out = tmp_path / 'elsewhere' / 'child.py'
    write_child(result, out)
    assert "_base_ = '../configs/mine.py'" in out.read_text()
    assert Config.fromfile(out).model.neck.in_channels == result.config.model.neck.in_channels
    with pytest.raises(UserError, match='config itself'):
        write_child(result, tmp_path / 'configs' / 'mine.py')


def test_lazy_style_is_refused(write) -> None:
    path = write('from mmengine.config import read_base\nwith read_base():\n    from .other import *\n')
    with pytest.raises(SwapRefused, match='ordinary style'):
        swap_backbone(path)
