# MILA tiny in place of ResNet, by tools/swap_backbone.py. The model was built and its training loss computed on images
# of 127 x 161.
# Not known, or yours to decide:
# - drop_path_rate=0.1 is the published one up to 12 epochs
# - the old backbone kept its first stages frozen; MILA trains whole, as its published detectors do
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

model = dict(
    # gives 128 at 1/8, 256 at 1/16, 512 at 1/32; the old one 256 at 1/4, 512 at 1/8, 1024 at 1/16, 2048 at 1/32
    backbone=dict(
        _delete_=True,
        type='mila_mm.MILA',
        arch='tiny',
        out_indices=(1, 2, 3),
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='mila://tiny-in1k'),
    ),
    neck=dict(
        in_channels=[128, 256, 512],  # widths of the new maps
        start_level=0,  # counted without the maps that it did not read
    ),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=0.0001, betas=(0.9, 0.999), weight_decay=0.05),  # MILA's recipe
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(norm=dict(decay_mult=0.0))),  # no weight decay on norms
)
