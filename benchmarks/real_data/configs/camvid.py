# UperNet on street frames, on top of the demo's: narrow heads. The script sets backbone, widths, schedule and
# learning rate.
_base_ = '../../../configs/demo/upernet_mila_nano_shapes.py'

data_root = 'data/camvid'
classes = ('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car', 'pedestrian', 'bicyclist')
palette = [
    [128, 128, 128],
    [128, 0, 0],
    [192, 192, 128],
    [128, 64, 128],
    [60, 40, 222],
    [128, 128, 0],
    [192, 128, 128],
    [64, 64, 128],
    [64, 0, 128],
    [64, 64, 0],
    [0, 128, 192],
]

model = dict(
    data_preprocessor=dict(size=(128, 192)),
    decode_head=dict(channels=48, num_classes=11),
    auxiliary_head=dict(num_classes=11),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(360, 270), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(128, 192), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(360, 270), keep_ratio=True),
    dict(type='LoadAnnotations'),  # after Resize: the labels keep their size, and predictions are brought to it
    dict(type='PackSegInputs'),
]
dataset = dict(reduce_zero_label=False, metainfo=dict(classes=classes, palette=palette), img_suffix='.jpg')
train_dataloader = dict(batch_size=6, dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(batch_size=6, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(type='ClassIoUMetric')
test_evaluator = val_evaluator
