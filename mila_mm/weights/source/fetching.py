"""From a name or an address to a file on this machine, fetched at most once."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from filelock import FileLock, Timeout

from mila_mm.errors import UserError
from mila_mm.files import move_into_place
from mila_mm.weights.errors import CheckpointError, DownloadError, MissingCheckpointError
from mila_mm.weights.file import container
from mila_mm.weights.source.cache import (
    ENV_HOME,
    ENV_MIRRORS,
    ENV_OFFLINE,
    Record,
    Settings,
    cache_dir,
    read_record,
    record_path,
    settings,
    sha256_of,
    write_record,
)
from mila_mm.weights.source.download import SourceError, download, is_plain_http
from mila_mm.weights.source.part import discard
from mila_mm.weights.source.published import SCHEME, PublishedFile, find

# torch.hub's convention: name-<first digits of the sha256>.pth. Decimal digits alone are a date, not a hash.
_HASH_IN_NAME = re.compile(r'-(?=[0-9]*[a-f])([0-9a-f]{8,64})\.[A-Za-z]+$')
# Bytes; 255 is what file systems take, and locks, records and parts append to it
_MAX_NAME = 180


@dataclass(frozen=True)
class Wanted:
    """A file to be had.

    Attributes:
        label: What messages call it.
        url: Its official address.
        path: Where it lies once it is here.
        mirrored: Whether mirrors may hold it.
        size: Bytes, if known beforehand.
        sha256: Digest or its first digits, if known beforehand.
    """

    label: str
    url: str
    path: Path
    mirrored: bool = False
    size: int | None = None
    sha256: str | None = None


def wanted(source: str | PublishedFile) -> Wanted:
    """Say where a named or addressed file would lie.

    Args:
        source: A published file, its name (``mila://`` optional), or an http(s) address.

    Raises:
        UserError: If no published file has that name, or the address cannot be one.
    """
    if isinstance(source, str) and source.startswith(('http://', 'https://')):
        name = os.path.basename(unquote(_checked(source).path)) or 'download'
        if not name.isprintable() or len(os.fsencode(name)) > _MAX_NAME:
            raise UserError(
                f'{source[:200]!r}: ends in a name that no file can have; expected at most {_MAX_NAME} '
                'bytes, without control characters. Fetch it by hand and give the path'
            )
        match = _HASH_IN_NAME.search(name)
        if not match:
            # Different files called model.pth must not be taken for one another.
            stem, dot, ext = name.rpartition('.')
            mark = hashlib.sha256(source.encode()).hexdigest()[:10]
            name = f'{stem}-url{mark}.{ext}' if dot else f'{name}-url{mark}.pth'
        return Wanted(source, source, cache_dir() / name, sha256=match[1] if match else None)
    entry = find(source) if isinstance(source, str) else source
    return Wanted(entry.label, entry.url, cache_dir() / entry.filename, True, entry.size, entry.sha256)


def _checked(address: str) -> SplitResult:
    """Split an address, or say that it is none."""
    try:
        if not (address.isascii() and address.isprintable()):
            raise ValueError('other characters than printable ASCII; write them as %XX')
        parts = urlsplit(address)
        _ = parts.port  # parsed only when asked for
    except ValueError as error:
        raise UserError(f'{address[:200]!r}: not an address ({error}); expected https://host/path/file.pth') from error
    return parts


def fetch(source: str | PublishedFile, *, progress: bool | None = None) -> Path:
    """Return a file of weights on this machine, fetching it if it is not here yet.

    Processes that ask at the same time share one download: the first takes a lock, which the system
    releases should that process die, and the others wait for it.

    Args:
        source: A published file, its name (``mila://`` optional), or an http(s) address.
        progress: Whether to show a progress bar on stderr; ``None`` shows it on terminals.

    Returns:
        Path of the whole, checked file.

    Raises:
        DownloadError: If it cannot be fetched; the message says how to place it by hand.
        CheckpointError: If what lies there is damaged or not what was recorded.
        UserError: If no published file has that name.
    """
    target = wanted(source)
    options = settings()
    if target.path.exists():
        verify(target)
        return target.path
    if options.offline:
        raise DownloadError(
            f'{target.label} is not in the cache and {ENV_OFFLINE} forbids fetching it\n{_by_hand(target)}'
        )
    try:
        target.path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.path, options.deadline):
            if not target.path.exists():
                _fetch_locked(target, options, progress)
                return target.path
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise DownloadError(
            f'{target.path.parent}: the cache cannot be written ({error.strerror}); set {ENV_HOME} to '
            'a folder that you may write'
        ) from error
    verify(target)
    return target.path


@contextmanager
def _locked(path: Path, deadline: float) -> Iterator[None]:
    """Hold the lock beside a file, saying once that it waits."""
    lock = FileLock(str(path) + '.lock')
    try:
        try:
            lock.acquire(timeout=2.0)
        except Timeout:
            _log(f'waiting for another process that fetches {path}')
            lock.acquire(timeout=deadline)
    except Timeout as error:
        raise DownloadError(
            f'{path}: another process has been fetching it for {deadline:g} s (it holds {lock.lock_file})'
        ) from error
    try:
        yield
    finally:
        lock.release()


def _log(message: str, *, warning: bool = False) -> None:
    import logging

    logging.getLogger('mila_mm.weights').log(logging.WARNING if warning else logging.INFO, message)


def _sources(target: Wanted, mirrors: Sequence[str]) -> list[str]:
    """Mirrors in order, then the official address."""
    if not target.mirrored:
        return [target.url]
    # not str.format: other braces in an address are its own
    places = [
        m.replace('{file}', target.path.name) if '{file}' in m else f'{m.rstrip("/")}/{target.path.name}'
        for m in mirrors
    ]
    for place in places:
        if '://' in place:
            _checked(place)
    return [*places, target.url]


def _fetch_locked(target: Wanted, options: Settings, progress: bool | None) -> None:
    """Try every source; the file takes its name only when it is whole and what was expected."""
    part = target.path.with_name(target.path.name + '.part')
    failures, end = [], time.monotonic() + options.deadline
    for source in _sources(target, options.mirrors):
        _log(f'fetching {target.label} from {source} to {target.path}')
        if is_plain_http(source) and not target.sha256:
            _log(
                f'{source}: plain http to another machine, and no checksum is known: whoever is on the way can change '
                'the weights',
                warning=True,
            )
        try:
            download(source, part, options, label=target.label, end=end, progress=progress)
            record = _examine(target, part, source)
        except (SourceError, CheckpointError) as error:
            failures.append(f'{source}: {str(error).replace(f"{part}: ", "")}')
            if isinstance(error, CheckpointError):
                discard(part)  # whole but wrong: nothing to continue
            continue
        write_record(target.path, record)  # first: whoever sees the file finds its record, too
        move_into_place(part, target.path)
        discard(part)
        return
    raise DownloadError(f'cannot fetch {target.label}: ' + '; '.join(failures) + f'\n{_by_hand(target)}')


def _examine(target: Wanted, file: Path, source: str) -> Record:
    """Check a whole file against all that is known beforehand.

    Raises:
        CheckpointError: If it is not a checkpoint, or not the one that was expected.
    """
    size = file.stat().st_size
    if target.size is not None and size != target.size:
        raise CheckpointError(f'{file}: {size:,} bytes, expected {target.size:,}; another file, or cut off')
    container.check(file)
    digest = sha256_of(file)
    if target.sha256 is not None and not digest.startswith(target.sha256):
        raise CheckpointError(f'{file}: sha256 {digest}, expected {target.sha256}; not the published file')
    known = read_record(target.path)
    if known is not None and known.sha256 != digest:
        raise CheckpointError(
            f'{file}: sha256 {digest} ({size:,} bytes), but {record_path(target.path)} recorded {known.sha256} '
            f'({known.size:,} bytes) at first; if the change is intended, delete that record'
        )
    return Record(size, digest, file.stat().st_mtime_ns, source)


def verify(target: Wanted, *, full: bool = False) -> Record:
    """Check a file in the cache against its record, making the record if there is none.

    Args:
        full: Hash it even where size and time say that it is unchanged.

    Raises:
        FileNotFoundError: If it is not in the cache.
        CheckpointError: If it is not what was recorded or published, or no checkpoint.
    """
    known = read_record(target.path)
    stat = target.path.stat()
    if known and not full and (stat.st_size, stat.st_mtime_ns) == (known.size, known.mtime_ns):
        return known
    try:
        record = _examine(target, target.path, known.source if known else 'by hand')
    except CheckpointError as error:
        raise CheckpointError(f'{error}\ndelete it to have {target.label} fetched again') from error
    try:
        write_record(target.path, record)
    except OSError as error:  # a cache that is shared read-only: usable, only hashed at each use
        _log(
            f'{record_path(target.path)}: not written ({error.strerror}); the file is hashed at each use', warning=True
        )
    return record


def _by_hand(target: Wanted) -> str:
    """The way out of every failed fetch."""
    mirrors = f'; {ENV_MIRRORS} names mirrors (base addresses or folders)' if target.mirrored else ''
    return f'by hand: fetch {target.url} and save it as {target.path}{mirrors}'


def local_path(source: str, *, progress: bool | None = None) -> Path:
    """Turn whatever names a checkpoint into a file on this machine.

    Args:
        source: ``mila://name``, an http(s) address, or a path.
        progress: See :func:`fetch`.

    Raises:
        MissingCheckpointError: If a path does not exist (a FileNotFoundError as well).
        DownloadError: If it cannot be fetched.
        CheckpointError: If what lies in the cache is damaged.
    """
    if source.startswith((SCHEME, 'http://', 'https://')):
        return fetch(source, progress=progress)
    path = Path(source).expanduser()
    if not path.exists():
        raise MissingCheckpointError(
            f'{path}: no such checkpoint; published ones are named {SCHEME}tiny-in1k and so on (`mila weights list`)'
        )
    return path
