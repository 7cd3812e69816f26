"""Finding the checkpoint that a run continues from: the newest one that can be read."""

import logging
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mila_mm.engine.config.load import one_line
from mila_mm.engine.hooks.checkpoint import STOPPED_TEMPLATE
from mila_mm.engine.resumed_state import count
from mila_mm.engine.runner.agree import from_rank_0
from mila_mm.engine.runner.fit import check_weights
from mila_mm.engine.runner.identity import RunRecord, read_record
from mila_mm.engine.runner.own_checkpoints import checkpoint_folders, is_of_run
from mila_mm.engine.runner.sharded_model import FullyShardedModel
from mila_mm.errors import UserError, printable, printable_path
from mila_mm.files import read_small
from mila_mm.weights.errors import CheckpointError
from mila_mm.weights.file import container
from mila_mm.weights.file.reader import read_file
from mila_mm.weights.file.sharded import STATE, ShardReader, is_sharded

_TEMPLATES = ('epoch_{}.pth', 'iter_{}.pth', STOPPED_TEMPLATE)


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that cannot be resumed.

    Attributes:
        reason: Why not.
        foreign: Whether it could be, in another folder or named by ``--resume FILE``. Defaults to False.
    """

    path: Path
    reason: str
    foreign: bool = False

    def __str__(self) -> str:
        return f'{printable_path(self.path)}: {self.reason}'


def candidates(cfg: Config) -> list[Path]:
    """List what the runs of a work folder have saved to be resumed, in no particular order.

    Returns:
        Files, and folders where every rank writes its shard. Among them is what ``last_checkpoint`` names, whether or
        not it is there. ``best_*`` is not: it holds no optimizer.
    """
    work_dir = Path(cfg.work_dir)
    hook = _checkpoint_options(cfg)
    templates = {*_TEMPLATES, hook.get('filename_tmpl') or _TEMPLATES[0]}
    found = []
    for folder in checkpoint_folders(work_dir, hook.get('out_dir')):
        for entry in sorted(folder.glob('*')) if folder.is_dir() else []:
            if any(re.fullmatch(re.escape(template).replace(r'\{\}', r'\d+'), entry.name) for template in templates):
                found.append(entry.absolute())
    named = last_saved(work_dir)
    if named and '://' not in named:
        # a work folder that was moved: the name counts, not where it was
        moved = (work_dir / Path(named).name).absolute()
        path = moved if os.path.lexists(moved) else Path(named).absolute()
        if path not in found:
            found.append(path)
    return found


def _checkpoint_options(cfg: Config) -> Mapping[str, Any]:
    return (cfg.get('default_hooks') or {}).get('checkpoint') or {}


_MAX_PATH, _MAX_NAME = 4096, 255  # bytes, of Linux


def last_saved(work_dir: str | Path) -> str | None:
    """Read ``last_checkpoint``.

    Returns:
        What it names; None without such a file, with an empty one, and with one that names nothing that could be
        a path or an address: what else lies in the folder counts then.
    """
    path = Path(work_dir) / 'last_checkpoint'
    try:
        named = read_small(path, _MAX_PATH).decode().strip()
        if not named:
            return None
        if not named.isprintable() or max(len(part.encode()) for part in named.split('/')) > _MAX_NAME:
            raise ValueError('what it says is no path')
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        print_log(
            f'{printable_path(path)} is of no use and left alone: {getattr(error, "strerror", None) or error}',
            logger='current',
            level=logging.WARNING,
        )
        return None
    return named


def newest_readable(
    paths: Sequence[Path],
    model: nn.Module | None = None,
    strict: bool = True,
    record: RunRecord | None = None,
    last: str | None = None,
) -> tuple[Path | None, list[Skipped]]:
    """Choose the checkpoint to resume: what was saved last, else that of the highest iteration that can be read.

    The iteration is what the file itself says. All files are asked for it, which reads a few kilobytes of each; the
    chosen one is read whole, and its checksums are compared.

    Args:
        model: What it must fit; filled with its weights. Defaults to None, which is not compared.
        strict: Whether every key of the model must match. Defaults to True.
        record: The run that the folder belongs to; what is not of its past is left alone. Defaults to None.
        last: What ``last_checkpoint`` names: tried first, so that a run that was rolled back stays so.
            Defaults to None.

    Returns:
        The checkpoint, None if there is none; and those that are of no use and would have come before it, or whose
        iteration cannot be told.
    """
    skipped, known = [], []
    for path in paths:
        try:
            iteration, epoch, written_by = _position(path)
        except (CheckpointError, OSError) as error:
            skipped.append(Skipped(path, _reason(error, path)))
            continue
        if record is not None and not record.holds(written_by, iteration):
            of = 'this run, before it was rolled back' if written_by and written_by.id == record.id else 'another run'
            skipped.append(Skipped(path, f'of {of}', foreign=True))
            continue
        known.append((path.name == Path(last or '').name, iteration, epoch, path))
    for *_, path in sorted(known, reverse=True):
        try:
            _check_whole(path)
            if model is not None:
                check_weights(path, model, strict)
        except (UserError, OSError) as error:
            skipped.append(Skipped(path, _reason(error, path)))
        else:
            return path, skipped
    return None, skipped


def settle_resume(runner: Any) -> None:
    """Decide what a runner that resumes by itself (``resume=True`` without ``load_from``) continues from.

    Rank 0 decides. What is skipped is logged with the reason. With no checkpoint of the folder's run
    it starts anew.

    Args:
        runner: A runner of mmengine's kind that has not loaded anything yet.

    Raises:
        CheckpointError: If there are checkpoints and none of them can be resumed; nothing is touched.
    """
    if not runner._resume or runner._load_from is not None:
        return
    chosen = from_rank_0(partial(_choose, runner))
    runner._load_from, runner._resume = chosen, chosen is not None


def _choose(runner: Any) -> str | None:
    last = last_saved(runner.work_dir)
    if last and '://' in last:
        out_dir = str(_checkpoint_options(runner.cfg).get('out_dir'))
        if '://' in out_dir and last.startswith(f'{out_dir.rstrip("/")}/') and '..' not in last.split('/'):
            return last
        runner.logger.warning(
            f'--resume: last_checkpoint names {last}, which is not where this config saves '
            '(default_hooks.checkpoint.out_dir): it is left alone'
        )
    model = getattr(runner, 'model', None)  # FlexibleRunner builds it later
    comparable = isinstance(model, nn.Module) and (
        not is_model_wrapper(model) or isinstance(model, (DistributedDataParallel, FullyShardedModel))
    )
    cfg, record = Config(dict(runner.cfg, work_dir=runner.work_dir)), read_record(runner.work_dir)
    found, strange = _of_this_place(candidates(cfg), cfg, record)
    strict = runner.cfg.get('load_strict', True)
    chosen, skipped = newest_readable(found, model if comparable else None, strict, record=record, last=last)
    skipped += strange
    for each in skipped:
        runner.logger.warning(f'--resume skips {each}')
    unusable = [each for each in skipped if not each.foreign]
    if chosen is None and unusable:
        raise CheckpointError(_nothing_readable(runner.work_dir, unusable))
    if chosen is None and skipped:
        runner.logger.warning(
            f'--resume: the last run in {runner.work_dir} has saved nothing yet, and starts anew; another one is '
            f'continued by name: --resume {skipped[0].path}'
        )
    return None if chosen is None else str(chosen)


def _of_this_place(found: Sequence[Path], cfg: Config, record: RunRecord | None) -> tuple[list[Path], list[Skipped]]:
    """Take out what ``last_checkpoint`` names elsewhere, unless the folder's own run has written it."""
    folders = {folder.resolve() for folder in checkpoint_folders(cfg.work_dir, _checkpoint_options(cfg).get('out_dir'))}
    here = [
        path
        for path in found
        if path.parent.resolve() in folders or (record is not None and is_of_run(path, record.id))
    ]
    reason = 'named by last_checkpoint, but in no folder of this run'
    return here, [Skipped(path, reason, foreign=True) for path in found if path not in here]


def _nothing_readable(work_dir: str, skipped: Sequence[Skipped]) -> str:
    listed = '; '.join(f'{printable(each.path.name)}: {each.reason}' for each in skipped[:_SHOWN_KEYS])
    listed += f'; ... {len(skipped) - _SHOWN_KEYS} more' if len(skipped) > _SHOWN_KEYS else ''
    return (
        f'--resume: none of the {len(skipped)} checkpoints in {work_dir} can be resumed ({listed})\n'
        'Nothing was changed. To start anew: another --work-dir, or move them away.'
    )


def _position(path: Path) -> tuple[int, int, RunRecord | None]:
    """Return iteration, epoch and run of a checkpoint, reading only its small part where the format allows."""
    file = _parts(path)[0]
    content = read_file(file, mmap=True)
    meta = content.get('meta') if isinstance(content, dict) else None
    if not isinstance(meta, dict) or 'message_hub' not in content:
        raise CheckpointError(f'{path}: holds weights but no state of a training run')
    if 'optimizer' not in content:
        raise CheckpointError(f'{path}: holds no optimizer state')
    if 'iter' not in meta or 'epoch' not in meta:
        raise CheckpointError(f'{path}: does not say which iteration it is of')
    iteration = count(meta['iter'], f'{path}: its meta.iter')
    return iteration, count(meta['epoch'], f'{path}: its meta.epoch'), RunRecord.of(content)


def _check_whole(path: Path) -> None:
    """Compare the checksums of all that a checkpoint holds, which torch itself does not do."""
    for file in _parts(path):
        if container.check(file) != container.ZIP:
            continue
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except container.DAMAGED_ZIP as error:
            raise CheckpointError(f'{file}: damaged: {one_line(error)}') from error
        if damaged is not None:
            raise CheckpointError(f'{file}: damaged: the checksum of its record {damaged} is wrong')
    if is_sharded(path):
        ShardReader(path).check_whole()


def _parts(path: Path) -> list[Path]:
    """Return the files of a checkpoint that can be read by themselves, the one with the position first."""
    if is_sharded(path):
        return [path / STATE]
    return _shards(path) if path.is_dir() else [path]


def _shards(folder: Path) -> list[Path]:
    """Return the files of a checkpoint for which each rank wrote one; all of them must be there."""
    shards = [folder / f'rank{rank}.pth' for rank in range(get_world_size())]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f'{folder}: has no {", ".join(missing)}')
    return shards


def _reason(error: Exception, path: Path) -> str:
    """Return the message of an error as the rest of a sentence that begins with the path."""
    return one_line(error).removeprefix('checkpoint ').removeprefix(str(path)).lstrip(': ')


_SHOWN_KEYS = 10


def check_checkpoint_file(path: str, flag: str) -> None:
    """Check that a local checkpoint is there; names and addresses (``mila://``, ``https://``) pass.

    Args:
        path: What the user gave.
        flag: Where, the first words of the message.

    Raises:
        UserError: If the file does not exist or is a folder.
    """
    if '://' in path:
        return
    file = Path(path).expanduser()
    if file.is_dir() and not is_sharded(file):
        raise UserError(f'{flag}: {path} is a folder, expected a checkpoint file (.pth)')
    if not file.exists():
        raise UserError(f'{flag}: {path} does not exist (looked in {Path.cwd()})')
