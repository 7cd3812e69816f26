_base_ = './mask_rcnn_mila_t_1x.py'

model = dict(backbone=dict(arch='base'), neck=dict(in_channels=[96, 192, 384, 768]))
