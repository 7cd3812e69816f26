# The same for a GPU: heads of their usual widths, images at their own size.
_base_ = './camvid.py'

model = dict(
    data_preprocessor=dict(size=(320, 448)),
    decode_head=dict(channels=512, pool_scales=(1, 2, 3, 6)),
    auxiliary_head=dict(channels=256),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.9, 1.8), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(320, 448), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(480, 360), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
