"""``init_cfg=dict(type='Pretrained', ...)`` of a MILA backbone: mmengine's, but strict and with a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mila_mm.errors import UserError
from mila_mm.weights.load import load_backbone

_OPTIONS = frozenset({'type', 'checkpoint', 'prefix', 'strict', 'adapt_in_channels', 'key', 'map_location'})


def init_pretrained(backbone: nn.Module, base_init: Callable[[], None]) -> None:
    """Initialise a backbone as its ``init_cfg`` says, loading ``Pretrained`` weights completely or not at all.

    mmengine's own ``Pretrained`` loads what fits and prints the rest. Beyond its ``checkpoint``,
    ``prefix`` and ``map_location``, this one takes ``strict=False`` (load what fits), ``adapt_in_channels=True``
    (another number of input channels) and ``key`` (the entry of the file, e.g. ``'state_dict_ema'``).

    Args:
        backbone: A ``BaseModule``.
        base_init: Its base class's ``init_weights``, bound.

    Raises:
        UserError: If an option is unknown, or the weights cannot be had or do not fit.
    """
    original = backbone.init_cfg
    configs = [original] if isinstance(original, Mapping) else list(original or ())
    backbone.init_cfg = [_Pretrained.config(cfg) if _is_pretrained(cfg) else cfg for cfg in configs] or None
    try:
        base_init()
    finally:
        backbone.init_cfg = original


class _Pretrained:
    """Takes the place of mmengine's initialiser of that name.

    Args:
        options: The user's ``init_cfg``.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options

    @classmethod
    def config(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return what mmengine builds this initialiser from."""
        _check(options)
        return dict(type=cls, options=dict(options))

    def __call__(self, module: nn.Module) -> None:
        """Load the weights and note where they came from."""
        options = self.options
        load_backbone(
            module,
            options['checkpoint'],
            prefix=options.get('prefix'),
            strict=options.get('strict', True),
            adapt_in_channels=options.get('adapt_in_channels', False),
            key=options.get('key'),
        )
        if hasattr(module, '_params_init_info'):
            from mmengine.model import update_init_info

            update_init_info(module, init_info=f'Pretrained: load from {options["checkpoint"]}')


def _is_pretrained(cfg: Any) -> bool:
    kind = cfg.get('type') if isinstance(cfg, Mapping) else None
    return kind == 'Pretrained' or getattr(kind, '__name__', '') == 'PretrainedInit'


def _check(cfg: Mapping[str, Any]) -> None:
    unknown = sorted(set(cfg) - _OPTIONS)
    if unknown:
        raise UserError(
            f'init_cfg of type Pretrained: unknown option {", ".join(unknown)}; '
            f'expected some of {", ".join(sorted(_OPTIONS))}'
        )
    if not isinstance(cfg.get('checkpoint'), str) or not cfg['checkpoint']:
        raise UserError(
            f'init_cfg of type Pretrained: expected a checkpoint, got {cfg.get("checkpoint")!r}; '
            "say checkpoint='mila://tiny-in1k' or a path"
        )
