"""What flags add to a config: loggers, an average of the weights, an early end, the best checkpoint."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config
from mmengine.hooks import EarlyStoppingHook
from mmengine.runner import Runner

from mila_mm.errors import UserError
from mila_mm.registry import HOOKS

LOGGERS = {'tensorboard': 'TensorboardVisBackend', 'wandb': 'WandbVisBackend', 'mlflow': 'MLflowVisBackend'}


@dataclass(frozen=True)
class Extras:
    """What a training does besides what its config says, with mmengine's own hooks.

    Attributes:
        loggers: Names of :data:`LOGGERS` to write to as well.
        ema: Whether to keep an exponential moving average of the weights, which is validated and saved as the model.
        early_stop: Metric whose standstill ends the training (``coco/bbox_mAP``, ``mIoU``), None to train to the end.
        patience: Validations without a better value after which it ends.
        save_best: Metric of which the best checkpoint is kept besides the newest; ``'auto'`` for the first.
        keep: Newest checkpoints to keep; None for what the config says.
    """

    loggers: tuple[str, ...] = ()
    ema: bool = False
    early_stop: str | None = None
    patience: int = 5
    save_best: str | None = None
    keep: int | None = None

    def apply(self, cfg: Config) -> None:
        """Write it into a config.

        Raises:
            UserError: If a package is missing, or a metric is asked for without validation.
        """
        for name in self.loggers:
            _add_logger(cfg, name)
        hooks = list(cfg.get('custom_hooks') or [])
        if self.ema and not any(hook.get('type') == 'EMAHook' for hook in hooks):
            hooks.append(dict(type='EMAHook', momentum=0.0002, update_buffers=True, priority=49))
        for flag, metric in (('--early-stop', self.early_stop), ('--save-best', self.save_best)):
            if metric is not None and not cfg.get('val_cfg'):
                raise UserError(f'{flag} {metric}: the config validates nothing (it has no val_cfg)')
        if self.early_stop is not None:
            hooks.append(dict(type='mila_mm.EarlyStopHook', monitor=self.early_stop, patience=self.patience))
        cfg.custom_hooks = hooks
        saving: dict[str, Any] = {}
        if self.save_best is not None:
            saving['save_best'] = self.save_best
        if self.keep is not None:
            saving['max_keep_ckpts'] = self.keep
        if saving:
            default = cfg.setdefault('default_hooks', {})
            default['checkpoint'] = {**(default.get('checkpoint') or dict(type='CheckpointHook', interval=1)), **saving}


def _add_logger(cfg: Config, name: str) -> None:
    """Let the visualizer write to a tracker of experiments beside the JSON log."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f'--logger {name}: the package {name} is not installed: pip install {name}')
    visualizer = cfg.get('visualizer') or dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])
    backends = list(visualizer.get('vis_backends') or [])
    if not any(backend.get('type') == LOGGERS[name] for backend in backends):
        backends.append(dict(type=LOGGERS[name]))
    cfg.visualizer = {**visualizer, 'vis_backends': backends}


@HOOKS.register_module()
class EarlyStopHook(EarlyStoppingHook):
    """mmengine's early stopping, which knows a metric without its prefix, and names those there are."""

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Compare the metric with the best one before.

        Raises:
            UserError: If there is no metric of that name.
        """
        self.monitor = metric_key(self.monitor, metrics or {}, '--early-stop')
        super().after_val_epoch(runner, metrics)
        if runner.train_loop.stop_training:  # type: ignore[attr-defined]
            runner.logger.info(f'--early-stop: no better {self.monitor} in {self.patience} validations')


def metric_key(name: str, metrics: Mapping[str, float], flag: str) -> str:
    """Return the full name of a metric that a validation gave.

    Raises:
        UserError: If there is none, or several.
    """
    found = [key for key in metrics if key == name] or [key for key in metrics if key.rpartition('/')[2] == name]
    if len(found) != 1:
        raise UserError(f'{flag} {name}: no such metric; this validation gives {", ".join(metrics) or "none"}')
    return found[0]
