# Mask R-CNN with FPN on MILA tiny: mmdet's own, with the backbone replaced.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(
    backbone=dict(_delete_=True, type='mila_mm.MILA', arch='tiny', drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
