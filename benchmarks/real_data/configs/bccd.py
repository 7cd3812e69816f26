# RetinaNet on blood smears, mmdet's own with ResNet-50 and a narrow neck and head. `mila_mm.swap_backbone` makes the
# detector with MILA from it; the script sets the other backbones, schedule and learning rate.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

data_root = 'data/bccd'
metainfo = dict(classes=('RBC', 'WBC', 'Platelets'), palette=[(220, 60, 60), (80, 80, 220), (60, 180, 90)])
norm_cfg = dict(type='BN')

model = dict(
    backbone=dict(init_cfg=None),
    neck=dict(out_channels=48, num_outs=3, norm_cfg=norm_cfg),
    bbox_head=dict(
        num_classes=3,
        in_channels=48,
        feat_channels=48,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        # At this size cells are 30 to 45 pixels wide and nearly square, platelets 15: anchors of 16 to 102.
        anchor_generator=dict(octave_base_scale=2, ratios=[1.0], strides=[8, 16, 32]),
    ),
    test_cfg=dict(nms_pre=300),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=(240, 180), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(180, 240)),
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(240, 180), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        ann_file='annotations/train.json', data_prefix=dict(img='train/'), metainfo=metainfo, pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=8,
    dataset=dict(
        ann_file='annotations/val.json', data_prefix=dict(img='val/'), metainfo=metainfo, pipeline=test_pipeline
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/annotations/val.json', classwise=True)
test_evaluator = val_evaluator
