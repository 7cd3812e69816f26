"""What a config is given so that its run can be stopped, killed and continued."""

from typing import Any

from mmengine.config import Config

from mila_mm.engine.hooks.checkpoint import register_atomic_backend

_LOOPS = ('EpochBasedTrainLoop', 'IterBasedTrainLoop')
_SAMPLER = 'mila_mm.ResumableBatchSampler'


def make_safe(cfg: Config) -> None:
    """Put the parts of this package in the place of mmengine's; a second call changes nothing.

    Parts of another type than mmengine's own are left as they are.

    Args:
        cfg: Config of a training run.
    """
    register_atomic_backend()
    _use_hooks(cfg)
    _use_loop(cfg.train_cfg)
    _use_sampler(cfg.train_dataloader)


def _use_hooks(cfg: Config) -> None:
    hooks = list(cfg.get('custom_hooks') or [])
    if not any(isinstance(hook, dict) and hook.get('type') == 'mila_mm.ResumeStateHook' for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='mila_mm.ResumeStateHook')]
    default = cfg.get('default_hooks') or {}
    checkpoint = default.get('checkpoint', dict(type='CheckpointHook', interval=1))
    if isinstance(checkpoint, dict) and _own_name(checkpoint.get('type')) == 'CheckpointHook':
        cfg.default_hooks = {**default, 'checkpoint': {**checkpoint, 'type': 'mila_mm.CheckpointHook'}}


def _use_loop(train_cfg: Any) -> None:
    if not isinstance(train_cfg, dict):
        return
    if 'type' not in train_cfg and 'by_epoch' in train_cfg:
        train_cfg['type'] = _LOOPS[0] if train_cfg.pop('by_epoch') else _LOOPS[1]
    if _own_name(train_cfg.get('type')) in _LOOPS:
        train_cfg['type'] = f'mila_mm.{_own_name(train_cfg["type"])}'


def _use_sampler(loader: Any) -> None:
    if not isinstance(loader, dict) or 'sampler' not in loader:
        return
    inner = loader.get('batch_sampler')
    if inner is None:
        loader['batch_sampler'] = dict(type=_SAMPLER, drop_last=loader.pop('drop_last', False))
    elif isinstance(inner, dict) and inner.get('type') != _SAMPLER:
        loader['batch_sampler'] = dict(type=_SAMPLER, batch_sampler=dict(inner))


def _own_name(kind: Any) -> str | None:
    """Return the name of a type of mmengine's, None for any other."""
    if isinstance(kind, type):
        return kind.__name__ if kind.__module__.startswith('mmengine.') else None
    scope, _, name = str(kind).rpartition('.')
    return name if scope in ('', 'mmengine') else None
