"""Ending a run whose numbers are lost, while the last checkpoint with finite weights is still there."""

from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mila_mm.engine.runner.find_checkpoint import last_saved
from mila_mm.engine.runner.finite import broken_weights
from mila_mm.errors import DivergedError
from mila_mm.registry import HOOKS

MAX_NONFINITE = 10
_INTERVAL = 10  # iterations between two looks at a number on a GPU, each of which waits for the GPU


@HOOKS.register_module()
class DivergenceHook(Hook):
    """End a run after a number of losses in a row that are NaN or infinite, or once the weights are.

    Weights that are not finite stay so whatever is trained on. They are looked at before each checkpoint and
    each validation: such a checkpoint is not written, so that none of the sound ones is removed for it and ``--resume``
    continues from the last of them. One loss that is not finite need not be the end: fp16's loss scaling skips
    such a step.

    On a single CPU process every loss is looked at. Else the losses are counted where they are computed, and all ranks
    look at the highest count together in every tenth iteration.

    Args:
        max_nonfinite: Number of losses in a row that end the run. Defaults to 10.
    """

    priority = 'NORMAL'  # before CheckpointHook

    def __init__(self, max_nonfinite: int = MAX_NONFINITE) -> None:
        self.max_nonfinite = max_nonfinite
        self._count: Tensor | None = None

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Count a loss that is not finite.

        Args:
            outputs: What the step returned, with 'loss'.

        Raises:
            DivergedError: After ``max_nonfinite`` of them in a row on any rank.
        """
        loss = outputs.get('loss') if isinstance(outputs, dict) else None
        if loss is None:
            return
        loss = torch.as_tensor(loss).detach()
        before = torch.zeros((), dtype=torch.long, device=loss.device) if self._count is None else self._count
        self._count = torch.where(loss.isfinite().all(), torch.zeros_like(before), before + 1)
        every = 1 if loss.device.type == 'cpu' and get_world_size() == 1 else _INTERVAL
        if not self.every_n_train_iters(runner, every):
            return
        highest = self._count.clone()
        all_reduce(highest, 'max')
        if highest >= self.max_nonfinite:
            what = f'the loss was not finite in {int(highest)} iterations in a row'
            raise DivergedError(_message(what, runner.iter + 1, runner.work_dir))

    def before_val(self, runner: Runner) -> None:
        """Look at the weights that are about to be validated."""
        self._check_weights(runner, runner.iter)

    def gather_for_checkpoint(self, runner: Runner) -> None:
        """Look at the weights that are about to be saved; called on all ranks."""
        self._check_weights(runner, runner.iter + 1)

    def _check_weights(self, runner: Runner, iteration: int) -> None:
        """Compare on all ranks, which may hold different pieces of the weights."""
        broken = broken_weights(runner.model)
        anywhere = torch.tensor(float(bool(broken)))
        all_reduce(anywhere, 'max')
        if anywhere:
            which = (
                f'{broken[0]} and {len(broken) - 1} more' if len(broken) > 1 else ''.join(broken) or 'on another rank'
            )
            raise DivergedError(_message(f'the weights are not finite ({which})', iteration, runner.work_dir))


def _message(what: str, iteration: int, work_dir: str) -> str:
    saved = last_saved(work_dir)
    after = f'--resume continues from {saved}, the last one' if saved else 'no checkpoint was saved before'
    return (
        f'the training diverged: {what}, up to iteration {iteration}; {after}\n'
        'A lower learning rate (--resume --resume-changed lr --cfg-options optim_wrapper.optimizer.lr=...) or '
        'gradient clipping may carry it over; --debug-nonfinite names the module that it comes from.'
    )
