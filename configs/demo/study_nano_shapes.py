# The study at nano width on the embedded shapes set: tools/analysis_tools/replicate_study.py trains every row of it.
# The head mixes no pixels (1x1 convolutions and resizing), so what context there is comes from the backbone.
_base_ = './upernet_mila_nano_shapes.py'

# Small images: the scan of the forget gate takes its time on a CPU.
shapes = dict(num_train=3000, num_val=300, size=64, seed=0)
data_root = 'data/shapes64'

model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(_delete_=True, type='mila_mm.LinearAttentionTransformer', arch='nano', img_size=64),
    decode_head=dict(
        _delete_=True,
        type='SegformerHead',
        in_channels=[32, 64, 128, 256],
        in_index=[0, 1, 2, 3],
        channels=64,
        num_classes=7,
        norm_cfg=dict(type='BN'),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    auxiliary_head=None,
)

# The same for every row: 9600 images, 3.2 epochs.
train_dataloader = dict(batch_size=16, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=600, val_interval=600)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, begin=0, end=60, by_epoch=False),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=60, end=600, by_epoch=False),
]
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=600, save_optimizer=False))
