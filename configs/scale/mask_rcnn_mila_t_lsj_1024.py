# Mask R-CNN, MILA tiny, 100 epochs of large-scale jitter at 1024 x 1024. Recipe and learning rate are ours: nothing is
# published for MILA here.
_base_ = [
    '../_base_/models/mask_rcnn_mila.py',
    'mmdet::common/lsj-100e_coco-instance.py',  # 25 epochs of a set repeated 4 times; 64 images a step
    '../_base_/precision/amp.py',
]

image_size = (1024, 1024)
model = dict(
    data_preprocessor=dict(batch_augments=[dict(type='BatchFixedSizePad', size=image_size, pad_mask=True)]),
    backbone=dict(drop_path_rate=0.3, with_cp='block'),
)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

train_dataloader = dict(batch_size=2)
optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}),
    accumulative_counts=4,
)  # 8 GPUs x 2 images x 4
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=2000),  # in batches: 500 steps
    dict(type='MultiStepLR', begin=0, end=25, by_epoch=True, milestones=[22, 24], gamma=0.1),
]
