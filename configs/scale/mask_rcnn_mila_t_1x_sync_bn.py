# DDP with the BatchNorms of stem and downsampling normalising over all GPUs, for one or two images on each.
_base_ = '../mask_rcnn_mila_t_1x.py'

sync_bn = 'torch'
