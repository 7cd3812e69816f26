_base_ = './_base_/mask_rcnn_1x.py'

# The whole block is Mamba's. The paper leaves its 5x5 convolution and the widths of q and k open: docs/study.md.
model = dict(backbone=dict(block='mamba', conv_kernel_size=5))
