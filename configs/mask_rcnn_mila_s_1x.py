_base_ = './mask_rcnn_mila_t_1x.py'

model = dict(backbone=dict(arch='small'))
