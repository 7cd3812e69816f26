# MILA tiny on ImageNet-1K, the recipe of the paper: 300 epochs, 8 GPUs x 512 images, MESA after the first quarter.
# RandAugment m9-mstd0.5-inc1 and random erasing 0.25 are those of mmpretrain's Swin configs.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(
    type='mila_mm.MILAImageClassifier',
    arch='tiny',
    drop_path_rate=0.2,
    label_smoothing=0.1,
    data_preprocessor=dict(
        type='mmpretrain.ClsDataPreprocessor',
        num_classes=1000,
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        to_rgb=True,
        batch_augments=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
    ),
)

train_dataloader = dict(batch_size=512, num_workers=12)
val_dataloader = dict(batch_size=128)
test_dataloader = val_dataloader

# 5e-4 per 512 images; norms and biases without decay
optim_wrapper = dict(optimizer=dict(lr=4e-3, weight_decay=0.05), clip_grad=dict(max_norm=5.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=4e-5, by_epoch=True, begin=20, end=300, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=300, val_interval=5)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(base_batch_size=4096)

custom_hooks = [dict(type='mila_mm.MESAHook', ratio=1.0, begin_mesa_epoch=75, momentum=4e-4)]
default_hooks = dict(checkpoint=dict(interval=5, max_keep_ckpts=3))
