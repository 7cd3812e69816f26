"""What training and testing do to a config alike before a runner is built from it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mila_mm.engine.config.checks import check_pretrained, check_work_dir
from mila_mm.errors import UserError
from mila_mm.weights.loaders import register_loaders
from mila_mm.weights.source.cache import configure

_LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def set_work_dir(cfg: Config, work_dir: str | None) -> None:
    """Settle the work folder: the argument, else the config's, else one named after the config.

    Args:
        cfg: Config to change.
        work_dir: Folder, or None.
    """
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(cfg.filename).stem)


def prepare(cfg: Config, scope: str) -> None:
    """Make a config ready for the runner.

    Args:
        cfg: Config with ``work_dir`` to change.
        scope: 'mmdet' or 'mmseg', set as the default scope where the config has none.

    Raises:
        UserError: If the work folder cannot be written or a file of pretrained weights does not exist.
    """
    cfg.setdefault('default_scope', scope)
    register_loaders()  # also where no MILA is in the config
    configure_weights(cfg)
    check_work_dir(cfg.work_dir)
    check_pretrained(cfg.model)
    for loader in _loaders(cfg):
        # torch refuses these two for a loader without workers, whom `--cfg-options ...num_workers=0` makes
        if loader.get('num_workers', 0) == 0:
            loader['persistent_workers'] = False
            loader.pop('prefetch_factor', None)
    _log_short_runs(cfg)


def configure_weights(cfg: Config) -> None:
    """Apply ``mila_weights=dict(mirrors=[...], offline=True, ...)`` of a config to how weights are fetched.

    Args:
        cfg: Config.

    Raises:
        UserError: If an entry is unknown or of a wrong type.
    """
    options = cfg.get('mila_weights') or {}
    try:
        configure(**options)
    except TypeError as error:
        raise UserError(f'mila_weights: {error}; expected mirrors, offline, timeout, attempts or backoff') from error


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
