# UperNet on the baseline of the study, 160k iterations on ADE20K as for MILA tiny. A small copy that a CPU can train:
# --cfg-options model.backbone.arch=nano "model.decode_head.in_channels=[32,64,128,256]"
#     model.auxiliary_head.in_channels=128
_base_ = '../../upernet_mila_t_160k.py'

model = dict(
    backbone=dict(_delete_=True, type='mila_mm.LinearAttentionTransformer', arch='tiny', drop_path_rate=0.2),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
# As Mamba's code, no decay for the rates of the forget gate and the shortcut; nor for the tables of APE.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(log_rate=dict(decay_mult=0.0), shortcut=dict(decay_mult=0.0), table=dict(decay_mult=0.0))
    )
)
