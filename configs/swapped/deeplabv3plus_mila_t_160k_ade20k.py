# MILA tiny in place of ResNetV1c, by tools/swap_backbone.py. The model was built and its training loss computed on
# images of 127 x 161.
# Not known, or yours to decide:
# - recipe: the config names no total batch (auto_scale_lr.base_batch_size); the rate is for 16 images
# - drop_path_rate=0.2 is this package's for segmentors of that size
# - output strides: 1/8 becomes 1/16, 1/8 becomes 1/32. Heads resize what they read, but small things lose resolution:
#   whether accuracy suffers, only training tells
_base_ = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-160k_ade20k-512x512.py'

model = dict(
    pretrained=None,  # weights of the old backbone
    # gives 64 at 1/4, 256 at 1/16, 512 at 1/32; the old one 256 at 1/4, 512 at 1/8, 1024 at 1/8, 2048 at 1/8
    backbone=dict(
        _delete_=True,
        type='mila_mm.MILA',
        arch='tiny',
        out_indices=(0, 2, 3),
        drop_path_rate=0.2,
        norm_cfg=dict(type='SyncBN'),
        init_cfg=dict(type='Pretrained', checkpoint='mila://tiny-in1k'),
    ),
    decode_head=dict(
        in_channels=512,  # width of the map at 1/32
        in_index=2,  # the maps that nothing reads are gone
        c1_in_channels=64,  # width of the map at 1/4
    ),
    auxiliary_head=dict(
        in_channels=256,  # width of the map at 1/16
        in_index=1,  # the maps that nothing reads are gone
    ),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=6e-05, betas=(0.9, 0.999), weight_decay=0.01),  # MILA's recipe
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(norm=dict(decay_mult=0.0))),  # no weight decay on norms
)
# warm-up of 1500 iterations in front; eta_min scaled as the rate was
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-06, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=6e-07, power=0.9, begin=1500, end=160000, by_epoch=False, _scope_='mmseg'),
]
