"""Recipes of the shipped configs, argument by argument, beside the paper's and the released ones.

Sources: arXiv 2405.16605, section 5 and appendix; the released configurations (github.com/LeapLabTHU/MLLA at 08d3168),
which are Swin's in mmdet and mmseg but for the values written out here. Where a value is ours, its test says so.
"""

from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
WIDTHS = {'tiny': [64, 128, 256, 512], 'small': [64, 128, 256, 512], 'base': [96, 192, 384, 768]}
ARCHS = {'t': 'tiny', 's': 'small', 'b': 'base'}
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]  # of ImageNet, RGB, as everywhere in OpenMMLab


def read(name: str) -> Config:
    return Config.fromfile(CONFIGS / f'{name}.py')


def plain(node: Any) -> Any:
    """A part of a config without the scopes that mmengine writes into what comes from another library."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items() if key != '_scope_'}
    return type(node)(map(plain, node)) if isinstance(node, (list, tuple)) else node


def adamw(lr: float, weight_decay: float, **more: Any) -> dict[str, Any]:
    """AdamW without decay of what has 'norm' in its name: no clipping, no mixed precision."""
    return dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay),
        paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))),
        **more,
    )


def steps(milestones: list[int], epochs: int, warmup: int = 500) -> list[dict[str, Any]]:
    """A linear warm-up of some iterations, then tenths of the learning rate from some epochs on."""
    return [
        dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=warmup),
        dict(type='MultiStepLR', begin=0, end=epochs, by_epoch=True, milestones=milestones, gamma=0.1),
    ]


def resize(*short_sides: int) -> dict[str, Any]:
    return dict(type='RandomChoiceResize', scales=[(side, 1333) for side in short_sides], keep_ratio=True)


ANY_SHORT_SIDE = resize(480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
CROP = dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True)
ANNOTATIONS = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
FLIP = dict(type='RandomFlip', prob=0.5)
META = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
MULTI_SCALE = [
    dict(type='LoadImageFromFile'),
    ANNOTATIONS,
    FLIP,
    dict(type='RandomChoice', transforms=[[ANY_SHORT_SIDE], [resize(400, 500, 600), CROP, ANY_SHORT_SIDE]]),
    dict(type='PackDetInputs'),
]
SINGLE_SCALE = [
    dict(type='LoadImageFromFile', backend_args=None),
    ANNOTATIONS,
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    FLIP,
    dict(type='PackDetInputs'),
]


def coco(split: str, pipeline: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return dict(
        type='CocoDataset',
        data_root='data/coco/',
        ann_file=f'annotations/instances_{split}2017.json',
        data_prefix=dict(img=f'{split}2017/'),
        pipeline=pipeline,
        backend_args=None,
        **more,
    )


def coco_train(pipeline: list[dict[str, Any]]) -> dict[str, Any]:
    return coco('train', pipeline, filter_cfg=dict(filter_empty_gt=True, min_size=32))


def coco_test(scale: tuple[int, int], **load: Any) -> dict[str, Any]:
    pipeline = [
        dict(type='LoadImageFromFile', **load),
        dict(type='Resize', scale=scale, keep_ratio=True),
        ANNOTATIONS,
        dict(type='PackDetInputs', meta_keys=META),
    ]
    return coco('val', pipeline, test_mode=True)


DETECTORS = [f'mask_rcnn_mila_{a}_{s}' for a in 'tsb' for s in ('1x', '3x', '1x_single_scale')]
DETECTORS += ['mask_rcnn_mila_t_1x_layer_decay']


@pytest.mark.parametrize('name', DETECTORS)
def test_detectors(name: str) -> None:
    cfg, arch, long = read(name), ARCHS[name.split('_')[3]], '_3x' in name
    backbone = dict(type='mila_mm.MILA', arch=arch, drop_path_rate=0.3 if long else 0.1)
    optimizer = adamw(1e-4, 0.05)
    if 'layer_decay' in name:
        backbone['init_cfg'] = dict(type='Pretrained', checkpoint='mila://tiny-in1k')
        optimizer['constructor'] = 'mila_mm.LayerDecayOptimWrapperConstructor'
        optimizer['paramwise_cfg']['layer_decay_rate'] = 0.9
    epochs, milestones = (36, [27, 33]) if long else (12, [8, 11])
    assert plain(cfg.model.backbone) == backbone
    assert plain(cfg.model.neck) == dict(type='FPN', in_channels=WIDTHS[arch], out_channels=256, num_outs=5)
    assert plain(cfg.model.data_preprocessor) == dict(
        type='DetDataPreprocessor', mean=MEAN, std=STD, bgr_to_rgb=True, pad_mask=True, pad_size_divisor=32
    )
    assert plain(cfg.optim_wrapper) == optimizer
    assert plain(cfg.param_scheduler) == steps(milestones, epochs)
    assert plain(cfg.train_cfg) == dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=1)
    train = SINGLE_SCALE if 'single_scale' in name else MULTI_SCALE
    assert plain(cfg.train_dataloader.dataset) == coco_train(train)
    assert plain(cfg.val_dataloader.dataset) == coco_test((1333, 800), backend_args=None)
    assert cfg.test_dataloader.dataset == cfg.val_dataloader.dataset
    assert plain(cfg.val_evaluator)['metric'] == ['bbox', 'segm'] and cfg.test_evaluator == cfg.val_evaluator
    assert cfg.train_dataloader.batch_size == 2 and cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.get('amp') is None and 'max_keep_ckpts' not in cfg.default_hooks.checkpoint


# Drop path of tiny and small is ours: the paper trained the base size alone.
DROP_PATH = {'tiny': 0.2, 'small': 0.3, 'base': 0.5}
POLY = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False),
]


def crops(scale: tuple[int, int], size: tuple[int, int], **load: Any) -> list[dict[str, Any]]:
    return [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', **load),
        dict(type='RandomResize', scale=scale, ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type='RandomCrop', crop_size=size, cat_max_ratio=0.75),
        FLIP,
        dict(type='PhotoMetricDistortion'),
        dict(type='PackSegInputs'),
    ]


def whole(scale: tuple[int, int], **load: Any) -> list[dict[str, Any]]:
    return [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=scale, keep_ratio=True),
        dict(type='LoadAnnotations', **load),
        dict(type='PackSegInputs'),
    ]


def check_upernet(
    cfg: Config, arch: str, classes: int, size: tuple[int, int], drop_path: float, **backbone: Any
) -> None:
    head, auxiliary = plain(cfg.model.decode_head), plain(cfg.model.auxiliary_head)
    common = dict(num_classes=classes, dropout_ratio=0.1, align_corners=False)
    loss = dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)
    shared = common | dict(norm_cfg=dict(type='SyncBN', requires_grad=True))
    assert plain(cfg.model.backbone) == dict(type='mila_mm.MILA', arch=arch, drop_path_rate=drop_path, **backbone)
    assert head == shared | dict(
        type='UPerHead',
        in_channels=WIDTHS[arch],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        loss_decode=loss,
    )
    assert auxiliary == shared | dict(
        type='FCNHead',
        in_channels=WIDTHS[arch][2],
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        loss_decode=loss | dict(loss_weight=0.4),
    )
    assert plain(cfg.model.data_preprocessor) == dict(
        type='SegDataPreProcessor', mean=MEAN, std=STD, bgr_to_rgb=True, pad_val=0, seg_pad_val=255, size=size
    )
    assert plain(cfg.model.test_cfg) == dict(mode='whole')
    assert plain(cfg.param_scheduler) == POLY
    assert plain(cfg.train_cfg) == dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=16000)
    assert plain(cfg.val_evaluator) == dict(type='IoUMetric', iou_metrics=['mIoU'])
    assert cfg.auto_scale_lr.base_batch_size == 16


@pytest.mark.parametrize('name', [*(f'upernet_mila_{a}_160k' for a in 'tsb'), 'upernet_mila_t_160k_layer_decay'])
def test_segmentors(name: str) -> None:
    cfg, arch = read(name), ARCHS[name.split('_')[2]]
    optimizer, extra = adamw(6e-5, 0.01), {}
    if 'layer_decay' in name:
        extra['init_cfg'] = dict(type='Pretrained', checkpoint='mila://tiny-in1k')
        optimizer['constructor'] = 'mila_mm.LayerDecayOptimWrapperConstructor'
        optimizer['paramwise_cfg']['layer_decay_rate'] = 0.9
    check_upernet(cfg, arch, 150, (512, 512), DROP_PATH[arch], **extra)
    assert plain(cfg.optim_wrapper) == optimizer
    train = plain(cfg.train_dataloader)
    assert train['batch_size'] == 2 and train['sampler'] == dict(type='InfiniteSampler', shuffle=True)
    assert train['dataset']['type'] == 'ADE20KDataset'
    assert train['dataset']['pipeline'] == crops((2048, 512), (512, 512), reduce_zero_label=True)
    assert plain(cfg.val_dataloader.dataset.pipeline) == whole((2048, 512), reduce_zero_label=True)
    assert cfg.test_dataloader.dataset == cfg.val_dataloader.dataset
    load, augment = plain(cfg.tta_pipeline)
    assert load['type'] == 'LoadImageFromFile'
    assert augment['transforms'] == [
        [dict(type='Resize', scale_factor=s, keep_ratio=True) for s in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)],
        [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)],
        [dict(type='LoadAnnotations')],
        [dict(type='PackSegInputs')],
    ]


@pytest.mark.parametrize(('side', 'batch', 'accumulation'), [(1024, 2, 4), (1536, 1, 8)])
def test_large_scale_jitter(side: int, batch: int, accumulation: int) -> None:
    """Ours: large-scale jitter of arXiv 2012.07177, 100 epochs in mmdet's form, 64 images a step on 8 GPUs."""
    cfg, size = read(f'scale/mask_rcnn_mila_t_lsj_{side}'), (side, side)
    assert plain(cfg.model.backbone) == dict(type='mila_mm.MILA', arch='tiny', drop_path_rate=0.3, with_cp='block')
    assert plain(cfg.model.data_preprocessor) == dict(
        type='DetDataPreprocessor',
        mean=MEAN,
        std=STD,
        bgr_to_rgb=True,
        pad_mask=True,
        pad_size_divisor=32,
        batch_augments=[dict(type='BatchFixedSizePad', size=size, pad_mask=True)],
    )
    train = plain(cfg.train_dataloader)
    assert train['batch_size'] == batch and (train['dataset']['type'], train['dataset']['times']) == (
        'RepeatDataset',
        4,
    )
    loading, *rest = train['dataset']['dataset'].pop('pipeline')
    assert loading['type'] == 'LoadImageFromFile'
    assert train['dataset']['dataset'] == {k: v for k, v in coco_train([]).items() if k != 'pipeline'}
    crop = dict(type='RandomCrop', crop_type='absolute_range', crop_size=size, recompute_bbox=True)
    assert rest == [
        ANNOTATIONS,
        dict(type='RandomResize', scale=size, ratio_range=(0.1, 2.0), keep_ratio=True),
        crop | dict(allow_negative_crop=True),
        dict(type='FilterAnnotations', min_gt_bbox_wh=(1e-2, 1e-2)),
        FLIP,
        dict(type='PackDetInputs'),
    ]
    assert plain(cfg.val_dataloader.dataset) == coco_test(size)
    assert cfg.test_dataloader.dataset == cfg.val_dataloader.dataset
    assert plain(cfg.optim_wrapper) == adamw(2e-4, 0.05, accumulative_counts=accumulation)
    assert 8 * batch * accumulation == cfg.auto_scale_lr.base_batch_size == 64
    assert plain(cfg.param_scheduler) == steps([22, 24], 25, warmup=500 * accumulation)  # of batches
    assert plain(cfg.train_cfg) == dict(type='EpochBasedTrainLoop', max_epochs=25, val_interval=5)
    assert cfg.amp == 'auto'


def test_cityscapes() -> None:
    cfg = read('scale/upernet_mila_t_cityscapes_1024x2048')
    check_upernet(cfg, 'tiny', 19, (1024, 2048), 0.2, with_cp='block')
    assert plain(cfg.optim_wrapper) == adamw(6e-5, 0.01, accumulative_counts=2)
    assert cfg.train_dataloader.batch_size == 1 and cfg.amp == 'auto'
    assert plain(cfg.train_dataloader.dataset.pipeline) == crops((2048, 1024), (1024, 2048))
    assert plain(cfg.val_dataloader.dataset.pipeline) == whole((2048, 1024))
    tiled = read('scale/upernet_mila_t_cityscapes_tiled')
    assert plain(tiled.model.module) == plain(cfg.model)
    given = {key: value for key, value in plain(tiled.model).items() if key != 'module'}
    assert given == dict(type='mila_mm.TiledSegmentor', tile=(1024, 1024), stride=(768, 768), tiles_per_batch=1)
    assert [t['type'] for t in plain(tiled.test_dataloader.dataset.pipeline)] == [
        'LoadImageFromFile',
        'LoadAnnotations',
        'PackSegInputs',
    ]


@pytest.mark.parametrize(('name', 'changed'), [
    ('scale/mask_rcnn_mila_b_3x_fsdp', {'model_wrapper_cfg', 'amp'}),
    ('scale/mask_rcnn_mila_b_3x_zero', {'optim_wrapper'}),
    ('scale/mask_rcnn_mila_t_1x_sync_bn', {'sync_bn'}),
])  # fmt: skip
def test_other_ways_to_train_at_scale_change_nothing_else(name: str, changed: set[str]) -> None:
    cfg = read(name)
    base = read('mask_rcnn_mila_b_3x' if '_b_' in name else 'mask_rcnn_mila_t_1x')
    ours, theirs = cfg.to_dict(), base.to_dict()
    assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} == changed
    if 'zero' in name:
        sharded = plain(cfg.optim_wrapper)
        optimizer = sharded['optimizer']
        assert (optimizer.pop('type'), optimizer.pop('optimizer_type')) == ('ZeroRedundancyOptimizer', 'AdamW')
        assert sharded['optimizer'] | dict(type='AdamW') == adamw(1e-4, 0.05)['optimizer']
        assert sharded['paramwise_cfg'] == adamw(1e-4, 0.05)['paramwise_cfg']


@pytest.mark.parametrize(('letter', 'drop_path', 'ratio'), [('t', 0.2, 1.0), ('s', 0.3, 1.5), ('b', 0.5, 2.0)])
def test_classifiers(letter: str, drop_path: float, ratio: float) -> None:
    """ImageNet-1K: appendix of the paper; RandAugment m9-mstd0.5-inc1, erasing 0.25, Mixup 0.8, CutMix 1.0, MESA."""
    pytest.importorskip('mmpretrain')
    cfg = read(f'imagenet/mila_{letter}_in1k')
    model = plain(cfg.model)
    preprocessor = model.pop('data_preprocessor')
    assert model == dict(
        type='mila_mm.MILAImageClassifier', arch=ARCHS[letter], drop_path_rate=drop_path, label_smoothing=0.1
    )
    assert (preprocessor['mean'], preprocessor['std'], preprocessor['to_rgb']) == (MEAN, STD, True)
    assert preprocessor['batch_augments'] == dict(
        augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]
    )
    pipeline = {transform['type']: transform for transform in plain(cfg.train_dataloader.dataset.pipeline)}
    augment, erase = pipeline['RandAugment'], pipeline['RandomErasing']
    assert (augment['policies'], augment['magnitude_level'], augment['magnitude_std']) == ('timm_increasing', 9, 0.5)
    assert (erase['erase_prob'], pipeline['RandomResizedCrop']['scale'], pipeline['RandomFlip']['prob']) == (
        0.25,
        224,
        0.5,
    )
    optimizer = plain(cfg.optim_wrapper)
    assert (optimizer['optimizer']['type'], optimizer['optimizer']['lr']) == ('AdamW', 4e-3)
    assert optimizer['optimizer']['weight_decay'] == 0.05 and optimizer['clip_grad'] == dict(max_norm=5.0)
    decay = {key: value for key, value in optimizer['paramwise_cfg'].items() if key != 'custom_keys'}
    assert decay == dict(norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0)
    warmup, cosine = plain(cfg.param_scheduler)
    assert (warmup['type'], warmup['end'], cosine['type'], cosine['begin'], cosine['end']) == (
        'LinearLR',
        20,
        'CosineAnnealingLR',
        20,
        300,
    )
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 4096
    assert cfg.train_cfg.max_epochs == 300
    assert plain(cfg.custom_hooks) == [dict(type='mila_mm.MESAHook', ratio=ratio, begin_mesa_epoch=75, momentum=4e-4)]
