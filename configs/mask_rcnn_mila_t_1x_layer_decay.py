# Mask R-CNN, MILA tiny, 1x, from ImageNet weights with layer-wise learning rates.
_base_ = './mask_rcnn_mila_t_1x.py'

model = dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='mila://tiny-in1k')))
optim_wrapper = dict(
    constructor='mila_mm.LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(layer_decay_rate=0.9)
)  # a rate of our choice, not of the paper
