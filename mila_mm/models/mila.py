"""``MILA``, the backbone for MMDetection and MMSegmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from ..registry import MODELS
from ..weights.pretrained import init_pretrained
from .trunk import MILATrunk


# In mmengine's own registry as well: mmdet and mmseg fall back to it for a bare ``type='MILA'``.
@ROOT_MODELS.register_module()
@MODELS.register_module()
class MILA(MILATrunk, BaseModule):
    """MILA (Mamba-Inspired Linear Attention, arXiv 2405.16605) as an OpenMMLab backbone.

    Args:
        arch (str | dict): 'tiny', 'small', 'base', 'nano' (ours, not in the paper), or a dict with ``embed_dim``,
            ``depths`` and ``num_heads``. Defaults to 'tiny'.
        in_channels (int): Channels of the image. Defaults to 3.
        out_indices (Sequence[int]): Stages whose maps are returned. Stages behind the last of them are not built.
            Defaults to (0, 1, 2, 3).
        mlp_ratio (float): Hidden width of the MLPs over the width of the tokens. Defaults to 4.0.
        drop_path_rate (float): Stochastic depth of the last block; rises linearly from 0. Defaults to 0.0.
        frozen_stages (int): -1 freezes nothing, 0 the stem, n the stem and the first n stages: no gradient, and eval
            mode. Defaults to -1.
        norm_eval (bool): Keep all BatchNorms in eval mode during training. Defaults to False.
        norm_cfg (dict): Norm of the convolutions in stem and downsampling, say dict(type='SyncBN').
            Defaults to dict(type='BN').
        with_cp (bool): Trade time for memory: recompute each block in the backward. Defaults to False.
        attn_backend (str): 'auto', 'triton' or 'reference'; see :func:`mila_mm.ops.mila_attention`.
            Defaults to 'auto'.
        init_cfg (dict, optional): dict(type='Pretrained', checkpoint=...) or any of mmengine's. Without it linear
            layers start from a truncated normal of std 0.02. Defaults to None.

    Raises:
        ValueError: An argument that makes no model; the message says expected and got.

    Example:
        >>> import torch
        >>> from mila_mm import MILA
        >>> model = MILA('tiny').eval()
        >>> for feature in model(torch.rand(1, 3, 75, 101)):
        ...     print(tuple(feature.shape))
        (1, 64, 19, 26)
        (1, 128, 10, 13)
        (1, 256, 5, 7)
        (1, 512, 3, 4)
    """

    def __init__(self, arch: str | Mapping[str, Any] = 'tiny', in_channels: int = 3,
                 out_indices: Sequence[int] = (0, 1, 2, 3), mlp_ratio: float = 4.0, drop_path_rate: float = 0.0,
                 frozen_stages: int = -1, norm_eval: bool = False, norm_cfg: Mapping[str, Any] | None = None,
                 with_cp: bool = False, attn_backend: str = 'auto', init_cfg: Any = None) -> None:
        norm_cfg = {'type': 'BN'} if norm_cfg is None else dict(norm_cfg)
        super().__init__(arch=arch, in_channels=in_channels, out_indices=out_indices, mlp_ratio=mlp_ratio,
                         drop_path_rate=drop_path_rate, with_cp=with_cp, attn_backend=attn_backend,
                         norm_layer=partial(_build_norm, norm_cfg), init_cfg=init_cfg)
        if not -1 <= frozen_stages <= len(self.layers):
            raise ValueError(f'MILA: expected frozen_stages from -1 to {len(self.layers)} (the stages that are built), '
                             f'got {frozen_stages!r}')
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self._freeze_stages()

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says; ``Pretrained`` weights must fit, see :mod:`mila_mm.weights.pretrained`."""
        init_pretrained(self, super().init_weights)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Tell how deep a parameter lies, for layer-wise learning rates.

        Args:
            param_name: Name of the parameter, with ``prefix``.
            prefix: What stands before the backbone's own names.

        Returns:
            Its depth, and the number of depths: 0 is the stem, 1 to the number of blocks the blocks (a downsampling
            counts with the block before it), the last the output norms, which start fresh.
        """
        depths = [len(stage.blocks) for stage in self.layers]
        parts = param_name.removeprefix(prefix).split('.')
        if parts[0] == 'patch_embed':
            return 0, sum(depths) + 2
        if parts[0] == 'layers':
            stage = int(parts[1])
            block = int(parts[3]) if parts[2] == 'blocks' else depths[stage] - 1
            return 1 + sum(depths[:stage]) + block, sum(depths) + 2
        return sum(depths) + 1, sum(depths) + 2

    def _freeze_stages(self) -> None:
        """Take stem and stages up to ``frozen_stages``, with their output norms, out of training."""
        frozen: list[nn.Module] = [self.patch_embed] if self.frozen_stages >= 0 else []
        for i in range(self.frozen_stages):
            frozen.append(self.layers[i])
            if i in self.out_indices:
                frozen.append(getattr(self, f'norm{i}'))
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> MILA:
        """Set the mode; frozen stages, and with ``norm_eval`` all BatchNorms, stay in eval mode."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def _build_norm(norm_cfg: dict[str, Any], channels: int) -> nn.Module:
    return build_norm_layer(norm_cfg, channels)[1]
