# MILA tiny in place of ResNet, by tools/swap_backbone.py. The model was built and its training loss computed on images
# of 320 x 320.
# Not known, or yours to decide:
# - drop_path_rate=0.1 is the published one up to 12 epochs
# - the old backbone kept its first stages frozen; MILA trains whole, as its published detectors do
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

model = dict(
    # gives 128 at 1/8, 256 at 1/16, 512 at 1/32; the old one 512 at 1/8, 1024 at 1/16, 2048 at 1/32
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
    ),
)
