"""What mmengine's checkpoints lack for a run to continue as if it had never stopped."""

import logging
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mila_mm.engine.hooks.identity import is_finished
from mila_mm.engine.random_state import capture_random_state, restore_random_state
from mila_mm.engine.resumed_state import check_resumed
from mila_mm.engine.runner.sampler import seed_samples
from mila_mm.errors import UserError
from mila_mm.registry import HOOKS
from mila_mm.stopping import WorkerStart


@HOOKS.register_module()
class ResumeStateHook(Hook):
    """Keep the random generators and the position in checkpoints, and take no more than state out of resumed ones.

    - A checkpoint holds the states of Python's, numpy's and torch's generators, those of all ranks where
      :class:`~mila_mm.engine.CheckpointHook` writes it; resuming puts them back before the next epoch (or iteration).
      With :class:`~mila_mm.engine.ResumableBatchSampler` in the dataloader, a run that was stopped anywhere
      then gives bitwise the weights of one that was not. Validation leaves these generators as it finds them:
      otherwise a checkpoint written before it could not be continued.
    - A validation that belongs to the checkpoint and that the earlier run did not get to is done first.
    - A checkpoint without the optimizer's state is refused: mmengine would start a fresh one and say nothing.
    - Positions, counts and seeds are checked, and what mmengine would remove files by is dropped
      (:func:`mila_mm.engine.resumed_state.check_resumed`).
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._to_restore: dict[str, Any] | None = None
        self._of_this_rank = False
        self._outside: dict[str, Any] | None = None
        self._loader_generator: torch.Generator | None = None
        self._gathered: list[dict[str, Any]] | None = None
        self._resumed: dict[str, Any] | None = None

    def before_train(self, runner: Runner) -> None:
        """Prepare the dataloader, then do the validation that a resumed checkpoint lacks.

        Making an iterator draws a number. Iteration-based loops make theirs after a resumed run's generators are back:
        from the common generator, that draw would shift all that follows. So the dataloader gets its own.
        """
        loader = runner.train_dataloader
        if isinstance(loader, DataLoader):
            if loader.generator is None:
                loader.generator = torch.Generator().manual_seed(torch.initial_seed())
            seed = getattr(runner, 'seed', None)
            seed_samples(loader, torch.initial_seed() if seed is None else seed)
        self._loader_generator = getattr(loader, 'generator', None)
        for each in (loader, getattr(runner.val_loop, 'dataloader', None)):
            if isinstance(each, DataLoader) and not isinstance(each.worker_init_fn, WorkerStart):
                each.worker_init_fn = WorkerStart(each.worker_init_fn)
        if self._resumed is not None:
            self._take_up(runner, self._resumed)
            self._resumed = None

    def _take_up(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Bring the loop to where the checkpoint was written."""
        loop, position = runner.train_loop, checkpoint.get('position')
        if position is not None and hasattr(loop, 'batches_done'):
            if position['batches'] and position['length'] != len(runner.train_dataloader):
                runner.logger.warning(
                    f'--resume: the checkpoint stands after {position["batches"]} of {position["length"]} batches of '
                    f'an epoch, which now has {len(runner.train_dataloader)}: this epoch begins anew'
                )
            else:
                loop.batches_done = position['batches']
        seed, sampler = checkpoint.get('sampler_seed'), _seeded_sampler(runner.train_dataloader)
        if seed is not None and sampler is not None:
            sampler.seed = seed  # without one in the config each run draws its own, and that of the first run counts
        at = checkpoint['iter']
        if checkpoint.get('validated_iter', at) == at:
            return
        if is_finished(runner):
            runner.logger.warning(
                f'--resume: the run had come to its end at iteration {runner.iter}: nothing is left to do'
            )
        elif hasattr(loop, 'validation_is_due') and loop.validation_is_due():
            # the log and the best checkpoint shall say what they would have said
            runner.message_hub.update_info_dict(checkpoint['shown'])
            runner.logger.info(f'the validation after iteration {runner.iter} was not finished: it is done first')
            runner.val_loop.run()

    def gather_for_checkpoint(self, runner: Runner) -> None:
        """Collect the states of all ranks; called on each of them before a checkpoint is written."""
        self._gathered = all_gather_object(self._state()) if get_world_size() > 1 else None

    def _state(self) -> dict[str, Any]:
        """Return what training goes on with, also inside a validation and before a resumed state is back."""
        if self._to_restore is not None:
            return self._to_restore
        state = capture_random_state() if self._outside is None else dict(self._outside)
        if self._loader_generator is not None:
            state['loader'] = self._loader_generator.get_state()
        return state

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the states of the generators and the position in the epoch."""
        checkpoint['random_state'] = self._state()
        if self._gathered is not None:
            checkpoint['random_states'], self._gathered = self._gathered, None
        sampler = _seeded_sampler(runner.train_dataloader)
        if sampler is not None:
            checkpoint['sampler_seed'] = sampler.seed
        batches = getattr(runner.train_loop, 'batches_done', None)
        if batches is not None:
            checkpoint['position'] = dict(batches=batches, length=len(runner.train_dataloader))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Look at a checkpoint that is resumed.

        Raises:
            UserError: If it lacks the optimizer's state.
        """
        if not runner._resume:
            return
        if 'optimizer' not in checkpoint and 'message_hub' in checkpoint:
            raise UserError(
                '--resume: the checkpoint holds no optimizer state (save_optimizer=False?): training '
                'cannot continue from it\nTo start anew from its weights: --cfg-options load_from=FILE'
            )
        check_resumed(checkpoint, f'--resume: {runner._load_from}')
        states = checkpoint.get('random_states')
        self._of_this_rank = isinstance(states, list) and len(states) == get_world_size()
        self._to_restore = states[get_rank()] if self._of_this_rank else checkpoint.get('random_state')
        kept = ('position', 'sampler_seed', 'validated_iter')
        self._resumed = {key: checkpoint[key] for key in kept if key in checkpoint}
        info = (checkpoint.get('message_hub') or {}).get('runtime_info') or {}
        self._resumed['iter'] = checkpoint['meta']['iter']
        self._resumed['shown'] = {key: info[key] for key in ('epoch', 'iter') if key in info}
        if self._to_restore is None:
            print_log(
                'the checkpoint holds no state of the random generators: training goes on with other random '
                'numbers than an uninterrupted run',
                logger='current',
                level=logging.WARNING,
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Put the generators back, as the last thing before data is drawn."""
        if self._to_restore is not None:
            restore_random_state(self._to_restore, 0 if self._of_this_rank else get_rank())
            ours = self._of_this_rank or get_rank() == 0
            if self._loader_generator is not None and 'loader' in self._to_restore and ours:
                self._loader_generator.set_state(self._to_restore['loader'].cpu())
            self._to_restore = None

    def before_val(self, runner: Runner) -> None:
        """Remember the generators."""
        self._outside = capture_random_state()

    def after_val(self, runner: Runner) -> None:
        """Put the generators back where validation found them."""
        if self._outside is not None:
            # each rank took its own down
            restore_random_state(self._outside)
            self._outside = None


def _seeded_sampler(loader: Any) -> Any:
    """Return the sampler of a dataloader if it shuffles by a seed of its own, else None."""
    sampler = getattr(getattr(loader, 'batch_sampler', None), 'sampler', None)
    return sampler if type(getattr(sampler, 'seed', None)) is int else None
