"""What mmengine's checkpoints lack for a run to continue as if it had never stopped."""

import logging
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mila_mm.errors import UserError
from mila_mm.registry import HOOKS
from mila_mm.weights.random_state import capture_random_state, restore_random_state


@HOOKS.register_module()
class ResumeStateHook(Hook):
    """Keep the random generators in checkpoints, and take no more than state out of those that are resumed.

    - A checkpoint holds the states of Python's, numpy's and torch's generators; resuming puts them back before the
      next epoch (or iteration), so that, with data loaded by the process itself, a run that was stopped gives
      bitwise the weights of one that was not. Validation leaves these generators as it finds them: otherwise
      a checkpoint written before it could not be continued.
    - A checkpoint without the optimizer's state is refused: mmengine would start a fresh one and say nothing.
    - mmengine removes files that ``best_ckpt`` in a checkpoint names; paths outside the work folder are dropped.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._to_restore: dict[str, Any] | None = None
        self._outside: dict[str, Any] | None = None
        self._loader_generator: torch.Generator | None = None

    def before_train(self, runner: Runner) -> None:
        """Give the dataloader a generator of its own.

        Making an iterator draws a number. Iteration-based loops make theirs after a resumed run's generators are back:
        from the common generator, that draw would shift all that follows.

        Args:
            runner: The runner.
        """
        loader = runner.train_dataloader
        if isinstance(loader, DataLoader) and loader.generator is None:
            loader.generator = torch.Generator().manual_seed(torch.initial_seed())
        self._loader_generator = getattr(loader, 'generator', None)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the states of the generators.

        Args:
            runner: The runner.
            checkpoint: Is about to be written.
        """
        # inside validation (save_best): what training goes on with
        state = capture_random_state() if self._outside is None else dict(self._outside)
        if self._loader_generator is not None:
            state['loader'] = self._loader_generator.get_state()
        checkpoint['random_state'] = state

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Look at a checkpoint that is resumed.

        Args:
            runner: The runner.
            checkpoint: Has been read.

        Raises:
            UserError: If it lacks the optimizer's state.
        """
        if not runner._resume:
            return
        if 'optimizer' not in checkpoint and 'message_hub' in checkpoint:
            raise UserError('--resume: the checkpoint holds no optimizer state (save_optimizer=False?): training '
                            'cannot continue from it\nTo start anew from its weights: --cfg-options load_from=FILE')
        self._to_restore = checkpoint.get('random_state')
        if self._to_restore is None:
            print_log('the checkpoint holds no state of the random generators: training goes on with other random '
                      'numbers than an uninterrupted run', logger='current', level=logging.WARNING)
        _drop_foreign_paths(checkpoint.get('message_hub'), Path(runner.work_dir))

    def before_train_epoch(self, runner: Runner) -> None:
        """Put the generators back, as the last thing before data is drawn.

        Args:
            runner: The runner.
        """
        if self._to_restore is not None:
            restore_random_state(self._to_restore, get_rank())
            if self._loader_generator is not None and 'loader' in self._to_restore and get_rank() == 0:
                self._loader_generator.set_state(self._to_restore['loader'].cpu())
            self._to_restore = None

    def before_val(self, runner: Runner) -> None:
        """Remember the generators.

        Args:
            runner: The runner.
        """
        self._outside = capture_random_state()

    def after_val(self, runner: Runner) -> None:
        """Put the generators back where validation found them.

        Args:
            runner: The runner.
        """
        if self._outside is not None:
            # each rank took its own down
            restore_random_state(self._outside)
            self._outside = None


def _drop_foreign_paths(hub: Any, work_dir: Path) -> None:
    """Remove what would make ``CheckpointHook`` delete files that this run has not written."""
    info = hub.get('runtime_info') if isinstance(hub, dict) else None
    if not isinstance(info, dict):
        return
    folder = work_dir.resolve()
    for key in [key for key in info if str(key).startswith('best_ckpt')]:
        if not isinstance(info[key], str) or folder not in Path(info[key]).resolve().parents:
            print_log(f'{key} of the checkpoint lies outside {work_dir} and is left alone: {info[key]!r}',
                      logger='current', level=logging.WARNING)
            del info[key]
    ids = info.get('keep_ckpt_ids')
    if ids is not None and not (isinstance(ids, list) and all(type(step) is int for step in ids)):
        del info['keep_ckpt_ids']
