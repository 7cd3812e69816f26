# Mask R-CNN on microscope images of cell nuclei, on top of the demo's: narrow neck and heads, BatchNorm in both.
# The script sets backbone, widths, schedule and learning rate.
_base_ = '../../../configs/demo/mask_rcnn_mila_nano_shapes.py'

data_root = 'data/nuclei'
metainfo = dict(classes=('nucleus',), palette=[(255, 200, 0)])

model = dict(
    # Nuclei are 8 to 45 pixels wide, enlarged by a quarter here: anchors of 8, 12, 16, 24, ... 96.
    rpn_head=dict(anchor_generator=dict(scales=[2, 3])),
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=300, max_per_img=150),
        rcnn=dict(sampler=dict(num=96)),
    ),
    # Up to 151 nuclei in an image
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200), rcnn=dict(max_per_img=150)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomResize', scale=(320, 320), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(160, 160)),
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(320, 320), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        ann_file='annotations/train.json', data_prefix=dict(img='train/'), metainfo=metainfo, pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    batch_size=6,
    dataset=dict(
        ann_file='annotations/val.json', data_prefix=dict(img='val/'), metainfo=metainfo, pipeline=test_pipeline
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/annotations/val.json')
test_evaluator = val_evaluator
