# Mask R-CNN on the embedded shapes set, small enough for two CPU cores: `make demo`.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/default_runtime.py',
]

# What `tools/demo.py` writes to data_root where it is not there yet.
shapes = dict(num_train=1500, num_val=200, size=96, seed=0)
data_root = 'data/shapes'

# Trained from scratch: BatchNorm in neck and mask head, all much narrower than usual.
norm_cfg = dict(type='BN')
model = dict(
    backbone=dict(_delete_=True, type='mila_mm.MILA', arch='nano'),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=48, num_outs=4, norm_cfg=norm_cfg),
    # Boxes are 20 to 46 pixels wide and nearly square: anchors of 24, 36, 48 and larger.
    rpn_head=dict(
        in_channels=48,
        feat_channels=48,
        anchor_generator=dict(scales=[6, 9], ratios=[1.0], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=48, roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(in_channels=48, fc_out_channels=256, num_classes=6),
        mask_roi_extractor=dict(out_channels=48, roi_layer=dict(sampling_ratio=1)),
        mask_head=dict(num_convs=2, in_channels=48, conv_out_channels=32, num_classes=6, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=60),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=60), rcnn=dict(max_per_img=20)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=[0.33, 0.33], direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),  # changes nothing, but notes the scale factor
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
metainfo = dict(
    classes=('circle', 'square', 'triangle', 'star', 'cross', 'ring'),
    palette=[(225, 70, 60), (70, 180, 80), (75, 95, 225), (235, 195, 40), (205, 80, 200), (50, 190, 205)],
)
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='images/training/'),
        metainfo=metainfo,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=1,
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='images/validation/'),
        metainfo=metainfo,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/annotations/instances_val.json')
test_evaluator = val_evaluator

# 1500 images are 188 batches: 4 epochs and a bit
train_cfg = dict(type='IterBasedTrainLoop', max_iters=800, val_interval=200)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1.5e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=10.0),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=100, by_epoch=False),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=100, end=800, by_epoch=False),
]
default_hooks = dict(
    logger=dict(interval=25, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=800),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
