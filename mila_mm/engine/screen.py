"""What a run prints: on the screen what a user watches, in the log file all that mmengine says.

mmengine prints a run's environment, its whole config, the order of its hooks and a line for each parameter before the
first line of training, 700 lines for the smallest model. Inside of :func:`quiet` these go to the log file alone.
"""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from mila_mm.registry import HOOKS

_quiet: ContextVar[bool] = ContextVar('quiet', default=False)

# Said at every start about choices of the libraries below us, which nobody who runs a command can change.
_NOISE = (
    'Could not import OneDL',
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    'The prefix is not set in metric class',
    'Failed to search registry with scope',
    'init_weights of ',
    'Since `metrics` is an empty dict',
)
# What the libraries say as an error, with their own file and line, and what it means to who trains.
_REWORDED = {
    'The testing results of the whole dataset is empty': 'nothing was found in any image: no score reached the '
    "model's threshold, which is usual at the start of a training",
}
# What pycocotools prints while it reads annotations and evaluates.
_CHATTER = (
    'loading annotations',
    'Done (t=',
    'creating index',
    'index created',
    'Loading and preparing results',
    'Converting ndarray',
    'Running per image evaluation',
    'Evaluate annotation type',
    'DONE (t=',
    'Accumulating evaluation results',
)
_TIME = re.compile(r'(\btime: )([0-9.]+)')
# Reading the boxes of more images than these takes longer than anybody wants to wait for a number.
_COUNTED = 20_000


@contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Keep what nobody watches off the screen, for the runners that are made inside.

    Args:
        verbose: Change nothing after all.
    """
    token = _quiet.set(not verbose)
    spoken = None if verbose else _silence_prints()
    try:
        yield
    finally:
        _quiet.reset(token)
        if spoken is not None:
            spoken()


def _silence_prints() -> Callable[[], None]:
    from mmengine.logging import logger
    from pycocotools import coco, cocoeval

    modules = (coco, cocoeval, logger)  # mmengine prints what is logged before there is a logger

    def speak(*words: Any) -> None:
        text = ' '.join(map(str, words))
        if not text.startswith((*_CHATTER, *_NOISE)):
            try:
                sys.stdout.write(f'{text}\n')
            except BrokenPipeError:
                _lose_reader()

    for module in modules:
        module.print = speak  # type: ignore[attr-defined]

    def undo() -> None:
        for module in modules:
            vars(module).pop('print', None)

    return undo


class Screen(logging.Filter):
    """What passes from mmengine's logger to the screen.

    Attributes:
        started: Whether the first batch is near; before, warnings alone pass, and what ``shown`` marks.
        batch: Images of one iteration, of all processes together; None before they are known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started = False
        self.batch: int | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is shown."""
        text = record.getMessage()
        if any(noise in text for noise in _NOISE):
            return False
        return self.started or record.levelno >= logging.WARNING or getattr(record, 'shown', False)


class _WithRate(logging.Formatter):
    """Adds images per second to the lines of training, and says what a library means."""

    def __init__(self, inner: logging.Formatter, screen: Screen) -> None:
        super().__init__()
        self._inner, self._screen = inner, screen

    def format(self, record: logging.LogRecord) -> str:
        said = record.getMessage()
        for theirs, ours in _REWORDED.items():
            if said.startswith(theirs):
                warning = {'msg': ours, 'args': (), 'levelno': logging.WARNING, 'levelname': 'WARNING'}
                record = logging.makeLogRecord({**vars(record), **warning})
        text = self._inner.format(record)
        batch = self._screen.batch
        if batch is None or '(train)' not in text:
            return text
        return _TIME.sub(lambda found: f'{found[0]}  images/s: {_rate(batch, float(found[2]))}', text, count=1)


def _rate(images: int, seconds: float) -> str:
    rate = images / max(seconds, 1e-9)
    return f'{rate:.1f}' if rate >= 1 else f'{rate:.2g}'


def watch(logger: MMLogger) -> None:
    """Put a :class:`Screen` before the screen of a runner's logger, inside of :func:`quiet`."""
    if not _quiet.get():
        return
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler and screen_of(logger) is None:
            screen = Screen()
            handler.addFilter(screen)
            handler.handleError = _outlive_reader(handler)  # type: ignore[method-assign]
            handler.setFormatter(_WithRate(handler.formatter or logging.Formatter(), screen))


def _lose_reader() -> None:
    """Write to nowhere from here on: a run goes on where ``| head`` has seen enough, and the log file has it all."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _outlive_reader(handler: logging.Handler) -> Callable[[logging.LogRecord], None]:
    report = handler.handleError

    def handle(record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            _lose_reader()
        else:
            report(record)

    return handle


def screen_of(logger: logging.Logger) -> Screen | None:
    """Return the :class:`Screen` of a logger, None where everything is shown."""
    found = (each for handler in logger.handlers for each in handler.filters if isinstance(each, Screen))
    return next(found, None)


@HOOKS.register_module()
class SummaryHook(Hook):
    """Say in a few lines what is about to run; from then on everything is shown."""

    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Log the lines."""
        if screen_of(runner.logger) is None:
            return
        for line in summary(runner):
            runner.logger.info(line, extra={'shown': True})

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Open the screen."""
        self._open(runner)

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Open the screen."""
        self._open(runner)

    def _open(self, runner: Runner) -> None:
        screen = screen_of(runner.logger)
        if screen is not None and not screen.started:
            screen.started = True
            if runner._train_dataloader is not None:
                screen.batch = batch_of(runner)


def batch_of(runner: Runner) -> int | None:
    """Return the images of one training iteration, of all processes together."""
    loader = runner.train_dataloader
    size = getattr(loader, 'batch_size', None) or getattr(getattr(loader, 'batch_sampler', None), 'batch_size', None)
    return None if size is None else size * get_world_size()


def summary(runner: Runner) -> list[str]:
    """Return what is about to be trained, on what, for how long, and where it is written."""
    model = getattr(runner.model, 'module', runner.model)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, grad in sizes if grad)
    device = next(model.parameters()).device
    lines = [
        f'model:     {_named(model, runner.cfg.get("model") or {})}, {total / 1e6:.1f} M parameters'
        + ('' if trained == total else f', {trained / 1e6:.1f} M of them trained'),
        f'data:      {_described(runner.train_dataloader.dataset)}',
    ]
    if runner._val_loop is not None:
        lines.append(f'validated: {_described(runner.val_dataloader.dataset, count=False)}')
    world = get_world_size()
    batch = batch_of(runner)
    loop = runner.train_loop
    length = f'{loop.max_iters:,} iterations' + (
        f' ({loop.max_epochs} epochs)'
        if isinstance(getattr(loop, '_max_epochs', None), int) and loop.max_epochs > 1
        else ''
    )
    wrapper = type(runner.optim_wrapper).__name__
    precision = '' if 'Amp' not in wrapper else ', mixed precision'
    processes = '' if world == 1 else f' in {world} processes'
    lines.append(f'run:       {length}, {batch} images each{processes}, on {device}{precision}')
    lines.append(f'writes to: {runner.work_dir} (log: {runner.log_dir})')
    return lines


def _named(model: Any, config: dict[str, Any]) -> str:
    """Return a model by its name and its backbone's, each with its size where the config names one."""
    arch = config.get('arch')
    name = f'{type(model).__name__} {arch}' if isinstance(arch, str) else type(model).__name__
    backbone = getattr(model, 'backbone', None)
    return name if backbone is None else f'{name} on {_named(backbone, config.get("backbone") or {})}'


def _described(dataset: Any, count: bool = True) -> str:
    images = len(dataset)
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes') or ()
    text = f'{images:,} images, {len(classes)} classes'
    if count and images <= _COUNTED and hasattr(dataset, 'get_data_info'):
        boxes = sum(len(dataset.get_data_info(index).get('instances') or ()) for index in range(images))
        text += f', {boxes:,} boxes' if boxes else ''
    return text
