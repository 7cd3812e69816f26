"""Layer-wise learning rates: the deeper a layer of the backbone, the faster it learns."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from mila_mm.errors import UserError
from mila_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Scale the learning rate of a backbone's parameters by ``layer_decay_rate ** (distance from the last depth)``.

    The backbone says how deep each parameter lies (``get_layer_depth``); its output norms and all that is not
    backbone learn at the full rate. mmdet's and mmseg's own constructors know the layers of ConvNeXt and BEiT only.
    All of mmengine's ``paramwise_cfg`` works beside it, ``custom_keys`` with ``lr_mult`` or ``decay_mult`` for one.

    Args:
        paramwise_cfg: mmengine's options and ``layer_decay_rate`` in (0, 1].

    Example:
        >>> optim_wrapper = dict(
        ...     constructor='mila_mm.LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(layer_decay_rate=0.8, custom_keys={'norm': dict(decay_mult=0.0)}))
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        rate = (paramwise_cfg or {}).get('layer_decay_rate')
        if not isinstance(rate, (int, float)) or isinstance(rate, bool) or not 0 < rate <= 1:
            raise UserError(f'optim_wrapper.paramwise_cfg.layer_decay_rate: expected a number in (0, 1], got {rate!r}')
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        if self.base_lr is None:
            raise UserError('optim_wrapper.optimizer.lr: layer-wise learning rates need one, got none')

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **kwargs: Any) -> None:
        """Collect the parameters as mmengine does, then scale.

        Args:
            params: Is extended by a group for each parameter.
            module: The model, or a part of it in the recursion.

        Raises:
            UserError: If the model's backbone does not say how deep its parameters lie.
        """
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:
            return  # the outermost call scales, once
        backbone = getattr(module, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise UserError(
                f'layer-wise learning rates: {type(module).__name__} has no backbone with get_layer_depth; '
                'use a MILA backbone or another constructor'
            )
        names = {id(param): name for name, param in module.named_parameters()}
        for group in params:
            name = names[id(group['params'][0])]
            if name.startswith('backbone.'):
                depth, depths = backbone.get_layer_depth(name, 'backbone.')
                scale = self.paramwise_cfg['layer_decay_rate'] ** (depths - 1 - depth)
                group['lr'] = group.get('lr', self.base_lr) * scale
