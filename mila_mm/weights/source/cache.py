"""Where fetched weights lie, what is known of each, and the settings that govern fetching.

A file ``X`` in the cache has a record ``X.json`` beside it: size, sha256, modification time and
source as they were when the file was taken in. A load compares size and time, which costs nothing,
and hashes only when they differ; ``mila weights verify`` hashes always. The record outlives its
file: what is fetched again must be what was fetched first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mila_mm.errors import UserError, printable, printable_path
from mila_mm.files import read_small, write_whole

ENV_HOME = 'MILA_HOME'
ENV_MIRRORS = 'MILA_MIRRORS'
ENV_OFFLINE = 'MILA_OFFLINE'
_TRUE, _FALSE = frozenset({'1', 'true', 'yes', 'on'}), frozenset({'', '0', 'false', 'no', 'off'})
_CHUNK = 1 << 20
_MAX_RECORD, _SHOWN = 64 << 10, 300
_SHA256 = re.compile('[0-9a-f]{64}')


@dataclass(frozen=True)
class Settings:
    """How weights are fetched.

    Attributes:
        mirrors: Tried in order before the official address: a base URL, a URL with ``{file}`` in it, or a folder.
        offline: Never open a connection.
        timeout: Seconds without a byte after which a connection counts as dead.
        attempts: Tries per source, counted anew after each one that brought bytes.
        backoff: Seconds before the second try; doubles with each further one, at most 8.
        max_bytes: Size beyond which no file is taken, announced or not.
        min_rate: Bytes a second, over a minute, below which a source is given up.
        deadline: Seconds for one file, all sources and tries together.
    """

    mirrors: tuple[str, ...] = ()
    offline: bool = False
    timeout: float = 30.0
    attempts: int = 4
    backoff: float = 0.5
    max_bytes: int = 4 << 30  # the largest published file, with its optimizer, has about 1.5
    min_rate: float = 4096.0
    deadline: float = 4 * 3600.0


class _Configured:
    """What :func:`configure` set; the environment is read at each use."""

    settings = Settings()


def configure(
    *,
    mirrors: Sequence[str] | None = None,
    offline: bool | None = None,
    timeout: float | None = None,
    attempts: int | None = None,
    backoff: float | None = None,
    max_bytes: int | None = None,
    min_rate: float | None = None,
    deadline: float | None = None,
) -> Settings:
    """Change how weights are fetched in this process; what is not given stays.

    The arguments are the attributes of :class:`Settings`.

    Args:
        mirrors: See :class:`Settings`; ``MILA_MIRRORS`` comes before these.
        offline: Never open a connection; ``MILA_OFFLINE=1`` does the same.

    Returns:
        The settings in force.

    Raises:
        UserError: If ``mirrors`` is one string instead of several, or a limit is no number above 0.
    """
    if isinstance(mirrors, str):
        raise UserError(f'mirrors: expected a list of addresses, got the string {mirrors!r}; write [{mirrors!r}]')
    limits = {
        'timeout': timeout,
        'attempts': attempts,
        'backoff': backoff,
        'max_bytes': max_bytes,
        'min_rate': min_rate,
        'deadline': deadline,
    }
    for name, value in limits.items():
        least = 0 if name in ('backoff', 'min_rate') else 1e-9
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least):
            raise UserError(f'{name}: expected a number above 0, got {value!r}')
    given: dict[str, Any] = {'mirrors': None if mirrors is None else tuple(mirrors), 'offline': offline, **limits}
    _Configured.settings = replace(_Configured.settings, **{k: v for k, v in given.items() if v is not None})
    return settings()


def settings() -> Settings:
    """Return what :func:`configure` set, joined with the environment.

    Raises:
        UserError: If ``MILA_OFFLINE`` is neither true nor false.
    """
    base = _Configured.settings
    from_env = tuple(os.environ.get(ENV_MIRRORS, '').replace(',', ' ').split())
    word = os.environ.get(ENV_OFFLINE, '').strip().lower()
    if word not in _TRUE | _FALSE:
        raise UserError(f'{ENV_OFFLINE}={word!r}: expected one of {sorted(_TRUE)} or {sorted(_FALSE - {""})}')
    mirrors = tuple(dict.fromkeys(from_env + base.mirrors))
    return replace(base, mirrors=mirrors, offline=base.offline or word in _TRUE)


def cache_dir() -> Path:
    """Return ``$MILA_HOME``, or the folder in which torch.hub keeps checkpoints.

    Returns:
        The folder; it may not exist yet.
    """
    home = os.environ.get(ENV_HOME)
    if home:
        return Path(home).expanduser()
    import torch.hub  # deferred: seconds to import, and not needed where MILA_HOME is set

    return Path(torch.hub.get_dir()) / 'checkpoints'


@dataclass(frozen=True)
class Record:
    """What is known of a cached file.

    Attributes:
        size: Bytes.
        sha256: Hexadecimal digest.
        mtime_ns: Modification time when it was hashed, in nanoseconds.
        source: Where it came from; ``'by hand'`` where it was found in place.
    """

    size: int
    sha256: str
    mtime_ns: int
    source: str


def sha256_of(path: Path) -> str:
    """Hash a file.

    Returns:
        Its sha256, hexadecimal.
    """
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def record_path(path: Path) -> Path:
    """Return where the record of a cached file lies.

    Returns:
        ``path`` with ``.json`` appended.
    """
    return path.with_name(path.name + '.json')


def read_record(path: Path) -> Record | None:
    """Read the record of a cached file.

    Returns:
        The record, or ``None`` where there is none.

    Raises:
        UserError: If the record cannot be understood; ignoring it would drop a checksum silently.
    """
    place = record_path(path)
    try:
        raw = json.loads(read_small(place, _MAX_RECORD))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f'{printable_path(place)}: the record of a cached file cannot be read ({error.strerror})'
        ) from error
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict) or not _is_record(raw):
        raise UserError(f'{printable_path(place)}: not a record of a cached file; delete it to record the file anew')
    return Record(raw['size'], raw['sha256'], raw['mtime_ns'], printable(raw['source'], _SHOWN))


def _is_record(raw: dict[str, Any]) -> bool:
    sizes = all(type(raw.get(name)) is int and 0 <= raw[name] < 1 << 63 for name in ('size', 'mtime_ns'))
    sha256, source = raw.get('sha256'), raw.get('source')
    return sizes and isinstance(sha256, str) and bool(_SHA256.fullmatch(sha256)) and isinstance(source, str)


def write_record(path: Path, record: Record) -> None:
    """Write the record of a cached file, atomically.

    Raises:
        OSError: If the folder cannot be written.
    """
    write_whole(record_path(path), json.dumps(asdict(record), indent=1) + '\n')
