_base_ = './_base_/mask_rcnn_1x.py'

# The attention half of the block is Mamba's. The paper leaves its 5x5 convolution open: docs/study.md.
model = dict(backbone=dict(block='mila', conv_kernel_size=5))
