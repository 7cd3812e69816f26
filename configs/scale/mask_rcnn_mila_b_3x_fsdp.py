# FSDP: parameters, gradients and the optimizer's state are divided among the GPUs, each block a unit of its own.
_base_ = '../mask_rcnn_mila_b_3x.py'

model_wrapper_cfg = dict(type='mila_mm.FullyShardedModel', sharding_strategy='FULL_SHARD')
amp = 'bf16'
