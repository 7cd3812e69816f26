"""Runs that know themselves: who wrote a checkpoint and with which settings, and what has changed since."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mila_mm.engine.hooks.checkpoint import CheckpointHook, write_atomically
from mila_mm.engine.runner.fit import load_checkpoint_into
from mila_mm.engine.runner.identity import RunRecord, Settings, changes, read_record, remarks, write_record
from mila_mm.engine.runner.own_checkpoints import checkpoint_folders
from mila_mm.engine.runner.replay import Fresh, saved_schedulers, schedulers
from mila_mm.errors import UserError
from mila_mm.registry import HOOKS

_OF_NO_SCHEDULE = {'optimizer', 'precision', 'data'}


@HOOKS.register_module()
class RunIdentityHook(Hook):
    """Write into each checkpoint which run it is of and what its future hangs on; compare that when it is resumed.

    ``meta['run_id']`` of a checkpoint is the run's id; ``meta['run']`` holds its starts, number of processes, batch,
    accumulation, length of an epoch and of the run, optimizer, learning rates, schedule, precision, and what tells its
    data set from another. A run that is resumed with others is refused, unless ``changed`` names them: mmengine takes
    learning rate, optimizer, schedule and loss scale from the checkpoint and says nothing, and counts iterations of one
    length as if they had another. ``run.json`` in the work folder says which run the folder belongs to, from its
    first iteration on.

    Args:
        changed: Names of what has been changed on purpose, of
            :data:`mila_mm.engine.runner.identity.CHANGES`. Schedules then go through the iterations that are done
            with the new settings. Defaults to ().
    """

    priority = 'HIGHEST'  # others note in before_train where the run stands; ResumeStateHook may validate and save

    def __init__(self, changed: Sequence[str] = ()) -> None:
        self.changed = frozenset(changed)
        self._record = RunRecord()
        self._settings: Settings | None = None
        self._fresh: Fresh | None = None
        self._taken: set[str] = set()
        self._announced = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare what a checkpoint that is resumed says with the config.

        The optimizer has not been filled from it yet.

        Raises:
            UserError: If something has been changed and is not named.
        """
        if not getattr(runner, '_resume', False):
            return
        meta = checkpoint.get('meta')
        said = meta.get('run') if isinstance(meta, dict) else None
        self._record = RunRecord.of(checkpoint) or RunRecord()
        if 'optimizer' not in checkpoint:
            return  # refused by ResumeStateHook
        self._settings, self._fresh = Settings.of(runner), Fresh(runner)
        before = Settings.read(said)
        found = {} if before is None else changes(before, self._settings)
        held, built = saved_schedulers(checkpoint), len(schedulers(runner))
        if held != built:
            found.setdefault('schedule', f'schedule (the states of {held} schedulers, while the config has {built})')
        if 'optimizer' in found:
            _check_optimizer(before, self._settings)
        refused = [name for name in found if name not in self.changed]
        if refused:
            _check_model(runner, checkpoint)
            raise UserError(
                f'--resume: the checkpoint has another {"; ".join(found[name] for name in refused)}\n'
                f'Put it back, or go on with the change: --resume --resume-changed {",".join(found)}'
            )
        self._taken = set(found)
        if 'precision' in found:
            _drop_loss_scale(checkpoint['optimizer'])
        lines = [f'with another {text}: as --resume-changed says' for text in found.values()]
        if before is None:
            lines.append('the checkpoint does not say with which batch, learning rate and schedule it was trained')
        else:
            lines += remarks(before, self._settings)
        for line in lines:
            runner.logger.warning(f'--resume: {line}')

    def before_train(self, runner: Runner) -> None:
        """Apply what has been changed, and begin another part of the run."""
        if self._settings is None:
            self._settings = Settings.of(runner)
        loop = runner.train_loop
        if self._taken & {'batch', 'world_size', 'epoch_length'} and not isinstance(loop, IterBasedTrainLoop):
            loop._iter = loop._epoch * len(runner.train_dataloader)  # whole epochs count, whatever their length
        if self._fresh is not None and 'optimizer' in self._taken:
            self._fresh.restore_options(runner)
        if self._fresh is not None and self._taken - _OF_NO_SCHEDULE:
            self._fresh.replay(runner)
        self._fresh = None
        self._record.start(runner.iter)

    def _id(self, runner: Runner) -> str:
        """Return the id that the checkpoints carry, by which they are removed as well."""
        return next((hook.run_id for hook in runner.hooks if isinstance(hook, CheckpointHook)), None) or self._record.id

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Take over the work folder, once there is a first batch."""
        if self._announced:
            return
        self._announced = True
        if not is_main_process():
            return
        self._record.id = self._id(runner)
        write_record(runner.work_dir, self._record)
        resumed = getattr(runner, '_load_from', None) if getattr(runner, '_resume', False) else None
        if not resumed or '://' in str(resumed):
            return
        out_dir = next((hook.out_dir for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
        folders = [*checkpoint_folders(runner.work_dir, None), *([Path(out_dir)] if out_dir else [])]
        path = Path(resumed).absolute()
        if any(folder.resolve() == path.parent.resolve() for folder in folders):
            # a roll-back holds from now on, not from the next checkpoint
            write_atomically(Path(runner.work_dir) / 'last_checkpoint', str(path).encode())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add who writes it, and with which settings."""
        if self._settings is not None:
            checkpoint['meta'].update(
                run_id=self._id(runner), run=dict(starts=self._record.plain()['starts'], **self._settings.plain())
            )

    def after_run(self, runner: Runner) -> None:
        """Note that the run has come to its end."""
        if is_main_process() and self._announced:
            self._record.finished = runner.iter
            write_record(runner.work_dir, self._record)


def is_finished(runner: Runner) -> bool:
    """Tell whether the run of a work folder has ended where a resumed runner stands, with nothing left to do."""
    record, loop = read_record(runner.work_dir), runner.train_loop
    by_iteration = isinstance(loop, IterBasedTrainLoop)
    left = loop.max_iters - runner.iter if by_iteration else loop.max_epochs - runner.epoch
    return left <= 0 and record is not None and record.finished == runner.iter


def _drop_loss_scale(saved: Any) -> None:
    """Let the loss scale begin as the config says, of all optimizers where there are several."""
    if isinstance(saved, dict):
        for state in (saved, *saved.values()):
            if isinstance(state, dict):
                state.pop('loss_scaler', None)


def _check_optimizer(before: Settings, now: Settings) -> None:
    kinds = [json.loads(settings.optimizer)['optimizer'].get('type') for settings in (before, now)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f'--resume: the checkpoint holds the state of {kinds[0]}, which {kinds[1]} cannot go on from\n'
            'To start a new training from its weights: --cfg-options load_from=FILE'
        )


def _check_model(runner: Runner, checkpoint: dict) -> None:
    """Refuse the checkpoint of another model for that: what else differs is then beside the point."""
    model = getattr(runner, 'model', None)
    whole = not is_model_wrapper(model) or isinstance(model, DistributedDataParallel)
    if isinstance(model, nn.Module) and whole and checkpoint.get('state_dict'):
        # it may be filled: the run is about to be refused anyhow
        inner = model.module if is_model_wrapper(model) else model
        load_checkpoint_into(inner, checkpoint, '--resume: the checkpoint', runner.cfg.get('load_strict', True))
