# UperNet on the embedded shapes set, small enough for two CPU cores: `make demo-seg`.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_20k.py',
]

# What `tools/demo.py` writes to data_root where it is not there yet.
shapes = dict(num_train=1500, num_val=200, size=96, seed=0)
data_root = 'data/shapes'

model = dict(
    data_preprocessor=dict(size=(96, 96)),
    backbone=dict(_delete_=True, type='mila_mm.MILA', arch='nano'),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=32, pool_scales=(1, 3), num_classes=7),
    auxiliary_head=dict(in_channels=128, channels=32, num_classes=7),
)

# Images are of one size already: neither resized nor cropped.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='BaseSegDataset',
    data_root=data_root,
    img_suffix='.png',
    reduce_zero_label=True,
    metainfo=dict(
        classes=('circle', 'square', 'triangle', 'star', 'cross', 'ring', 'ground'),
        palette=[
            [225, 70, 60],
            [70, 180, 80],
            [75, 95, 225],
            [235, 195, 40],
            [205, 80, 200],
            [50, 190, 205],
            [110, 110, 110],
        ],
    ),
)
train_dataloader = dict(batch_size=8, num_workers=1, dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(batch_size=20, num_workers=1, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader

# 1500 images are 188 batches: 8 epochs
train_cfg = dict(max_iters=1500, val_interval=250)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1.5e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=5.0),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=100, by_epoch=False),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=100, end=1500, by_epoch=False),
]
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=1500))
randomness = dict(seed=0)
