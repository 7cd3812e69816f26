"""The backbones that are compared, of two sizes, and how one gets into a config."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from mmengine.config import Config, ConfigDict

NAMES = ('MILA', 'ResNet', 'Swin', 'ConvNeXt')
SIZES = ('narrow', 'tiny')
MILA_ARCH = {'narrow': 'nano', 'tiny': 'tiny'}

_BATCH_NORM = dict(type='BN', requires_grad=True)
# Type and arguments with the widths of the four maps. Narrow ones have the multiply-adds of MILA nano within 10 % at
# 256 x 256 (638 M: 634 M, 619 M, 613 M); stochastic depth is off for all of them.
BACKBONES: dict[str, dict[str, tuple[dict[str, Any], list[int]]]] = {
    'narrow': {
        'MILA': (dict(type='mila_mm.MILA', arch='nano', drop_path_rate=0.0), [32, 64, 128, 256]),
        'ResNet': (
            dict(type='ResNet', depth=18, stem_channels=32, base_channels=32, norm_cfg=_BATCH_NORM),
            [32, 64, 128, 256],
        ),
        'Swin': (
            dict(
                type='SwinTransformer',
                embed_dims=32,
                depths=[2, 2, 2, 2],
                num_heads=[2, 4, 8, 16],
                window_size=7,
                drop_path_rate=0.0,
            ),
            [32, 64, 128, 256],
        ),
        'ConvNeXt': (
            dict(
                type='mmpretrain.ConvNeXt',
                arch=dict(depths=[2, 2, 4, 2], channels=[40, 80, 160, 320]),
                layer_scale_init_value=1.0,
                gap_before_final_norm=False,
                drop_path_rate=0.0,
            ),
            [40, 80, 160, 320],
        ),
    },
    'tiny': {
        'MILA': (dict(type='mila_mm.MILA', arch='tiny', drop_path_rate=0.1), [64, 128, 256, 512]),
        'ResNet': (dict(type='ResNet', depth=50, norm_cfg=_BATCH_NORM), [256, 512, 1024, 2048]),
        'Swin': (
            dict(
                type='SwinTransformer',
                embed_dims=96,
                depths=[2, 2, 6, 2],
                num_heads=[3, 6, 12, 24],
                window_size=7,
                drop_path_rate=0.1,
            ),
            [96, 192, 384, 768],
        ),
        'ConvNeXt': (
            dict(
                type='mmpretrain.ConvNeXt',
                arch='tiny',
                layer_scale_init_value=1.0,
                gap_before_final_norm=False,
                drop_path_rate=0.1,
            ),
            [96, 192, 384, 768],
        ),
    },
}
LABELS = {
    'narrow': {
        'MILA': 'MILA nano',
        'ResNet': 'ResNet-18, 32 wide',
        'Swin': 'Swin, 32 wide, 2-2-2-2',
        'ConvNeXt': 'ConvNeXt, 40 wide, 2-2-4-2',
    },
    'tiny': {'MILA': 'MILA-T', 'ResNet': 'ResNet-50', 'Swin': 'Swin-T', 'ConvNeXt': 'ConvNeXt-T'},
}


def put_backbone(cfg: Config, size: str, name: str) -> None:
    """Put a backbone from random weights into a config whose own backbone is MILA, and its widths where they are read.

    Args:
        cfg: Config with ``model.neck`` (a detector) or ``model.decode_head``; changed.
        size: One of :data:`SIZES`.
        name: One of :data:`NAMES`.
    """
    options, widths = deepcopy(BACKBONES[size][name])
    indices = tuple(cfg.model.backbone.get('out_indices', (0, 1, 2, 3)))
    cfg.model.backbone = ConfigDict(options, out_indices=indices)
    read = [widths[index] for index in indices]
    if 'neck' in cfg.model:
        cfg.model.neck.in_channels = read
        return
    cfg.model.decode_head.in_channels = read
    cfg.model.auxiliary_head.in_channels = read[cfg.model.auxiliary_head.in_index]
