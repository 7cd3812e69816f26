# 12 epochs of AdamW at 8 GPUs x 2 images: the schedule of the published detectors. No clipping, no mixed precision.
_base_ = 'mmdet::_base_/schedules/schedule_1x.py'  # warm-up of 500 iterations from 0.001, steps at epochs 8 and 11

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.0)}),
)
