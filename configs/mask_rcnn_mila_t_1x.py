# Mask R-CNN, MILA tiny, 1x as released: 12 epochs WITH multi-scale training. Peers' "1x" is ..._1x_single_scale.py.
_base_ = [
    './_base_/models/mask_rcnn_mila.py',
    './_base_/datasets/coco_instance_multi_scale.py',
    './_base_/schedules/mask_rcnn_adamw_1x.py',
    'mmdet::_base_/default_runtime.py',
]
