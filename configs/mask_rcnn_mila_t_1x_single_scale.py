# Mask R-CNN, MILA tiny, 12 epochs at 1333 x 800 only: what peers report as 1x. The published MILA rows are not this.
_base_ = [
    './_base_/models/mask_rcnn_mila.py',
    'mmdet::_base_/datasets/coco_instance.py',
    './_base_/schedules/mask_rcnn_adamw_1x.py',
    'mmdet::_base_/default_runtime.py',
]
