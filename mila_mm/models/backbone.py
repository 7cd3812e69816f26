"""What OpenMMLab expects of a backbone beyond its forward: initialisation, freezing, depths for learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import nn

from mila_mm.nn.layers import NormLayer
from mila_mm.weights.loaders import init_pretrained


class Backbone(BaseModule):
    """The contract, for a class that is a :class:`mila_mm.nn.trunk.Trunk` as well and calls :meth:`_freeze`.

    Args:
        init_cfg: dict(type='Pretrained', checkpoint=...) or any of mmengine's.
    """

    frozen_stages = -1
    norm_eval = False

    def _freeze(self, frozen_stages: int, norm_eval: bool) -> None:
        """Check and apply what is to be kept as it is during training."""
        if not -1 <= frozen_stages <= len(self.layers):
            raise ValueError(
                f'{self._name}: expected frozen_stages from -1 to {len(self.layers)} (the stages that are '
                f'built), got {frozen_stages!r}'
            )
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self._freeze_stages()

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says; ``Pretrained`` weights must fit, see :mod:`mila_mm.weights.loaders`."""
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

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode; frozen stages, and with ``norm_eval`` all BatchNorms, stay in eval mode."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def norm_factory(norm_cfg: Mapping[str, Any] | None) -> NormLayer:
    """Turn a config of OpenMMLab's, or None for BatchNorm, into what makes a norm from a number of channels."""
    return partial(_build_norm, {'type': 'BN'} if norm_cfg is None else dict(norm_cfg))


def _build_norm(norm_cfg: dict[str, Any], channels: int) -> nn.Module:
    return build_norm_layer(norm_cfg, channels)[1]
