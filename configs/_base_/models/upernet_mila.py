# UperNet on MILA tiny: mmseg's Swin configuration with the backbone replaced and ADE20K's 150 classes in both heads.
_base_ = 'mmseg::_base_/models/upernet_swin.py'

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(_delete_=True, type='mila_mm.MILA', arch='tiny', drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 256, 512], num_classes=150),
    auxiliary_head=dict(in_channels=256, num_classes=150),
)
