# Tests checkpoints of ..._cityscapes_1024x2048.py on images of any size, in tiles: the GPU holds one tile, the host the
# image, its labels and the logits of one row of tiles. For other images change test_dataloader.
_base_ = './upernet_mila_t_cityscapes_1024x2048.py'

model = dict(
    _delete_=True,
    type='mila_mm.TiledSegmentor',
    module={{_base_.model}},
    tile=(1024, 1024),
    stride=(768, 768),
    tiles_per_batch=1,
)
test_dataloader = dict(
    dataset=dict(pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')])
)
