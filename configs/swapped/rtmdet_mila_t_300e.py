# MILA tiny in place of CSPNeXt, by tools/swap_backbone.py. The model was built and its training loss computed on
# images of 127 x 161.
# Not known, or yours to decide:
# - drop_path_rate=0.3 is the published one beyond 12 epochs
_base_ = 'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py'

model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],  # as MILA was trained on ImageNet
        std=[58.395, 57.12, 57.375],  # as MILA was trained on ImageNet
        bgr_to_rgb=True,  # as MILA was trained on ImageNet
        pad_size_divisor=32,  # the neck needs maps that halve exactly
    ),
    # gives 128 at 1/8, 256 at 1/16, 512 at 1/32; the old one 128 at 1/8, 256 at 1/16, 512 at 1/32
    backbone=dict(
        _delete_=True,
        type='mila_mm.MILA',
        arch='tiny',
        out_indices=(1, 2, 3),
        drop_path_rate=0.3,
        norm_cfg=dict(type='SyncBN'),
        init_cfg=dict(type='Pretrained', checkpoint='mila://tiny-in1k'),
    ),
)
