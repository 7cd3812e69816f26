# Mask R-CNN, MILA tiny, 3x as released: 36 epochs, multi-scale training, drop path 0.3.
_base_ = [
    './_base_/models/mask_rcnn_mila.py',
    './_base_/datasets/coco_instance_multi_scale.py',
    './_base_/schedules/mask_rcnn_adamw_3x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(backbone=dict(drop_path_rate=0.3))
