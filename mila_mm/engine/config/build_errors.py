"""Errors in a config that only show while its parts are built, said without a traceback."""

import difflib
import errno
import inspect
import linecache
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mila_mm.datasets.checks.coco_annotations import (
    NO_IMAGES,
    OtherLayoutError,
    UnreadableError,
    check_entries,
    read_coco,
)
from mila_mm.datasets.checks.findings import ERROR
from mila_mm.datasets.checks.needs import Needs
from mila_mm.engine.config.load import REGISTRY_PREFIX, one_line
from mila_mm.errors import LostPeerError, UserError, printable_path

_REGISTRY = re.compile(r'(?P<kind>\S+) is not in the (?P<registry>\S+) registry')
_UNEXPECTED = re.compile(r"got an unexpected keyword argument '(?P<name>\w+)'")
_ARGUMENTS = re.compile(r'missing \d+ required|takes .* positional argument|got multiple values for')
# An error that is raised in one of these while a part is built comes of a value in the config.
_LIBRARIES = frozenset({'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'torch', 'timm', 'pycocotools', 'lvis'})
# Functions of data sets and metrics in which an annotation file is read.
_READERS = frozenset({'load_data_list', 'parse_data_info', 'filter_data', 'createIndex', 'full_init', '_init_refs'})


@contextmanager
def building(what: str) -> Iterator[None]:
    """Turn the errors that wrong values in a config cause into a :class:`UserError`.

    These are a ``type`` that no registry knows, arguments that a constructor or one of those above it does not take,
    values that it refuses with a message, and whatever else OpenMMLab's own code raises while it builds a part.
    What is raised in other code, the user's or ours, passes as it is.

    Args:
        what: What is being built, the first words of the message.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = _config_mistake(error)
        if message is None:
            raise
        raise UserError(f'{what}: {message}') from error


def _config_mistake(error: Exception) -> str | None:
    """Return what to tell the user, None where the error is not about a value in the config."""
    while REGISTRY_PREFIX.match(str(error)) and isinstance(error.__context__, Exception):
        error = error.__context__  # mmengine up to 0.10 raises anew what a constructor raised
    text = REGISTRY_PREFIX.sub('', one_line(error))
    frames = list(traceback.walk_tb(error.__traceback__))
    part = _part_being_built(frames)
    if isinstance(error, ElementTree.ParseError):
        return _broken_xml(error, frames)
    if isinstance(error, KeyError) and _REGISTRY.search(text):
        return _unknown_type(text, frames)
    if isinstance(error, TypeError):
        told = _wrong_arguments(error, text, frames, part)
        if told is not None:
            return told
    elif isinstance(error, (ValueError, AssertionError, FileNotFoundError, ImportError)) and error.args:
        return text if part is None or _kind(part) in text else f'{_kind(part)}: {text}'
    return _in_library(error, text, part, frames)


def _broken_xml(error: Exception, frames: list[Any]) -> str:
    """Name the file where it is known, as the readers of Pascal VOC's files call it."""
    names = [
        frame.f_locals[name] for frame, _ in frames for name in ('xml_path', 'local_path') if name in frame.f_locals
    ]
    where = f'annotation file {printable_path(names[-1])}' if names else 'an annotation file'
    return f'{where} is not valid XML: {one_line(error)}'


def _wrong_arguments(error: TypeError, text: str, frames: list[Any], part: dict[str, Any] | None) -> str | None:
    name = _UNEXPECTED.search(text)
    if part is not None and name and name['name'] in part:
        return unexpected_argument(_kind(part), name['name'], _arguments(part.get('__class__')))
    if part is not None and _ARGUMENTS.search(text) and _only_constructors(frames):
        return f'{_kind(part)}: {text}'
    # The call itself failed inside mmengine: the arguments do not fit the constructor's.
    caller = Path(frames[-1][0].f_code.co_filename) if frames else Path()
    return text if 'mmengine' in caller.parts or REGISTRY_PREFIX.match(str(error)) else None


def _in_library(error: Exception, text: str, part: dict[str, Any] | None, frames: list[Any]) -> str | None:
    """Tell of an error that OpenMMLab's own code, or what it builds on, ran into while it built a part."""
    frame, line = frames[-1]
    place = Path(frame.f_code.co_filename)
    inside = [index for index, name in enumerate(place.parts) if name in _LIBRARIES]
    # An OSError is of the machine, a RuntimeError outside of a part too: a lost peer, a device that is not there.
    if not inside or isinstance(error, (OSError, MemoryError)) or (part is None and isinstance(error, RuntimeError)):
        return None
    if part is None and 'mmengine' not in place.parts:
        return None
    if isinstance(error, AssertionError):
        text = linecache.getline(str(place), line).strip() or 'AssertionError'
    elif not isinstance(error, RuntimeError):
        text = f'{type(error).__name__}: {text}'
    who = f'{_kind(part)}: ' if part else ''
    return f'{who}{text} ({"/".join(place.parts[inside[-1] :])}:{line})'


def _part_being_built(frames: list[Any]) -> dict[str, Any] | None:
    """Return the config of the innermost part that mmengine was building."""
    for frame, _ in reversed(frames):
        if frame.f_code.co_name == 'build_from_cfg' and isinstance(frame.f_locals.get('cfg'), dict):
            part = dict(frame.f_locals['cfg'])
            return {**part, '__class__': frame.f_locals.get('obj_cls')}
    return None


def _kind(part: dict[str, Any]) -> str:
    kind = part.get('type')
    return str(getattr(kind, '__name__', kind))


def _only_constructors(frames: list[Any]) -> bool:
    """Tell whether the failing call was one that a constructor, or mmengine for it, handed its arguments up with."""
    names = [frame.f_code.co_name for frame, _ in frames]
    start = max((i for i, name in enumerate(names) if name == 'build_from_cfg'), default=-1)
    return all(name in ('__init__', 'get_instance', '__call__') for name in names[start + 1 :])


def unexpected_argument(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that a part of a config is given an argument that it does not take.

    Args:
        kind: Type of the part.
        name: The argument.
        known: Those that it takes.
    """
    known = sorted(known)
    hint = did_you_mean(name, known) or (f'; it takes {", ".join(known)}' if known else '')
    return f'{kind} does not take {name!r} (unexpected argument){hint}'


def _arguments(kind: Any) -> set[str]:
    names: set[str] = set()
    for base in inspect.getmro(kind) if inspect.isclass(kind) else ():
        constructor = vars(base).get('__init__')
        if constructor is None or base.__module__ in ('builtins', 'torch.nn.modules.module'):
            continue
        parameters = inspect.signature(constructor).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {'self'}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names


def _unknown_type(text: str, frames: list[Any]) -> str:
    text = text.partition('. Please check')[0]
    kind = _REGISTRY.search(text)
    names: set[str] = set()
    for frame, _ in reversed(frames):
        registry = frame.f_locals.get('registry') if frame.f_code.co_name == 'build_from_cfg' else None
        while registry is not None:
            names |= set(registry.module_dict)
            registry = registry.parent
        if names:
            break
    wanted = kind['kind'].rpartition('.')[2] if kind else ''
    return f'{text}{did_you_mean(wanted, names)}'


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the most similar name, '' where none is similar."""
    close = difflib.get_close_matches(name, sorted(names), n=1)
    return f'; did you mean {close[0]!r}?' if close else ''


@contextmanager
def reading(what: str, ann_files: list[Path]) -> Iterator[None]:
    """Name the annotation file where one turns out to be broken while a dataset or metric reads it.

    The files are looked into only after reading one failed, so that sound ones are read once and a mistake elsewhere
    in the config is not blamed on them.

    Args:
        what: What is being built, the first words of the message.
        ann_files: Annotation files that it reads.

    Raises:
        UserError: If one of the files is broken, or as :func:`building` says.
    """
    try:
        with building(what):
            yield
    except Exception as error:
        origin = error.__cause__ if isinstance(error, UserError) and error.__cause__ is not None else error
        for path in ann_files if _was_reading(origin) else []:
            fault = fault_of_annotations(path)
            if fault:
                raise UserError(f'{what}: annotation file {printable_path(path)} {fault}') from error
        raise


def _was_reading(error: BaseException) -> bool:
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(code.co_name in _READERS or 'pycocotools' in Path(code.co_filename).parts for code in frames)


def fault_of_annotations(path: Path) -> str | None:
    """Say what is wrong with a COCO annotation file.

    Args:
        path: The file; one that does not end in ``.json`` is not looked into, nor one in mmengine's layout.

    Returns:
        The rest of a sentence that begins with the file's name, or None if nothing is wrong.
    """
    if path.suffix != '.json':
        return None
    try:
        data = read_coco(path)
    except OtherLayoutError:
        return None
    except UnreadableError as fault:
        return str(fault)
    found = check_entries(data, '', Needs(labels=False))
    faults = [finding for finding in found if finding.level == ERROR and finding.message != NO_IMAGES]
    return f"is not in COCO's layout: {faults[0].message}" if faults else None


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_GONE = (
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.EACCES,
)  # a disk that was lost, or may be read only
_DEAD_WORKER = re.compile(r'DataLoader worker \(pid\(?s?\)? [\d, ]+\) (is killed by signal: (?P<signal>\w+)|exited)')
_LOST_PEER = re.compile(
    r'Connection (closed|reset) by peer|[Ss]ocket [Tt]imeout|Timed out waiting \d+ms|Broken pipe'
    r'|NCCL communicator was aborted|remote process exited|failed to connect'
)


@contextmanager
def plain_failures(resumes: bool = False) -> Iterator[None]:
    """Turn a full disk, a dead dataloader worker and a lost peer into one message each.

    Args:
        resumes: Whether ``--resume`` goes on with what was saved before. Defaults to False.

    Raises:
        UserError: In these cases; everything else passes as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (*_FULL, *_GONE):
            raise
        where = f'{error.filename}: ' if error.filename else ''
        what = 'make room' if error.errno in _FULL else 'put that right'
        then = f'What was saved before is whole: {what}, then continue with --resume.' if resumes else f'{what}.'
        raise UserError(f'{where}{error.strerror}\n{then[0].upper()}{then[1:]}') from error
    except RuntimeError as error:
        message = _dead_worker(str(error))
        if message is not None:
            raise UserError(message) from error
        if _is_lost_peer(error):
            raise LostPeerError(
                'another process of the job has ended or does not answer, see its message'
                + ('; --resume continues from the last checkpoint' if resumes else '')
            ) from error
        raise


def _dead_worker(text: str) -> str | None:
    match = _DEAD_WORKER.search(text)
    if match is None:
        return None
    how = f'was killed ({match["signal"]})' if match['signal'] else 'ended unexpectedly'
    return (
        f'a worker process of the dataloader {how}; if memory was short: '
        '--cfg-options train_dataloader.num_workers=1\nWhat was saved is whole: --resume continues from it.'
    )


def _is_lost_peer(error: RuntimeError) -> bool:
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return False
    return isinstance(error, getattr(distributed, 'DistError', ())) or _LOST_PEER.search(str(error)) is not None


def say_once_that_the_log_is_full(logger: logging.Logger) -> None:
    """Let a log file that cannot be written any more cost one line instead of a traceback per line of the log.

    Args:
        logger: A logger with file handlers.
    """
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            _watch(handler)


def _watch(handler: logging.FileHandler) -> None:
    usual, said = handler.handleError, []

    def handle(record: logging.LogRecord) -> None:
        """Say once that the disk is full or gone; leave every other error to logging."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError) or error.errno not in (*_FULL, *_GONE):
            usual(record)
        elif not said:
            said.append(True)
            sys.stderr.write(f'{handler.baseFilename} cannot be written any more: {error.strerror}\n')

    handler.handleError = handle  # type: ignore[method-assign]
