# Mask R-CNN on the baseline of the study, Swin-T's layout with linear attention, 1x as for MILA tiny. A small copy that
# a CPU can train: --cfg-options model.backbone.arch=nano "model.neck.in_channels=[32,64,128,256]"
_base_ = '../../mask_rcnn_mila_t_1x.py'

model = dict(
    backbone=dict(_delete_=True, type='mila_mm.LinearAttentionTransformer', arch='tiny', drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
# As Mamba's code, no decay for the rates of the forget gate and the shortcut; nor for the tables of APE.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(log_rate=dict(decay_mult=0.0), shortcut=dict(decay_mult=0.0), table=dict(decay_mult=0.0))
    )
)
