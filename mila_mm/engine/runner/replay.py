"""Learning rates for a run that goes on with another optimizer or schedule than its checkpoint holds."""

import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from mmengine.optim import _ParamScheduler
from mmengine.runner import Runner

from mila_mm.engine.runner.identity import groups
from mila_mm.errors import UserError


class Fresh:
    """Optimizer and schedulers as the config makes them, noted before a checkpoint fills them.

    Args:
        runner: Its optimizer and schedulers are built.
    """

    def __init__(self, runner: Runner) -> None:
        self._options = [
            {key: value for key, value in group.items() if key != 'params'} for group in groups(runner.optim_wrapper)
        ]
        self._schedulers = [deepcopy(each.state_dict()) for each in schedulers(runner)]

    def restore_options(self, runner: Runner) -> None:
        """Put the optimizer's settings back, apart from the learning rates."""
        for group, options in zip(groups(runner.optim_wrapper), self._options, strict=True):
            group.update({key: value for key, value in options.items() if key not in ('lr', 'initial_lr')})

    def replay(self, runner: Runner) -> None:
        """Let the schedules go from their beginning to where the run stands.

        The learning rates are then those of a run that had these settings all along.

        Raises:
            UserError: If a schedule follows from results, which are not known any more.
        """
        for group, options in zip(groups(runner.optim_wrapper), self._options, strict=True):
            group.update(options)
        every = schedulers(runner)
        if any(getattr(each, 'need_val_args', False) for each in every):
            raise UserError(
                '--resume: a schedule that follows from validation results cannot be taken up with other settings'
            )
        for scheduler, state in zip(every, self._schedulers, strict=True):
            scheduler.load_state_dict(deepcopy(state))
        by_iteration = [each for each in every if not each.by_epoch]
        by_epoch = [each for each in every if each.by_epoch]
        epoch_length, epochs = len(runner.train_dataloader), 0
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message=r'(?s).*`(lr_)?scheduler\.step\(\)`')
            for iteration in range(1, runner.iter + 1):
                _step(by_iteration)
                if epochs < runner.epoch and iteration == (epochs + 1) * epoch_length:
                    _step(by_epoch)
                    epochs += 1


def schedulers(runner: Runner) -> list[_ParamScheduler]:
    """Return the built schedulers of a runner, of all optimizers where there are several."""
    found = runner.param_schedulers or []
    return [each for inner in found.values() for each in inner] if isinstance(found, dict) else list(found)


def saved_schedulers(checkpoint: dict[str, Any]) -> int:
    """Count the schedulers whose state a checkpoint holds."""
    found = checkpoint.get('param_schedulers') or []
    if isinstance(found, dict):
        return sum(len(inner) for inner in found.values() if isinstance(inner, (list, tuple)))
    return len(found) if isinstance(found, (list, tuple)) else 0


def _step(every: Sequence[_ParamScheduler]) -> None:
    for scheduler in every:
        scheduler.step()
