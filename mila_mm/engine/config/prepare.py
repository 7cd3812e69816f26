"""What training and testing do to a config alike before a runner is built from it."""

import os
from collections.abc import Iterator
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from mmengine.config import Config
from mmengine.dist import is_distributed
from torch import distributed

from mila_mm.engine.config.checks import check_pretrained, check_work_dir
from mila_mm.engine.config.environment import name_ranks
from mila_mm.engine.hooks.checkpoint import register_atomic_backend
from mila_mm.errors import UserError
from mila_mm.weights.loaders import fetch_beforehand
from mila_mm.weights.source.cache import Settings, configure

_LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def set_work_dir(cfg: Config, work_dir: str | None) -> None:
    """Settle the work folder: the argument, else the config's, else one named after the config."""
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(cfg.filename).stem)
    cfg.work_dir = os.path.expanduser(cfg.work_dir)  # a shell leaves the ~ in --work-dir=~/run as it is


def check_folders(cfg: Config) -> None:
    """Check that the folders that a run writes to can be written, and have room.

    Raises:
        UserError: If not.
    """
    check_work_dir(cfg.work_dir)
    checkpoint = (cfg.get('default_hooks') or {}).get('checkpoint')
    out_dir = checkpoint.get('out_dir') if isinstance(checkpoint, dict) else None
    if isinstance(out_dir, str) and out_dir.startswith('file://'):
        out_dir = checkpoint['out_dir'] = (
            unquote(out_dir.removeprefix('file://')) or '.'
        )  # mmengine has no such storage
    if isinstance(out_dir, str) and '://' not in out_dir:
        out_dir = checkpoint['out_dir'] = os.path.expanduser(out_dir)
        check_work_dir(out_dir, 'default_hooks.checkpoint.out_dir')


def prepare(cfg: Config, scope: str) -> None:
    """Make a config ready for the runner.

    Args:
        cfg: Config with ``work_dir`` to change.
        scope: 'mmdet' or 'mmseg', set as the default scope where the config has none.

    Raises:
        UserError: If the work folder cannot be written or a file of pretrained weights does not exist.
    """
    cfg.setdefault('default_scope', scope)
    configure_weights(cfg)
    check_work_dir(cfg.work_dir)
    check_pretrained(cfg.model)
    for loader in _loaders(cfg):
        # torch refuses these two for a loader without workers, whom `--cfg-options ...num_workers=0` makes
        if loader.get('num_workers', 0) == 0:
            loader['persistent_workers'] = False
            loader.pop('prefetch_factor', None)
    _log_short_runs(cfg)


def fetch_weights(cfg: Config, *parts: Any) -> None:
    """Fetch the weights that a config names, before the processes of a job join.

    All processes of a machine call this; one of them downloads, and the others wait for its lock. Once they have
    joined, a machine that still downloads would keep the others in a collective operation until that times out.

    Args:
        cfg: Config, with ``load_from`` and ``mila_weights`` if need be.
        *parts: Where else ``init_cfg=dict(type='Pretrained', checkpoint=...)`` stands, the model of a training.

    Raises:
        UserError: If something cannot be fetched.
    """
    configure_weights(cfg)
    named = [cfg.get('load_from'), *(name for part in parts for name in _pretrained_in(part))]
    for name in dict.fromkeys(name for name in named if isinstance(name, str)):
        fetch_beforehand(name)


def _pretrained_in(part: Any) -> Iterator[Any]:
    if isinstance(part, dict):
        if getattr(part.get('type'), '__name__', part.get('type')) in ('Pretrained', 'PretrainedInit'):
            yield part.get('checkpoint')
        for value in part.values():
            yield from _pretrained_in(value)
    elif isinstance(part, (list, tuple)):
        for value in part:
            yield from _pretrained_in(value)


def configure_weights(cfg: Config) -> None:
    """Apply ``mila_weights=dict(mirrors=[...], offline=True, ...)`` of a config to how weights are fetched.

    Raises:
        UserError: If an entry is unknown or of a wrong type.
    """
    options = cfg.get('mila_weights') or {}
    try:
        configure(**options)
    except TypeError as error:
        names = [field.name for field in fields(Settings)]
        raise UserError(f'mila_weights: {error}; expected some of {", ".join(names)}') from error


def _loaders(cfg: Config) -> Iterator[dict[str, Any]]:
    for name in _LOADERS:
        loader = cfg.get(name)
        if isinstance(loader, dict):
            yield loader


def _log_short_runs(cfg: Config) -> None:
    """Let a run of fewer iterations than the logging interval still print its losses."""
    max_iters = (cfg.get('train_cfg') or {}).get('max_iters')
    logger = (cfg.get('default_hooks') or {}).get('logger')
    if max_iters and logger and logger.get('interval', 10) > max_iters:
        logger['interval'] = max(1, max_iters // 10)


_LOOPS = ('EpochBasedTrainLoop', 'IterBasedTrainLoop')
_SAMPLER = 'mila_mm.ResumableBatchSampler'


def make_safe(cfg: Config) -> None:
    """Put the parts of this package in the place of mmengine's; a second call changes nothing.

    Parts of another type than mmengine's own are left as they are.
    """
    register_atomic_backend()
    _use_hooks(cfg)
    _use_loop(cfg.train_cfg)
    _use_sampler(cfg.train_dataloader)


def _use_hooks(cfg: Config) -> None:
    hooks = list(cfg.get('custom_hooks') or [])
    for kind in ('mila_mm.RunIdentityHook', 'mila_mm.ResumeStateHook', 'mila_mm.DivergenceHook'):
        if not any(isinstance(hook, dict) and hook.get('type') in (kind, kind[8:]) for hook in hooks):
            hooks.append(dict(type=kind))
    cfg.custom_hooks = hooks
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


def prepare_launch(cfg: Config, launcher: str) -> None:
    """Set the launcher of a config and, on a CPU, join the processes over gloo.

    mmengine's own start calls ``torch.cuda.set_device`` whatever the backend; with a process group
    that is there already it leaves it alone.

    Args:
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        UserError: If the launcher's environment variables are not set, or the timeout is no time.
    """
    name_ranks(launcher)
    cfg.launcher = launcher
    if launcher == 'none' or torch.cuda.is_available() or is_distributed():
        return
    seconds = ((cfg.get('env_cfg') or {}).get('dist_cfg') or {}).get('timeout')
    if seconds is not None and not (isinstance(seconds, (int, float)) and seconds > 0):
        raise UserError(f'env_cfg.dist_cfg.timeout: expected a number of seconds above 0, got {seconds!r}')
    distributed.init_process_group('gloo', timeout=None if seconds is None else timedelta(seconds=seconds))
