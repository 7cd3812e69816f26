"""Check the data sets of a run after they are built and before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from mila_mm.datasets.checks.findings import NOTE, Finding, Report, error
from mila_mm.engine.config.environment import rank_of
from mila_mm.engine.data.built import Effort
from mila_mm.engine.data.check import check_before_building, judge_built
from mila_mm.engine.data.first_look import HINT
from mila_mm.engine.data.first_step import BatchNormWatch
from mila_mm.engine.data.rehearsal import rehearse

# Images and label maps of a split that are opened at the start of a run, and seconds after which no more are.
_SAMPLES, _SECONDS = 32, 10.0


def checked_start(cfg: Config, stages: Sequence[str], scope: str, launcher: str) -> CheckDataHook | None:
    """Check what needs no data set to be built, and return the hook that checks the rest.

    Of a distributed job the first process does that for all.

    Args:
        cfg: A config.
        stages: Those that run, of 'train', 'val', 'test'.
        scope: 'mmdet' or 'mmseg'; None comes back for another.
        launcher: What started the processes, 'none' for a single one.

    Raises:
        UserError: If something is wrong.
    """
    if scope not in ('mmdet', 'mmseg'):
        return None
    if rank_of(launcher):
        return CheckDataHook(stages, scope, Report())
    report = check_before_building(cfg, stages, scope)
    report.refuse(HINT)
    return CheckDataHook(stages, scope, report)


class CheckDataHook(Hook):
    """Look at a sample of each data set before the first step, tell what is doubtful, and stop at what is wrong.

    Args:
        stages: Those that run, of 'train', 'val', 'test'.
        scope: 'mmdet' or 'mmseg'.
        report: What was found before; it is told with the rest.
    """

    priority = 'LOWEST'

    def __init__(self, stages: Sequence[str], scope: str, report: Report) -> None:
        self._stages, self._scope, self._report = tuple(stages), scope, report
        self._watch: BatchNormWatch | None = None

    def before_run(self, runner: Runner) -> None:
        """Check the data sets; the other processes of a job have the same."""
        if not is_main_process():
            return
        for stage in self._stages:
            loader = getattr(runner, f'{stage}_dataloader')
            key = f'{stage}_dataloader'
            dataset = getattr(loader, 'dataset', None)
            if dataset is None:
                continue
            found = judge_built(
                runner.cfg, dataset, f'{key}.dataset', stage, self._scope, Effort(_SAMPLES, _SECONDS), self._report
            )
            self._report.add(found)
            if stage == 'train' and _length(loader) == 0:
                self._report.add([error(key, f'has no batch: {len(dataset)} images, of which drop_last leaves none')])
        if 'train' in self._stages and not _one_program(runner):
            self._report.add(_rehearse(runner))
        self._report.refuse(HINT)

    def before_train(self, runner: Runner) -> None:
        """Tell what was found, after all that a start logs, and watch the first step."""
        self._tell(runner)
        if is_main_process() and not _one_program(runner):
            self._watch = BatchNormWatch(runner.model, _last_batch(runner))

    def before_test(self, runner: Runner) -> None:
        """Tell what was found."""
        self._tell(runner)

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Watch no longer once a step is done."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def _tell(self, runner: Runner) -> None:
        for finding in self._report.of('warning'):
            # one message each: of warnings whose format is the same mmengine's logger lets the first one through
            runner.logger.warning(f'data: {finding}')
        for finding in self._report.of(NOTE):
            runner.logger.info('data: %s', finding)


def _one_program(runner: Runner) -> bool:
    """Tell whether the model runs as a compiled whole, which no hook of a layer may look into."""
    return any(runner.cfg.get(key) for key in ('compile', 'compile_backbone', 'graph_backbone'))


def _rehearse(runner: Runner) -> list[Finding]:
    model = getattr(runner.model, 'module', runner.model)
    images = (runner.cfg.get('train_dataloader') or {}).get('batch_size')
    size = (runner.cfg.model.get('data_preprocessor') or {}).get('size')
    known = isinstance(size, (list, tuple)) and len(size) == 2
    return rehearse(model, runner.cfg.model, images if isinstance(images, int) else 2, tuple(size) if known else None)


def _length(loader: Any) -> int:
    try:
        return len(loader)
    except TypeError:  # an endless sampler
        return 1


def _last_batch(runner: Runner) -> int:
    """Return the images in the last batch of an epoch, 0 where it is left out or there is no such batch."""
    loader = runner.train_dataloader
    config = runner.cfg.get('train_dataloader') or {}
    batch = config.get('batch_size')
    if not isinstance(runner.train_loop, EpochBasedTrainLoop) or not isinstance(batch, int) or config.get('drop_last'):
        return 0
    sampler = getattr(loader, 'sampler', None)
    inner = getattr(loader, 'batch_sampler', None)
    inner = getattr(inner, 'batches', inner)
    if getattr(inner, 'drop_last', False) or sampler is None:
        return 0
    try:
        return len(sampler) % batch
    except TypeError:
        return 0
