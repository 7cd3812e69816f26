"""Small models of every family that can be exported: fresh ones, and trained for a few steps on photographs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS as REGISTRY
from mmengine.registry import init_default_scope
from mmengine.utils import ManagerMixin

from mila_mm import cli
from mila_mm.cli import export as command
from mila_mm.datasets import write_shapes
from mila_mm.engine import load_config, scope_of

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
CLASSES = ('circle', 'square', 'triangle', 'star', 'cross', 'ring')

BACKBONE = "backbone=dict(arch='nano', init_cfg=None, drop_path_rate=0.0{norm})"
PYRAMID = f'{BACKBONE.format(norm="")}, neck=dict(in_channels=[64, 128, 256], out_channels=32)'

PROPOSALS = """rpn_head=dict(in_channels=32, feat_channels=32, anchor_generator=dict(scales=[4])),
        test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=60), rcnn=dict(max_per_img=20))"""
ONE_STAGE = 'dict(in_channels=32, fc_out_channels=64, num_classes=classes)'
THREE_STAGES = """[dict(type='Shared2FCBBoxHead', in_channels=32, fc_out_channels=64, roi_feat_size=7,
            num_classes=classes, reg_class_agnostic=agnostic,
            bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[std, std, 2 * std, 2 * std]),
            loss_cls=dict(type='CrossEntropyLoss'), loss_bbox=dict(type='SmoothL1Loss'))
            for std, agnostic in ((0.1, True), (0.067, False), (0.033, True))]"""


def _two_stages(box_head: str, masks: bool) -> str:
    mask = """mask_roi_extractor=dict(out_channels=32),
            mask_head=dict(in_channels=32, conv_out_channels=16, num_convs=1, num_classes=classes)"""
    return f"""{BACKBONE.format(norm='')}, neck=dict(in_channels=[32, 64, 128, 256], out_channels=32), {PROPOSALS},
        roi_head=dict(bbox_roi_extractor=dict(out_channels=32), bbox_head={box_head},
            {mask if masks else 'mask_head=None'})"""


MODELS = {
    'mask_rcnn': ('mask_rcnn_mila_t_1x', _two_stages(ONE_STAGE, masks=True)),
    'faster_rcnn': ('mask_rcnn_mila_t_1x', _two_stages(ONE_STAGE, masks=False)),
    'cascade_mask_rcnn': ('swapped/cascade_mask_rcnn_mila_t_1x', _two_stages(THREE_STAGES, masks=True)),
    'cascade_rcnn': ('swapped/cascade_mask_rcnn_mila_t_1x', _two_stages(THREE_STAGES, masks=False)),
    'retinanet': (
        'swapped/retinanet_mila_t_1x',
        f"""{PYRAMID}, bbox_head=dict(num_classes=classes, in_channels=32, feat_channels=32, stacked_convs=1),
        test_cfg=dict(nms_pre=200, max_per_img=30)""",
    ),
    'atss': (
        'swapped/atss_mila_t_1x',
        f"""{PYRAMID}, bbox_head=dict(num_classes=classes, in_channels=32, feat_channels=64, stacked_convs=1),
        test_cfg=dict(nms_pre=200, max_per_img=30)""",
    ),
    'rtmdet': (
        'swapped/rtmdet_mila_t_300e',
        f"""data_preprocessor=dict(batch_augments=None), {BACKBONE.format(norm=", norm_cfg=dict(type='BN')")},
        neck=dict(in_channels=[64, 128, 256], out_channels=32, num_csp_blocks=1, norm_cfg=dict(type='BN')),
        bbox_head=dict(
            num_classes=classes, in_channels=32, feat_channels=32, stacked_convs=1, norm_cfg=dict(type='BN')),
        test_cfg=dict(score_thr=0.02)""",
    ),
    'fcos': (
        'swapped/retinanet_mila_t_1x',
        f"""{PYRAMID}, bbox_head=dict(_delete_=True, type='FCOSHead', num_classes=classes, in_channels=32,
            feat_channels=64, stacked_convs=1, strides=[8, 16, 32, 64, 128], norm_on_bbox=True,
            centerness_on_reg=True), test_cfg=dict(nms_pre=200, max_per_img=30)""",
    ),
    'dino': (
        'swapped/dino_mila_t_12e',
        f"""num_queries=40, {BACKBONE.format(norm='')}, neck=dict(in_channels=[64, 128, 256]),
        encoder=dict(num_layers=1), decoder=dict(num_layers=2), bbox_head=dict(num_classes=classes),
        dn_cfg=dict(group_cfg=dict(num_dn_queries=10)), test_cfg=dict(max_per_img=30)""",
    ),
    'upernet': (
        'upernet_mila_t_160k',
        f"""data_preprocessor=dict(size=side), {BACKBONE.format(norm='')},
        decode_head=dict(in_channels=[32, 64, 128, 256], channels=16, num_classes=classes, norm_cfg=dict(type='BN')),
        auxiliary_head=dict(in_channels=128, channels=8, num_classes=classes, norm_cfg=dict(type='BN'))""",
    ),
    'segformer': (
        'swapped/segformer_mila_t_160k_ade20k',
        f"""data_preprocessor=dict(size=side), {BACKBONE.format(norm='')},
        decode_head=dict(in_channels=[32, 64, 128, 256], channels=16, num_classes=classes, norm_cfg=dict(type='BN'))""",
    ),
    'deeplabv3plus': (
        'swapped/deeplabv3plus_mila_t_160k_ade20k',
        f"""data_preprocessor=dict(size=side), {BACKBONE.format(norm=", norm_cfg=dict(type='BN')")},
        decode_head=dict(in_channels=256, channels=16, c1_in_channels=32, c1_channels=8, num_classes=classes,
            norm_cfg=dict(type='BN')),
        auxiliary_head=dict(in_channels=128, channels=8, num_classes=classes, norm_cfg=dict(type='BN'))""",
    ),
    'classifier': (
        'imagenet/mila_t_in1k',
        """arch='nano', num_classes=classes, drop_path_rate=0.0,
        data_preprocessor=dict(num_classes=classes, batch_augments=None)""",
    ),
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
# Enough for some detections of a score above the threshold. That of RTMDet, 0.02, is above what it gives to everything
# at the start, 0.01: the 300th of these is before the next by rounding alone.
STEPS = dict(dino=60, rtmdet=60)
# Of each layout: the number of classes, the set, and a side of its images.
SHAPES = {
    'detection': """
classes = 6
dataset = dict(
    type='CocoDataset', data_root={data!r}, ann_file='annotations/instances_train.json', serialize_data=False,
    data_prefix=dict(img='images/training/'), metainfo=dict(classes={names!r}),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask={masks}),
        dict(type='PackDetInputs')])
""",
    'segmentation': """
classes, side = 7, (96, 96)
dataset = dict(
    type='BaseSegDataset', data_root={data!r}, img_suffix='.png', reduce_zero_label=True, serialize_data=False,
    metainfo=dict(classes=({names!r}) + ('ground',)),
    data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')])
""",
    'classification': 'classes = 5\n',
}
REAL = {
    'detection': """
classes = 80
dataset = dict(
    type='CocoDataset', data_root={data!r} + '/coco8', ann_file='annotations/instances_train2017.json',
    data_prefix=dict(img='train2017/'), serialize_data=False,
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask={masks}),
        dict(type='Resize', scale=(128, 96)), dict(type='PackDetInputs')])
""",
    'segmentation': """
classes, side = 150, (96, 128)
dataset = dict(
    type='ADE20KDataset', data_root={data!r} + '/ade8', serialize_data=False,
    data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True),
        dict(type='Resize', scale=(128, 96)), dict(type='PackSegInputs')])
""",
    'classification': """
classes = 4
dataset = dict(
    type='CustomDataset', data_root={classified!r}, data_prefix='train',
    pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=(96, 128)), dict(type='PackInputs')])
""",
}
TASKS = dict(
    upernet='segmentation', segformer='segmentation', deeplabv3plus='segmentation', classifier='classification'
)


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


def _text(name: str, layouts: dict[str, str], steps: int, **names: Any) -> str:
    base, changes = MODELS[name]
    run = RUN.format(steps=steps, lr=2e-3 if name != 'dino' else 3e-4)
    dataset = layouts[TASKS.get(name, 'detection')].format(masks='mask' in name, **names)
    return (
        f'_base_ = {str(CONFIGS / base)!r} + ".py"\n'
        f'{dataset}model = dict({changes})\n{run if "dataset" in dataset else ""}'
    )


def awaken(model: torch.nn.Module) -> None:
    """Give a fresh model scores that differ and pass thresholds, and statistics that are no identity."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    scores = ('retina_cls', 'atss_cls.', 'rtm_cls', 'conv_cls', 'rpn_cls', 'fc_cls', 'cls_branches', 'conv_seg')
    for name, parameter in model.named_parameters():
        if any(part in name for part in scores) and 'weight' in name:
            parameter.data.mul_(0.5 / (parameter.data.std() * parameter[0].numel() ** 0.5))
        elif any(part in name for part in scores):
            parameter.data.normal_(-1, 1, generator=generator)


@pytest.fixture(scope='session')
def fresh(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Callable[..., tuple[str, torch.nn.Module]]:
    """A config of a model of ``MODELS`` by its name, and the model with overrides, not trained, but with results."""

    def make(name: str, *options: str) -> tuple[str, torch.nn.Module]:
        config = tmp_path_factory.mktemp(name) / f'{name}.py'
        config.write_text(_text(name, SHAPES, 1, data=str(shapes), names=CLASSES), encoding='utf-8')
        cfg = load_config(str(config), options)
        init_default_scope(scope_of(cfg))
        torch.manual_seed(1)
        model = REGISTRY.build(cfg.model)
        awaken(model)
        return str(config), model.eval()

    return make


@pytest.fixture(scope='session')
def ready(fresh: Callable[..., tuple[str, torch.nn.Module]], shapes: Path) -> Callable[[str], Trained]:
    """A model of ``MODELS`` by its name, not trained, but with results to compare."""
    done: dict[str, Trained] = {}

    def make(name: str) -> Trained:
        if name not in done:
            config, model = fresh(name)
            weights = Path(config).with_name('model.pth')
            torch.save({'state_dict': model.state_dict(), 'meta': {}}, weights)
            done[name] = Trained(config, str(weights), str(shapes / 'images' / 'training'))
        return done[name]

    return make


@pytest.fixture(scope='session')
def trained(tmp_path_factory: pytest.TempPathFactory, sample_data: Path) -> Callable[[str], Trained]:
    """Train a model of ``MODELS`` by its name on four photographs, once in a session.

    ``MILA_MM_EXPORT_CACHE`` names a folder that keeps the weights for further sessions, by a digest of the config.
    """
    done: dict[str, Trained] = {}
    coco = sample_data / 'coco8'
    cache = Path(os.environ.get('MILA_MM_EXPORT_CACHE') or tmp_path_factory.mktemp('trained'))
    classified = cache / 'classified'
    for photograph in (coco / 'train2017').iterdir():
        folder = classified / 'train' / photograph.stem
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / photograph.name).exists():
            (folder / photograph.name).symlink_to(photograph)

    def train(name: str) -> Trained:
        if name not in done:
            from mila_mm.engine import train as train_config

            text = _text(name, REAL, STEPS.get(name, 40), data=str(sample_data), classified=str(classified))
            folder = cache / f'{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}'
            folder.mkdir(exist_ok=True)
            config, weights = folder / f'{name}.py', folder / 'model.pth'
            config.write_text(text, encoding='utf-8')
            if not weights.exists():
                _forget()
                train_config(str(config), work_dir=str(folder / 'run'))
                _forget()
                next((folder / 'run').glob('iter_*.pth')).rename(weights)
            done[name] = Trained(str(config), str(weights), str(coco / 'train2017'))
        return done[name]

    return train


def _forget() -> None:
    """Forget mmengine's instances by name: a session trains several models."""
    for kind in (ManagerMixin, *ManagerMixin.__subclasses__()):
        vars(kind).get('_instance_dict', {}).clear()


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Run the command and check that it ends with one message that holds the words, and no file."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, words):
        assert cli.execute(command.main, [str(word) for word in argv]) == cli.EXIT_USER_ERROR
        message = capsys.readouterr().err
        assert message.startswith('error: ') and 'Traceback' not in message
        for word in words:
            assert word in message
        assert list(Path.cwd().iterdir()) == []

    return run
