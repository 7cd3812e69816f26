_base_ = './_base_/upernet_160k.py'

# The attention half of the block is Mamba's. The paper leaves its 5x5 convolution open: docs/study.md.
model = dict(backbone=dict(block='mila', conv_kernel_size=5))
