# MILA tiny in place of ResNet, by tools/swap_backbone.py. The model was built and its training loss computed on images
# of 127 x 161.
# Not known, or yours to decide:
# - drop_path_rate=0.1 is the published one up to 12 epochs
_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py'

model = dict(
    # gives 64 at 1/4, 128 at 1/8, 256 at 1/16, 512 at 1/32; the old one 256 at 1/4, 512 at 1/8, 1024 at 1/16, 2048 at
    # 1/32
    backbone=dict(
        _delete_=True,
        type='mila_mm.MILA',
        arch='tiny',
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='mila://tiny-in1k'),
    ),
    panoptic_head=dict(
        in_channels=[64, 128, 256, 512],  # widths of the new maps
    ),
)
