"""Small models of every family that can be exported, trained for a few steps on drawn shapes so that they find some."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS as REGISTRY
from mmengine.registry import init_default_scope

from mila_mm.datasets import write_shapes
from mila_mm.engine import load_config, scope_of

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
CLASSES = ('circle', 'square', 'triangle', 'star', 'cross', 'ring')

BACKBONE = "backbone=dict(arch='nano', init_cfg=None, drop_path_rate=0.0{norm})"
PYRAMID = f'{BACKBONE.format(norm="")}, neck=dict(in_channels=[64, 128, 256], out_channels=32)'

MODELS = {
    'mask_rcnn': (
        'mask_rcnn_mila_t_1x',
        f"""{BACKBONE.format(norm='')}, neck=dict(in_channels=[32, 64, 128, 256], out_channels=32),
        rpn_head=dict(in_channels=32, feat_channels=32, anchor_generator=dict(scales=[4])),
        roi_head=dict(
            bbox_roi_extractor=dict(out_channels=32), mask_roi_extractor=dict(out_channels=32),
            bbox_head=dict(in_channels=32, fc_out_channels=64, num_classes=6),
            mask_head=dict(in_channels=32, conv_out_channels=16, num_convs=1, num_classes=6)),
        test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=60), rcnn=dict(max_per_img=20))""",
    ),
    'faster_rcnn': ('mask_rcnn_mila_t_1x', None),
    'cascade_mask_rcnn': (
        'swapped/cascade_mask_rcnn_mila_t_1x',
        f"""{BACKBONE.format(norm='')}, neck=dict(in_channels=[32, 64, 128, 256], out_channels=32),
        rpn_head=dict(in_channels=32, feat_channels=32, anchor_generator=dict(scales=[4])),
        roi_head=dict(
            bbox_roi_extractor=dict(out_channels=32), mask_roi_extractor=dict(out_channels=32),
            bbox_head=[dict(type='Shared2FCBBoxHead', in_channels=32, fc_out_channels=64, roi_feat_size=7,
                num_classes=6, reg_class_agnostic=agnostic,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[std, std, 2 * std, 2 * std]),
                loss_cls=dict(type='CrossEntropyLoss'), loss_bbox=dict(type='SmoothL1Loss'))
                for std, agnostic in ((0.1, True), (0.067, False), (0.033, True))],
            mask_head=dict(in_channels=32, conv_out_channels=16, num_convs=1, num_classes=6)),
        test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=60), rcnn=dict(max_per_img=20))""",
    ),
    'retinanet': (
        'swapped/retinanet_mila_t_1x',
        f"""{PYRAMID}, bbox_head=dict(num_classes=6, in_channels=32, feat_channels=32, stacked_convs=1),
        test_cfg=dict(nms_pre=200, max_per_img=30)""",
    ),
    'atss': (
        'swapped/atss_mila_t_1x',
        f"""{PYRAMID}, bbox_head=dict(num_classes=6, in_channels=32, feat_channels=64, stacked_convs=1),
        test_cfg=dict(nms_pre=200, max_per_img=30)""",
    ),
    'rtmdet': (
        'swapped/rtmdet_mila_t_300e',
        f"""data_preprocessor=dict(batch_augments=None), {BACKBONE.format(norm=", norm_cfg=dict(type='BN')")},
        neck=dict(in_channels=[64, 128, 256], out_channels=32, num_csp_blocks=1, norm_cfg=dict(type='BN')),
        bbox_head=dict(num_classes=6, in_channels=32, feat_channels=32, stacked_convs=1, norm_cfg=dict(type='BN'))""",
    ),
    'dino': (
        'swapped/dino_mila_t_12e',
        f"""num_queries=40, {BACKBONE.format(norm='')}, neck=dict(in_channels=[64, 128, 256]),
        encoder=dict(num_layers=1), decoder=dict(num_layers=2), bbox_head=dict(num_classes=6),
        dn_cfg=dict(group_cfg=dict(num_dn_queries=10)), test_cfg=dict(max_per_img=30)""",
    ),
    'upernet': (
        'upernet_mila_t_160k',
        f"""data_preprocessor=dict(size=(96, 96)), {BACKBONE.format(norm='')},
        decode_head=dict(in_channels=[32, 64, 128, 256], channels=16, num_classes=7, norm_cfg=dict(type='BN')),
        auxiliary_head=dict(in_channels=128, channels=8, num_classes=7, norm_cfg=dict(type='BN'))""",
    ),
    'segformer': (
        'swapped/segformer_mila_t_160k_ade20k',
        f"""data_preprocessor=dict(size=(96, 96)), {BACKBONE.format(norm='')},
        decode_head=dict(in_channels=[32, 64, 128, 256], channels=16, num_classes=7, norm_cfg=dict(type='BN'))""",
    ),
    'deeplabv3plus': (
        'swapped/deeplabv3plus_mila_t_160k_ade20k',
        f"""data_preprocessor=dict(size=(96, 96)), {BACKBONE.format(norm=", norm_cfg=dict(type='BN')")},
        decode_head=dict(in_channels=256, channels=16, c1_in_channels=32, c1_channels=8, num_classes=7,
            norm_cfg=dict(type='BN')),
        auxiliary_head=dict(in_channels=128, channels=8, num_classes=7, norm_cfg=dict(type='BN'))""",
    ),
    'classifier': ('imagenet/mila_t_in1k', "arch='nano', num_classes=5, drop_path_rate=0.0"),
}

RUN = """
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper', optimizer=dict(type='AdamW', lr={lr}), clip_grad=dict(max_norm=10.0))
param_scheduler = []
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters={steps}, val_interval=100000)
default_hooks = dict(
    checkpoint=dict(_delete_=True, type='CheckpointHook', by_epoch=False, interval={steps}, save_optimizer=False))
custom_hooks = []
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
train_dataloader = dict(
    _delete_=True, batch_size=4, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True), dataset=dataset)
val_dataloader = val_cfg = val_evaluator = None
test_dataloader = dict(
    _delete_=True, batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset)
"""
DETECTION = """
dataset = dict(
    type='CocoDataset', data_root={data!r}, ann_file='annotations/instances_train.json',
    data_prefix=dict(img='images/training/'), metainfo=dict(classes={classes!r}), serialize_data=False,
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask={masks}),
        dict(type='PackDetInputs')])
"""
SEGMENTATION = """
dataset = dict(
    type='BaseSegDataset', data_root={data!r}, img_suffix='.png', reduce_zero_label=True, serialize_data=False,
    metainfo=dict(classes={classes!r}),
    data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')])
"""


@dataclass(frozen=True)
class Trained:
    """A config, a checkpoint of it, and the images that it was trained on."""

    config: str
    checkpoint: str
    images: str


@pytest.fixture(scope='session', autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread: images of 96 pixels are too small to share, and threads wait long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen training images of 96 pixels in both layouts. Not to be changed by a test."""
    return write_shapes(tmp_path_factory.mktemp('data') / 'shapes', num_train=16, num_val=1, size=96, seed=0)


def _text(name: str, data: Path) -> str:
    base, changes = MODELS[name]
    if name == 'faster_rcnn':
        changes = MODELS['mask_rcnn'][1].replace('roi_head=dict(', 'roi_head=dict(mask_head=None, ', 1)
        head = changes.index('mask_head=dict(')
        changes = changes[:head].rstrip(', \n') + changes[changes.index(')),', head) + 1 :]
    if name == 'classifier':
        return f'_base_ = {str(CONFIGS / base)!r} + ".py"\nmodel = dict({changes})\n'
    detects = name not in ('upernet', 'segformer', 'deeplabv3plus')
    classes = CLASSES if detects else (*CLASSES, 'ground')
    return (
        f'_base_ = {str(CONFIGS / base)!r} + ".py"\nmodel = dict({changes})\n'
        + (DETECTION if detects else SEGMENTATION).format(data=str(data), classes=classes, masks='mask' in name)
        + RUN.format(steps=os.environ.get('MILA_MM_EXPORT_STEPS', '30'), lr=2e-3 if name != 'dino' else 3e-4)
    )


def awaken(model: torch.nn.Module) -> None:
    """Give a fresh model scores that differ and pass thresholds, and statistics that are no identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    scores = ('retina_cls', 'atss_cls.', 'rtm_cls', 'rpn_cls', 'fc_cls', 'cls_branches', 'conv_seg')
    for name, parameter in model.named_parameters():
        if any(part in name for part in scores) and 'weight' in name:
            parameter.data.mul_(0.5 / (parameter.data.std() * parameter[0].numel() ** 0.5))
        elif any(part in name for part in scores):
            parameter.data.normal_(-1, 1, generator=generator)


@pytest.fixture(scope='session')
def ready(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Callable[[str], Trained]:
    """A model of ``MODELS`` by its name, not trained, but with results to compare."""
    done: dict[str, Trained] = {}

    def make(name: str) -> Trained:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            config = folder / f'{name}.py'
            config.write_text(_text(name, shapes), encoding='utf-8')
            cfg = load_config(str(config))
            init_default_scope(scope_of(cfg))
            torch.manual_seed(1)
            model = REGISTRY.build(cfg.model)
            awaken(model)
            torch.save({'state_dict': model.state_dict(), 'meta': {}}, folder / 'model.pth')
            done[name] = Trained(str(config), str(folder / 'model.pth'), str(shapes / 'images' / 'training'))
        return done[name]

    return make


@pytest.fixture(scope='session')
def trained(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Callable[[str], Trained]:
    """Train a model of ``MODELS`` by its name, once in a session."""
    done: dict[str, Trained] = {}

    def train(name: str) -> Trained:
        if name not in done:
            from mmengine.utils import ManagerMixin

            from mila_mm.engine import train as train_config

            for kind in (ManagerMixin, *ManagerMixin.__subclasses__()):
                vars(kind).get('_instance_dict', {}).clear()
            folder = tmp_path_factory.mktemp(name)
            config = folder / f'{name}.py'
            config.write_text(_text(name, shapes), encoding='utf-8')
            train_config(str(config), work_dir=str(folder / 'run'))
            checkpoint = next((folder / 'run').glob('iter_*.pth'))
            done[name] = Trained(str(config), str(checkpoint), str(shapes / 'images' / 'training'))
        return done[name]

    return train
