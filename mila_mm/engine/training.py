"""Train a detector or segmentor."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mila_mm.engine.config.build_errors import plain_failures, say_once_that_the_log_is_full
from mila_mm.engine.config.checks import check_data
from mila_mm.engine.config.environment import rank_of
from mila_mm.engine.config.extras import Extras
from mila_mm.engine.config.load import load_config, refuse_old, scope_of
from mila_mm.engine.config.prepare import (
    check_folders,
    fetch_weights,
    make_safe,
    prepare,
    prepare_launch,
    set_work_dir,
)
from mila_mm.engine.data.first_step import naming_parts
from mila_mm.engine.hooks.check_data import checked_start
from mila_mm.engine.hooks.curves import CurvesHook
from mila_mm.engine.hooks.stop import StopHook
from mila_mm.engine.optimizers.amp import check_precision, configured_amp, use_amp
from mila_mm.engine.runner.find_checkpoint import candidates, check_checkpoint_file, settle_resume
from mila_mm.engine.runner.identity import names_of
from mila_mm.engine.runner.lease import leased
from mila_mm.engine.runner.runner import Runner as OwnRunner
from mila_mm.engine.runner.runner import build_runner
from mila_mm.engine.screen import SummaryHook
from mila_mm.errors import UserError
from mila_mm.registry import HOOKS
from mila_mm.stopping import StopRequest


def train(
    config: str,
    *,
    work_dir: str | None = None,
    resume: str | None = None,
    pretrained: str | None = None,
    amp: bool = False,
    amp_dtype: str | None = None,
    auto_scale_lr: bool = False,
    extras: Extras | None = None,
    debug_nonfinite: bool = False,
    max_nonfinite: int | None = None,
    resume_changed: str = '',
    launcher: str = 'none',
    check: bool = True,
    cfg_options: Sequence[str] = (),
    stop: StopRequest | None = None,
) -> Runner:
    """Train as a config says.

    Args:
        config: Path of a config, or ``mmdet::`` / ``mmseg::`` and a path there.
        work_dir: Folder for logs and checkpoints. Defaults to ``./work_dirs/NAME_OF_THE_CONFIG``.
        resume: 'auto' for the newest checkpoint in the work folder, or a checkpoint. Defaults to None.
        pretrained: Weights that the backbone starts from, ``mila://NAME`` or a file. Defaults to None.
        amp: Whether to use automatic mixed precision, also without ``amp`` in the config. Defaults to False.
        amp_dtype: 'bf16' or 'fp16'. Defaults to the config's, else to bf16 where the device has it.
        auto_scale_lr: Whether to scale the learning rate to the total batch. Defaults to False.
        extras: Loggers, averaged weights, an early end, which checkpoints to keep. Defaults to the config's.
        debug_nonfinite: Whether to stop at a loss or gradient that is not finite, and say where it comes from.
            Defaults to False.
        max_nonfinite: Number of losses in a row that end the run when they are not finite. Defaults to 10.
        resume_changed: What differs on purpose from the run that is resumed: names of
            :data:`mila_mm.engine.runner.identity.CHANGES`, with commas. Defaults to ''.
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'. Defaults to 'none'.
        check: Whether to check config and data before the first step. Defaults to True.
        cfg_options: Overrides as ``key.of.entry=value``.
        stop: What :func:`mila_mm.stopping.stop_signals` gives, for signals to save and stop. Defaults to None.

    Returns:
        The runner after training; it knows ``work_dir``, ``log_dir`` and the model.

    Raises:
        UserError: For anything in the arguments, the config or the data that does not work.
    """
    cfg = load_config(config, cfg_options)
    scope = scope_of(cfg)
    set_work_dir(cfg, work_dir)
    check_folders(cfg)  # before anything that takes long
    _settle(stop, cfg, launcher)
    _refuse_incomplete(cfg, config)
    _set_resume(cfg, resume)
    if pretrained is not None:
        use_pretrained(cfg, pretrained)
    if amp or configured_amp(cfg):
        use_amp(cfg, amp_dtype or configured_amp(cfg))
    check_precision(cfg)
    if auto_scale_lr:
        _use_auto_scale_lr(cfg)
    (extras or Extras()).apply(cfg)
    stages = ['train', 'val'] if cfg.get('val_cfg') else ['train']
    check_data(cfg, stages)
    if max_nonfinite is not None:
        _set_hook(cfg, 'DivergenceHook', max_nonfinite=max_nonfinite)
    _set_hook(cfg, 'RunIdentityHook', changed=list(names_of(resume_changed)))
    checking = checked_start(cfg, stages, scope, launcher) if check else None
    fetch_weights(cfg, cfg.model)
    prepare_launch(cfg, launcher)
    prepare(cfg, scope)
    make_safe(cfg)
    if debug_nonfinite:
        cfg.custom_hooks = [*cfg.custom_hooks, dict(type='mila_mm.NonFiniteHook')]
    with plain_failures(resumes=True):
        runner = build_runner(without_testing(cfg))
        runner.cfg = cfg  # written to the work folder and into checkpoints, where testing starts from it
        notices = [nothing_to_resume(cfg), starts_beside_another(cfg), starts_from_scratch(cfg)]
        for hook in (SummaryHook(), CurvesHook()):
            runner.register_hook(hook)
        runner.register_hook(NoticeHook([line for line in notices if line is not None]))
        if checking is not None:
            runner.register_hook(checking)
        if stop is not None:
            runner.register_hook(StopHook(stop))
        say_once_that_the_log_is_full(runner.logger)
        with naming_parts(runner):
            _train(runner)
    return runner


def _settle(stop: StopRequest | None, cfg: Config, launcher: str) -> None:
    if stop is not None:
        stop.settle(Path(cfg.work_dir).absolute(), first=rank_of(launcher) == 0)


def _refuse_incomplete(cfg: Config, config: str) -> None:
    missing = [name for name in ('train_dataloader', 'train_cfg', 'optim_wrapper') if not cfg.get(name)]
    if missing:
        refuse_old(cfg)
        raise UserError(f'config {config} cannot be trained: it has no {", ".join(missing)}')


def _train(runner: Runner) -> None:
    if isinstance(runner, OwnRunner):
        runner.train()
        return
    with leased(runner.work_dir):  # what ours does by itself
        settle_resume(runner)
        runner.train()


def _set_resume(cfg: Config, resume: str | None) -> None:
    """Settle where the run starts from: a checkpoint to resume, weights to load, or neither.

    Args:
        resume: 'auto', a checkpoint, or None for what the config says.

    Raises:
        UserError: If the checkpoint does not exist.
    """
    if resume == 'auto':
        cfg.resume = True
        cfg.load_from = None
    elif resume is not None:
        check_checkpoint_file(resume, '--resume')
        cfg.resume = True
        cfg.load_from = resume
    elif cfg.get('load_from'):
        check_checkpoint_file(cfg.load_from, 'load_from')


def _use_auto_scale_lr(cfg: Config) -> None:
    """Turn on the scaling of the learning rate to the total batch.

    Raises:
        UserError: If the config does not say for which batch its learning rate is meant.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise UserError(
            '--auto-scale-lr: the config does not say for which total batch its learning rate is meant\n'
            'Add it: --cfg-options auto_scale_lr.base_batch_size=16'
        )
    cfg.auto_scale_lr.enable = True


def _set_hook(cfg: Config, kind: str, **options: Any) -> None:
    """Put one of this package's hooks into a config, in place of one of its kind."""
    hooks = cfg.get('custom_hooks') or []
    others = [each for each in hooks if not isinstance(each, dict) or each.get('type') not in (kind, f'mila_mm.{kind}')]
    cfg.custom_hooks = [*others, dict(type=f'mila_mm.{kind}', **options)]


def use_pretrained(cfg: Config, weights: str) -> None:
    """Let the backbone start from weights.

    Args:
        weights: ``mila://NAME`` or a file.

    Raises:
        UserError: If the config has no backbone, or another one than MILA.
    """
    if not isinstance(cfg.get('model'), dict) or 'backbone' not in cfg.model:
        raise UserError('--pretrained: the config has no model.backbone for the weights')
    if not _is_mila(cfg.model.backbone):
        raise UserError(
            f'--pretrained: expected a backbone of type mila_mm.MILA, got {cfg.model.backbone.get("type")}\n'
            'Other backbones load their weights as their own init_cfg says.'
        )
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=weights)


def starts_from_scratch(cfg: Config) -> str | None:
    """Say so where a published size of MILA is about to be trained from random weights.

    Returns:
        One line for the log, or None where there is nothing to say.
    """
    backbone = cfg.model.get('backbone') or {}
    arch = backbone.get('arch', 'tiny')
    known = _is_mila(backbone) and arch in ('tiny', 'small', 'base')
    resumes = cfg.get('resume') and nothing_to_resume(cfg) is None
    if not known or backbone.get('init_cfg') or cfg.get('load_from') or resumes:
        return None
    return (
        f'The backbone starts from random weights, while the published results start from ImageNet: '
        f'--pretrained mila://{arch}-in1k'
    )


def nothing_to_resume(cfg: Config) -> str | None:
    """Say so where a run was to be resumed and the work folder holds no checkpoint.

    Returns:
        One line for the log, or None where there is nothing to say.
    """
    if not cfg.get('resume') or cfg.get('load_from') or candidates(cfg):
        return None
    return f'--resume: {cfg.work_dir} holds no checkpoint: the run starts anew'


def starts_beside_another(cfg: Config) -> str | None:
    """Say so where a run starts anew in a folder that holds checkpoints.

    Args:
        cfg: Config of the run, with ``work_dir``.

    Returns:
        One line for the log, or None where there is nothing to say.
    """
    if cfg.get('resume') or not candidates(cfg):
        return None
    return (
        f'{cfg.work_dir} holds checkpoints of an earlier run: this one starts anew and overwrites those of the same '
        'name; --resume would continue that one'
    )


def without_testing(cfg: Config) -> Config:
    """Copy a config without its test part: the trained model is tested by another command.

    Args:
        cfg: Config, left as it is.
    """
    copy = deepcopy(cfg)
    for name in ('test_dataloader', 'test_cfg', 'test_evaluator'):
        copy[name] = None
    return copy


def _is_mila(backbone: Mapping[str, Any]) -> bool:
    return backbone.get('type') in ('MILA', 'mila_mm.MILA')


@HOOKS.register_module()
class NoticeHook(Hook):
    """Log lines as warnings after everything that a start logs, hundreds of lines in mmengine."""

    priority = 'LOWEST'

    def __init__(self, notices: Sequence[str]) -> None:
        self.notices = tuple(notices)

    def before_train(self, runner: Runner) -> None:
        """Log the lines."""
        for notice in self.notices:
            runner.logger.warning(notice)
