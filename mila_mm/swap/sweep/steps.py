"""One training step and one prediction of a swapped config, on the CPU, with generated images and annotations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

from mila_mm.engine.config.load import resolve_config
from mila_mm.errors import UserError
from mila_mm.swap.api import plan_swap
from mila_mm.swap.job import plain, value_at
from mila_mm.swap.light import in_scope, reason_of
from mila_mm.swap.samples import make_batch
from mila_mm.swap.source import read_source
from mila_mm.swap.trial import EVEN, SIZES, for_trial


class StepFailed(Exception):
    """A swapped model did not train or predict; the message is the reason."""


@dataclass(frozen=True)
class Step:
    """What one step has shown.

    Attributes:
        loss: The sum of the losses, before the weights moved.
        moved: Share of the trainable parameters that the optimizer has changed.
        predictions: Number of images with a prediction.
        size: Height and width of the images.
    """

    loss: float
    moved: float
    predictions: int
    size: tuple[int, int]


def train_and_predict(config: str, arch: str = 'nano') -> Step:
    """Swap a small MILA into a config, train its model by one step with its optimizer, and predict.

    A model inside of a model (the detector of a tracker or of a semi-supervised pair) is trained alone.

    Args:
        config: As for :func:`mila_mm.swap.plan_swap`.
        arch: Size of MILA. Defaults to 'nano'.

    Raises:
        StepFailed: With the reason.
        UserError: If the swap is refused.
    """
    source = read_source(config)
    result = plan_swap(config, arch, recipe='mila', whole_models=False)
    cfg = plain(value_at(result.config._cfg_dict.to_dict(), source.holder))
    torch.manual_seed(0)
    try:
        model = _real(cfg, source.scope)
        wrapper = _optimizer(model, result.config, len(source.holder) == 1)
    except Exception as error:
        raise StepFailed(f'building: {reason_of(error)}') from error
    reason = ''
    for size in (EVEN, SIZES[-1]):
        try:
            return _step(model, wrapper, cfg, source.scope, size)
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - any error of a foreign model is the finding
            reason = reason_of(error)
    raise StepFailed(reason)


def _real(cfg: dict[str, Any], scope: str) -> nn.Module:
    """Build a model with its own random weights."""
    cfg = for_trial(_find_teacher(cfg, scope), scope)
    cfg = _without_downloads(cfg)
    with in_scope(scope):
        model = revert_sync_batchnorm(MODELS.build(ConfigDict(cfg)))
        model.init_weights()
    return model


def _find_teacher(cfg: dict[str, Any], scope: str) -> dict[str, Any]:
    """Name a teacher's config as a file of the installed library, and no weights for it."""
    teacher = cfg.get('teacher_config')
    if isinstance(teacher, str) and not FilePath(teacher).is_file():
        cfg = {**cfg, 'teacher_config': str(resolve_config(f'{scope}::{teacher.removeprefix("configs/")}'))}
    return {**cfg, 'teacher_ckpt': None} if 'teacher_ckpt' in cfg else cfg


def _without_downloads(cfg: Any) -> Any:
    """Take out what names files of weights; other initialisations stay."""
    if isinstance(cfg, dict):
        named = isinstance(cfg.get('init_cfg'), dict) and cfg['init_cfg'].get('type') == 'Pretrained'
        return {
            k: _without_downloads(v) for k, v in cfg.items() if k != 'pretrained' and not (named and k == 'init_cfg')
        }
    if isinstance(cfg, (list, tuple)):
        return type(cfg)(_without_downloads(v) for v in cfg)
    return cfg


def _optimizer(model: nn.Module, config: Config, whole: bool) -> OptimWrapper:
    """Build the config's optimizer; AMP, which needs a GPU, and schedules are left out."""
    cfg = plain((config.get('optim_wrapper') or {}) if whole else {})
    cfg = dict(cfg) or dict(optimizer=dict(type='AdamW', lr=1e-4))
    cfg = {k: v for k, v in cfg.items() if k not in ('loss_scale', 'dtype', 'accumulative_counts')}
    cfg['type'] = 'OptimWrapper'
    scope = 'mmdet' if type(model).__module__.startswith('mmdet') else 'mmseg'
    with in_scope(scope):
        return build_optim_wrapper(model, ConfigDict(cfg))


def _step(model: nn.Module, wrapper: OptimWrapper, cfg: dict[str, Any], scope: str, size: tuple[int, int]) -> Step:
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with in_scope(scope):
        model.train()
        if scope == 'mmseg':
            model.data_preprocessor.size = size
        log = model.train_step(make_batch(cfg, scope, size), wrapper)
        loss = float(log['loss']) if 'loss' in log else float(sum(v.sum() for v in log.values()))
        if not math.isfinite(loss):
            raise StepFailed(f'the loss is {loss}: ' + ', '.join(f'{k}={float(v.sum()):g}' for k, v in log.items()))
        moved = [not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad]
        model.eval()
        with torch.no_grad():
            # one clip, as in all configs for video: some heads take no more
            clips = 1 if str(cfg.get('type')).endswith('Video') else 2
            predictions = model.test_step(make_batch(cfg, scope, size, clips))
    if not any(moved):
        raise StepFailed('the optimizer moved no parameter')
    return Step(loss, sum(moved) / len(moved), len(predictions), size)
