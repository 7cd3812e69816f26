# MILA tiny in place of MixVisionTransformer, by tools/swap_backbone.py. The model was built and its training loss
# computed on images of 127 x 161.
# Not known, or yours to decide:
# - rules for parameters of the old backbone are gone (paramwise_cfg.custom_keys): 'pos_block'
# - drop_path_rate=0.1 is the old backbone's
_base_ = 'mmseg::segformer/segformer_mit-b2_8xb2-160k_ade20k-512x512.py'

model = dict(
    # gives 64 at 1/4, 128 at 1/8, 256 at 1/16, 512 at 1/32; the old one 64 at 1/4, 128 at 1/8, 320 at 1/16, 512 at
    # 1/32
    backbone=dict(
        _delete_=True,
        type='mila_mm.MILA',
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='mila://tiny-in1k'),
    ),
    decode_head=dict(
        in_channels=[64, 128, 256, 512],  # widths of the new maps
    ),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        # 1 of 3 entries named parameters of the old backbone
        custom_keys=dict(_delete_=True, norm=dict(decay_mult=0.0), head=dict(lr_mult=10.0)),
    ),
)
