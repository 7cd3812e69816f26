# UperNet, MILA base, as released: drop path 0.5.
_base_ = './upernet_mila_t_160k.py'

model = dict(
    backbone=dict(arch='base', drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
