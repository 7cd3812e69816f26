_base_ = './mask_rcnn_mila_t_3x.py'

model = dict(backbone=dict(arch='small'))
