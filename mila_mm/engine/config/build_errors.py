"""Errors in a config that only show while its parts are built, said without a traceback."""

import errno
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import BaseTransform

from mila_mm.engine.config.load import REGISTRY_PREFIX, one_line
from mila_mm.errors import LostPeerError, UserError, printable_path


@contextmanager
def building(what: str) -> Iterator[None]:
    """Turn the errors that wrong values in a config cause into a :class:`UserError`.

    These are a ``type`` that no registry knows, arguments that a constructor does not take, and
    values that it refuses with a message (``ValueError``, ``AssertionError``). Everything
    else passes as it is.

    Args:
        what: What is being built, the first words of the message.
    """
    try:
        yield
    except (ValueError, AssertionError, KeyError, TypeError, FileNotFoundError, ImportError) as error:
        message = _config_mistake(error)
        if message is None:
            raise
        raise UserError(f'{what}: {message}') from error


def _config_mistake(error: Exception) -> str | None:
    """Return what to tell the user, None where the error is not about a value in the config."""
    text = REGISTRY_PREFIX.sub('', one_line(error))
    if isinstance(error, KeyError):
        return text.partition('. Please check')[0] if 'registry' in text else None
    if isinstance(error, TypeError):
        # The call itself failed inside mmengine: the arguments do not fit the constructor's.
        caller = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        return text if 'mmengine' in caller.parts or REGISTRY_PREFIX.match(str(error)) else None
    return text if error.args else None


@contextmanager
def reading(what: str, ann_files: list[Path]) -> Iterator[None]:
    """Name the annotation file where one turns out to be broken while a dataset or metric reads it.

    The files are looked into only after something failed, so that sound ones are read once.

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
        for path in ann_files:
            fault = fault_of_annotations(path)
            if fault:
                raise UserError(f'{what}: annotation file {printable_path(path)} {fault}') from error
        raise


def fault_of_annotations(path: Path) -> str | None:
    """Say what is wrong with a COCO annotation file.

    Args:
        path: The file; one that does not end in ``.json`` is not looked into.

    Returns:
        The rest of a sentence that begins with the file's name, or None if nothing is wrong.
    """
    if path.suffix != '.json':
        return None
    try:
        content: Any = json.loads(path.read_bytes())
    except OSError as error:
        return f'cannot be read: {error.strerror}'
    except json.JSONDecodeError as error:
        return f'is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno} (cut short, or not JSON?)'
    except UnicodeDecodeError:
        return 'is not valid JSON: it is not text'
    fault = _fault_of_layout(content)
    return fault and f"is not in COCO's layout: {fault}"


_COCO_FIELDS = {
    'images': ('id', 'file_name', 'height', 'width'),
    'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area'),
    'categories': ('id', 'name'),
}


def _fault_of_layout(content: Any) -> str | None:
    if not isinstance(content, dict):
        return f'expected an object at its top, got a {type(content).__name__}'
    for section, fields in _COCO_FIELDS.items():
        entries = content.get(section)
        if not isinstance(entries, list):
            return f'it has no list {section!r}'
        for index, entry in enumerate(entries):
            absent = [field for field in fields if not isinstance(entry, dict) or field not in entry]
            if absent:
                return f'{section}[{index}] has no {absent[0]!r}'
    return None


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DEAD_WORKER = re.compile(r'DataLoader worker \(pid\(?s?\)? [\d, ]+\) (is killed by signal: (?P<signal>\w+)|exited)')
_LOST_PEER = re.compile(
    r'Connection (closed|reset) by peer|[Ss]ocket [Tt]imeout|Timed out waiting \d+ms|Broken pipe'
    r'|NCCL communicator was aborted|remote process exited|failed to connect'
)


@contextmanager
def plain_failures() -> Iterator[None]:
    """Turn a full disk, a dead dataloader worker and a lost peer into one message each.

    Raises:
        UserError: In these cases; everything else passes as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        where = f'{error.filename}: ' if error.filename else ''
        raise UserError(
            f'{where}{error.strerror}\nWhat was saved before is whole: make room, then continue with --resume.'
        ) from error
    except RuntimeError as error:
        message = _dead_worker(str(error))
        if message is not None:
            raise UserError(message) from error
        if _is_lost_peer(error):
            raise LostPeerError(
                'another process of the job has ended or does not answer, see its message; '
                '--resume continues from the last checkpoint'
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
        """Say once that the disk is full; leave every other error to logging."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError) or error.errno not in _FULL:
            usual(record)
        elif not said:
            said.append(True)
            sys.stderr.write(f'{handler.baseFilename} cannot be written any more: {error.strerror}\n')

    handler.handleError = handle  # type: ignore[method-assign]


class _NamedLoading:
    """A loading transform that tells which file it failed on, also from a dataloader's worker."""

    def __init__(self, transform: BaseTransform) -> None:
        self.transform = transform

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Call the transform.

        Args:
            results: Sample with ``img_path`` and, for label maps, ``seg_map_path``.

        Raises:
            UserError: If the transform fails and the image or the label map is at fault.
        """
        try:
            return self.transform(results)
        except Exception as error:
            fault = _fault_of_sample(results)
            if fault is None:
                raise
            raise UserError(fault) from error

    def __repr__(self) -> str:
        return repr(self.transform)


def name_unreadable_files(dataset: Any) -> None:
    """Make the loading transforms of a dataset, and of those it wraps, name the file they fail on.

    Args:
        dataset: A dataset of mmengine's kind; one without ``pipeline`` is left as it is.
    """
    for inner in _datasets_in(dataset):
        transforms = getattr(getattr(inner, 'pipeline', None), 'transforms', None)
        if isinstance(transforms, list):
            for index, transform in enumerate(transforms):
                if type(transform).__name__.startswith('Load') and not isinstance(transform, _NamedLoading):
                    transforms[index] = _NamedLoading(transform)


def _datasets_in(dataset: Any) -> Iterator[Any]:
    yield dataset
    inner = getattr(dataset, 'dataset', None)
    for child in [*([inner] if inner is not None else []), *(getattr(dataset, 'datasets', None) or [])]:
        yield from _datasets_in(child)


def _fault_of_sample(results: dict[str, Any]) -> str | None:
    for kind, key in (('image', 'img_path'), ('label map', 'seg_map_path')):
        path = results.get(key)
        if isinstance(path, (str, os.PathLike)) and '://' not in str(path):
            fault = _fault_of_image(Path(path))
            if fault:
                return f'{kind} {printable_path(path)} {fault}'
    return None


def _fault_of_image(path: Path) -> str | None:
    try:
        content = path.read_bytes()
    except OSError as error:
        return f'cannot be read: {error.strerror}'
    if not content:
        return 'is empty (0 bytes)'
    if cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED) is None:
        return f'cannot be decoded: {len(content)} bytes that are no image that OpenCV knows'
    return None
