# COCO with the training augmentation of DETR: a flip, then (a) one of many short sides or (b) a rough size, a crop and
# (a).
_base_ = 'mmdet::_base_/datasets/coco_instance.py'

any_short_side = dict(type='RandomChoiceResize', scales=[(s, 1333) for s in range(480, 801, 32)], keep_ratio=True)
crop_first = [
    dict(type='RandomChoiceResize', scales=[(s, 1333) for s in (400, 500, 600)], keep_ratio=True),
    dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True),
    any_short_side,
]
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='RandomFlip', prob=0.5),
            dict(type='RandomChoice', transforms=[[any_short_side], crop_first]),
            dict(type='PackDetInputs'),
        ]
    )
)
