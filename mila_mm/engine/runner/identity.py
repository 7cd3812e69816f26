"""What makes a run the run that it is: its id, where it was started from, and the settings that its future hangs on."""

import json
import math
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.optim import AmpOptimWrapper, ApexOptimWrapper
from mmengine.runner import IterBasedTrainLoop, Runner

from mila_mm.engine.data.content import content_of
from mila_mm.engine.runner.agree import from_rank_0
from mila_mm.engine.runner.own_checkpoints import new_run_id, run_id_of
from mila_mm.errors import UserError
from mila_mm.files import read_small, write_whole

RECORD = 'run.json'
CHANGES = (
    *('lr', 'optimizer', 'schedule', 'batch', 'world_size', 'accumulation', 'epoch_length'),
    *('precision', 'data'),
)
# The learning rate is compared as it was built; the others say how torch computes, not what.
_NO_SETTINGS = ('lr', 'fused', 'foreach', 'capturable')
_NAMES = {torch.bfloat16: 'bf16', torch.float16: 'fp16'}
_SHOWN = 200
_MAX_RECORD = 2**24  # bytes: a line for each start


@dataclass(frozen=True)
class Settings:
    """What two parts of a run must have in common for the second to continue the first.

    Attributes:
        world_size: Number of processes.
        batch: Images of an iteration in a process, 0 where the dataloader does not say.
        accumulation: Iterations to an update of the weights.
        epoch_length: Iterations of an epoch in a process.
        images: Images of the data set, 0 where it does not say.
        length: How long the run is: '12 epochs'.
        lr: The distinct learning rates of the optimizer's groups, before any schedule.
        optimizer: The rest of the optimizer's config, as JSON.
        schedule: Config of each scheduler, as JSON.
        precision: What is computed in 16 bits and how the loss is scaled, '' where an earlier version wrote it.
        data: What the data set holds (:func:`mila_mm.engine.data.content.content_of`), empty as above.
    """

    world_size: int
    batch: int
    accumulation: int
    epoch_length: int
    images: int
    length: str
    lr: tuple[float, ...]
    optimizer: str
    schedule: tuple[str, ...]
    precision: str = ''
    data: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, runner: Runner) -> 'Settings':
        """Take them from a runner whose optimizer is built and has not been filled from a checkpoint; on all ranks."""
        loader, wrapper = runner.train_dataloader, runner.optim_wrapper
        loop = runner.train_loop
        by_iteration = isinstance(loop, IterBasedTrainLoop)
        rates = {group.get('initial_lr', group['lr']) for group in groups(wrapper)}
        options = runner.cfg.get('optim_wrapper') or {}
        optimizer = {key: value for key, value in (options.get('optimizer') or {}).items() if key not in _NO_SETTINGS}
        schedule = runner.cfg.get('param_scheduler') or []
        batch = getattr(loader, 'batch_size', None) or getattr(loader.batch_sampler, 'batch_size', None)
        return cls(
            world_size=get_world_size(),
            batch=int(batch or 0),
            accumulation=int(getattr(wrapper, '_accumulative_counts', 1)),
            epoch_length=len(loader),
            images=len(loader.dataset) if hasattr(loader.dataset, '__len__') else 0,
            length=f'{loop.max_iters} iterations' if by_iteration else f'{loop.max_epochs} epochs',
            lr=tuple(sorted(float(rate) for rate in rates)),
            optimizer=_text(dict(optimizer=optimizer, paramwise_cfg=options.get('paramwise_cfg'))),
            schedule=tuple(_text(each) for each in (schedule if isinstance(schedule, (list, tuple)) else [schedule])),
            precision=precision_of(wrapper, runner.cfg),
            data=from_rank_0(lambda: content_of(loader.dataset)),
        )

    @classmethod
    def read(cls, plain: Any) -> 'Settings | None':
        """Take them from a checkpoint; None where they are not there or not of the types that they have."""
        if not isinstance(plain, Mapping):
            return None
        numbers = [plain.get(key) for key in ('world_size', 'batch', 'accumulation', 'epoch_length', 'images')]
        texts = [plain.get('length'), plain.get('optimizer')]
        lr, schedule = plain.get('lr'), plain.get('schedule')
        if not all(type(number) is int for number in numbers) or not all(isinstance(text, str) for text in texts):
            return None
        if not isinstance(lr, (list, tuple)) or not all(type(rate) is float for rate in lr):
            return None
        if not isinstance(schedule, (list, tuple)) or not all(isinstance(text, str) for text in schedule):
            return None
        precision, data = plain.get('precision', ''), plain.get('data', {})  # earlier versions do not say them
        says = isinstance(precision, str) and isinstance(data, Mapping)
        if not says or not all(isinstance(text, str) for item in data.items() for text in item):
            return None
        return cls(*numbers, texts[0], tuple(lr), texts[1], tuple(schedule), precision, dict(data))

    def plain(self) -> dict[str, Any]:
        """Return them as what every safe reader reads back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def precision_of(optim_wrapper: Any, cfg: Mapping[str, Any]) -> str:
    """Describe the precision of a run.

    Args:
        optim_wrapper: A wrapper of mmengine's kind, or several.
        cfg: The config that it was built from.

    Returns:
        'fp32', 'bf16', 'fp16, loss_scale "dynamic"', or 'apex O1, loss_scale "dynamic"', for each of several where they
        differ; with what ``fully_shard`` rounds where it does.
    """
    several, options = getattr(optim_wrapper, 'optim_wrappers', None), cfg.get('optim_wrapper') or {}
    if several:  # their constructor takes options for each, by name
        inner = {name: options.get(name) for name in several}
        own = {name: each if isinstance(each, Mapping) else options for name, each in inner.items()}
        found = [_precision_of(wrapper, own[name]) for name, wrapper in several.items()]
    else:
        found = [_precision_of(optim_wrapper, options)]
    found = found[:1] if len(set(found)) == 1 else found
    rounded = (cfg.get('model_wrapper_cfg') or {}).get('mixed_precision')
    return '; '.join([*found, *([f'mixed_precision {_text(rounded)}'] if rounded else [])])


def _precision_of(wrapper: Any, options: Mapping[str, Any]) -> str:
    if isinstance(wrapper, ApexOptimWrapper) and wrapper.enabled:
        return f'apex {wrapper.opt_level}, loss_scale {_text(wrapper.loss_scale)}'
    kind = getattr(wrapper, 'cast_dtype', None) or torch.float16  # of mmengine's, without a dtype
    found = _NAMES.get(kind, str(kind)) if isinstance(wrapper, AmpOptimWrapper) else 'fp32'
    scaler = getattr(wrapper, 'loss_scaler', None)
    if scaler is not None and scaler.is_enabled():
        found += f', loss_scale {_text(options.get("loss_scale", "dynamic"))}'
    return found


def groups(optim_wrapper: Any) -> list[dict[str, Any]]:
    """Return the groups of parameters of a wrapped optimizer, of all of them where there are several."""
    found = optim_wrapper.param_groups
    return [group for inner in found.values() for group in inner] if isinstance(found, dict) else found


def changes(before: Settings, now: Settings) -> dict[str, str]:
    """Find out what cannot be continued as if nothing had happened.

    Returns:
        A name of :data:`CHANGES` and a few words, for each.
    """
    found = {}
    if len(before.lr) != len(now.lr) or not all(map(math.isclose, before.lr, now.lr)):
        found['lr'] = f'learning rate {_rates(before.lr)}, now {_rates(now.lr)}'
    for name in ('optimizer', 'schedule'):
        if getattr(before, name) != getattr(now, name):
            found[name] = f'{name} {_shown(getattr(before, name))}, now {_shown(getattr(now, name))}'
    divided = (before.world_size * before.batch, before.accumulation) == (now.world_size * now.batch, now.accumulation)
    for name, what in (('batch', 'images a process'), ('world_size', 'processes'), ('accumulation', 'accumulated')):
        if getattr(before, name) != getattr(now, name) and not divided:
            found[name] = f'{name} {getattr(before, name)} ({what}), now {getattr(now, name)}'
    explained = (before.world_size, before.batch) != (now.world_size, now.batch)
    if before.images != now.images or (before.epoch_length != now.epoch_length and not explained):
        found['epoch_length'] = (
            f'epochs of {before.epoch_length} iterations ({before.images} images), '
            f'now of {now.epoch_length} ({now.images})'
        )
    if before.precision not in ('', now.precision):
        found['precision'] = f'precision {_shown(before.precision)}, now {_shown(now.precision)}'
    other = [name for name in before.data if before.data[name] != now.data.get(name, before.data[name])]
    if before.images != now.images:  # as said
        other = [name for name in other if name == 'classes']
    if other:
        texts = (f'{_shown(name)} {_shown(before.data[name])}, now {_shown(now.data[name])}' for name in other)
        found['data'] = f'data set ({"; ".join(texts)})'
    return found


def remarks(before: Settings, now: Settings) -> list[str]:
    """Say what differs and does no harm that nobody asked for."""
    found = []
    if before.length != now.length:
        schedule = '' if before.schedule != now.schedule else '; the schedule is what it was, whatever it ends at'
        found.append(f'the run was to last {before.length}, now {now.length}{schedule}')
    divided = before.world_size * before.batch == now.world_size * now.batch and before.world_size != now.world_size
    if divided and before.accumulation == now.accumulation:
        found.append(
            f'{before.world_size} processes with {before.batch} images each are now {now.world_size} with {now.batch}: '
            'the total batch stays, the end is not the same bit for bit'
        )
    return found


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _rates(rates: tuple[float, ...]) -> str:
    return f'{rates[0]:g}' if len(rates) == 1 else f'{rates[0]:g} to {rates[-1]:g}' if rates else 'none'


def _shown(value: Any) -> str:
    text = ' '.join(value) if isinstance(value, tuple) else str(value)
    text = ''.join(letter for letter in text if letter.isprintable())
    return text if len(text) <= _SHOWN else f'{text[: _SHOWN - 3]}...'


@dataclass
class RunRecord:
    """Which run a folder belongs to, and which checkpoints are of its past.

    Attributes:
        id: The run.
        starts: For each time that it was started, the iteration that it went on from, and a mark that no other start
            has.
        finished: The iteration that it ended at, None while it has not.
    """

    id: str = field(default_factory=new_run_id)
    starts: list[tuple[int, str]] = field(default_factory=list)
    finished: int | None = None

    def start(self, iteration: int) -> None:
        """Note another start."""
        self.starts = [*self.starts, (iteration, uuid.uuid4().hex[:8])]
        self.finished = None

    def holds(self, other: 'RunRecord | None', iteration: int) -> bool:
        """Tell whether a checkpoint is of this run's past.

        It is not where another run wrote it, or this one in a time before it was rolled back to an earlier checkpoint.

        Args:
            other: What the checkpoint says, None where it says nothing (an earlier version wrote it).
            iteration: The one that it was written at.
        """
        if other is not None and (other.id != self.id or self.starts[: len(other.starts)] != other.starts):
            return False
        later = self.starts[len(other.starts) if other else 0 :]
        return all(begin >= iteration for begin, _ in later)

    def plain(self) -> dict[str, Any]:
        """Return it as what every safe reader reads back."""
        return dict(id=self.id, starts=[list(start) for start in self.starts], finished=self.finished)

    @classmethod
    def of(cls, checkpoint: Any) -> 'RunRecord | None':
        """Take it from a checkpoint; None where that does not say which run it is of."""
        run_id = run_id_of(checkpoint)
        if run_id is None:
            return None
        said = checkpoint['meta'].get('run')
        return cls.read(dict(said, id=run_id) if isinstance(said, dict) else None) or cls(run_id)

    @classmethod
    def read(cls, plain: Any) -> 'RunRecord | None':
        """Take it from a file; None where it is not what :meth:`plain` returns."""
        if not isinstance(plain, Mapping) or not isinstance(plain.get('id'), str):
            return None
        starts, finished = plain.get('starts'), plain.get('finished')
        if not isinstance(starts, (list, tuple)) or not all(_is_start(start) for start in starts):
            return None
        return cls(plain['id'], [tuple(start) for start in starts], finished if type(finished) is int else None)


def _is_start(start: Any) -> bool:
    return isinstance(start, (list, tuple)) and list(map(type, start)) == [int, str]


def read_record(work_dir: str | Path) -> RunRecord | None:
    """Read which run a folder belongs to.

    Returns:
        The record, None where there is none that can be read.
    """
    try:
        return RunRecord.read(json.loads(read_small(Path(work_dir) / RECORD, _MAX_RECORD)))
    except (OSError, ValueError, RecursionError):
        return None


def write_record(work_dir: str | Path, record: RunRecord) -> None:
    """Write which run a folder belongs to."""
    try:
        write_whole(Path(work_dir) / RECORD, json.dumps(record.plain()) + '\n')
    except OSError as error:
        raise UserError(f'{Path(work_dir) / RECORD} cannot be written: {error.strerror}') from error


def names_of(changed: str) -> Iterator[str]:
    """Take the names of ``--resume-changed`` apart.

    Raises:
        UserError: If one is none of :data:`CHANGES`.
    """
    for name in filter(None, (part.strip().replace('-', '_') for part in changed.split(','))):
        if name not in CHANGES:
            raise UserError(f'--resume-changed: expected some of {",".join(CHANGES)}, got {name!r}')
        yield name
