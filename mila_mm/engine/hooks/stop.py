"""Stopping a training on a signal, on all ranks after the same iteration."""

from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.dist import barrier, get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import Tensor

from mila_mm.engine.hooks.checkpoint import CheckpointHook
from mila_mm.engine.runner.agree import Agreement
from mila_mm.registry import HOOKS
from mila_mm.stopping import Stopped, StopRequest


@HOOKS.register_module()
class StopHook(Hook):
    """Save and end the run after the iteration in which a signal has come.

    A validation ends at once; the run that continues does it from its beginning. With gradient accumulation, the
    run ends after the iteration that updates the weights.

    Ranks agree by a reduction of one number per iteration (:class:`mila_mm.engine.runner.agree.Agreement`). Its result
    is looked at one iteration later: it travels while the next iteration computes.

    Args:
        request: What the signal handlers write to.
    """

    priority = 'LOWEST'

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self._ranks: Agreement | None = None
        self._pending: tuple[Any, Tensor] | None = None
        self._agreed = 0
        self._common_steps = 0
        self._begin = 0

    def before_train(self, runner: Runner) -> None:
        """Take over from the signal handlers' own way to end, which is at once."""
        if get_world_size() > 1:
            seconds = ((runner.cfg.get('env_cfg') or {}).get('dist_cfg') or {}).get('timeout')
            self._ranks = Agreement(None if seconds is None else timedelta(seconds=seconds))
        if self.request.count is None:
            self.request.settle(Path(runner.work_dir).absolute(), is_main_process())
        self._begin = runner.iter
        self.request.has_saved = partial(_has_saved, runner, runner.iter)
        self.request.armed = self.request.begun = True

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Stop where it was asked for.

        Raises:
            Stopped: Where the run stops.
        """
        updated = getattr(runner.optim_wrapper, 'should_update', None)
        if self._asked() and (updated is None or updated()):
            self._stop(runner, dict(epoch=runner.epoch, iter=runner.iter + 1))

    def before_val(self, runner: Runner) -> None:
        """Find out for how many batches all ranks are in the validation together."""
        self._common_steps = len(runner.val_dataloader)
        if self._ranks is not None:
            self._common_steps = self._ranks.least(self._common_steps)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Stop where it was asked for.

        Raises:
            Stopped: Where the run stops.
        """
        if not self.request.armed or batch_idx >= self._common_steps or not self._asked():
            return
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                hook.after_val_epoch(runner)  # the averaged weights stand in the model's place
        runner.call_hook('after_val')
        self._stop(runner, dict(epoch=runner.epoch, iter=runner.iter))

    def after_train(self, runner: Runner) -> None:
        """Hand back to the signal handlers."""
        self.request.armed = False
        self._finish_pending()
        self._ranks = None

    def _asked(self) -> bool:
        """Tell whether a signal has come to any rank, the same on all of them."""
        if self._ranks is None:
            self._agreed = self.request.signum or 0
            return bool(self._agreed)
        self._finish_pending()
        self._pending = self._ranks.begin(self.request.signum or 0)
        return bool(self._agreed)

    def _finish_pending(self) -> None:
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            self._agreed = max(self._agreed, int(flag))
            self._pending = None

    def _stop(self, runner: Runner, meta: dict[str, int]) -> None:
        self._finish_pending()
        path = _checkpoint_hook(runner).save_stopped(runner, meta)
        barrier()  # a launcher ends the other ranks when the first one ends
        self.request.saved = True
        self.request.armed = False
        self._ranks = None
        if meta['iter'] > self._begin:
            self.request.has_saved = lambda: True
        self.request.status = self.request.close(self._agreed, path, leaves_marker=is_main_process())
        if is_main_process():
            runner.logger.info(f'stopped after iteration {meta["iter"]}, saved to {path}')
        stopped = Stopped(self._agreed, path)
        stopped.exit_code = self.request.status
        raise stopped


def _has_saved(runner: Runner, begin: int) -> bool:
    saved = (hook.saved_iter for hook in runner.hooks if isinstance(hook, CheckpointHook))
    return any(iteration is not None and iteration > begin for iteration in saved)


def _checkpoint_hook(runner: Runner) -> CheckpointHook:
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            return hook
    hook = CheckpointHook()
    hook.before_train(runner)
    return hook
