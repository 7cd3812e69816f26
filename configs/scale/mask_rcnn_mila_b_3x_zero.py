# ZeRO, stage 1: DDP whose optimizer state is divided among the GPUs.
_base_ = '../mask_rcnn_mila_b_3x.py'

optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type='ZeroRedundancyOptimizer',
        optimizer_type='AdamW',
        lr=1e-4,
        betas=(0.9, 0.999),
        weight_decay=0.05,
    )
)
