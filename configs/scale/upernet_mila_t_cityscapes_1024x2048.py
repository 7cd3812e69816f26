# UperNet, MILA tiny, Cityscapes at its full 1024 x 2048: 80k steps of 16 crops. Recipe ours, after ADE20K's.
_base_ = [
    '../_base_/models/upernet_mila.py',
    'mmseg::_base_/datasets/cityscapes_1024x1024.py',
    '../_base_/schedules/upernet_adamw_160k.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/precision/amp.py',
]

crop_size = (1024, 2048)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(with_cp='block'),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2048, 1024), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=1, dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(accumulative_counts=2)  # 8 GPUs x 1 crop x 2; the 160k iterations of the schedule are batches
