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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mila_mm.errors import UserError
from mila_mm.files import write_whole

ENV_HOME = 'MILA_HOME'
ENV_MIRRORS = 'MILA_MIRRORS'
ENV_OFFLINE = 'MILA_OFFLINE'
_TRUE, _FALSE = frozenset({'1', 'true', 'yes', 'on'}), frozenset({'', '0', 'false', 'no', 'off'})
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Settings:
    """How weights are fetched.

    Attributes:
        mirrors: Tried in order before the official address: a base URL, a URL with ``{file}`` in it, or a folder.
        offline: Never open a connection.
        timeout: Seconds without a byte after which a connection counts as dead.
        attempts: Tries per source, counted anew after each one that brought bytes.
        backoff: Seconds before the second try; doubles with each further one, at most 8.
    """

    mirrors: tuple[str, ...] = ()
    offline: bool = False
    timeout: float = 30.0
    attempts: int = 4
    backoff: float = 0.5


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
) -> Settings:
    """Change how weights are fetched in this process; what is not given stays.

    The arguments are the attributes of :class:`Settings`.

    Args:
        mirrors: See :class:`Settings`; ``MILA_MIRRORS`` comes before these.
        offline: Never open a connection; ``MILA_OFFLINE=1`` does the same.

    Returns:
        The settings in force.

    Raises:
        UserError: If ``mirrors`` is one string instead of several.
    """
    if isinstance(mirrors, str):
        raise UserError(f'mirrors: expected a list of addresses, got the string {mirrors!r}; write [{mirrors!r}]')
    given = {
        'mirrors': None if mirrors is None else tuple(mirrors),
        'offline': offline,
        'timeout': timeout,
        'attempts': attempts,
        'backoff': backoff,
    }
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
        raw = json.loads(place.read_text(encoding='utf-8'))
        return Record(
            size=int(raw['size']), sha256=str(raw['sha256']), mtime_ns=int(raw['mtime_ns']), source=str(raw['source'])
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f'{place}: the record of a cached file cannot be read ({error.strerror})') from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{place}: not a record of a cached file ({error}); delete it to record the file anew'
        ) from error


def write_record(path: Path, record: Record) -> None:
    """Write the record of a cached file, atomically.

    Raises:
        OSError: If the folder cannot be written.
    """
    write_whole(record_path(path), json.dumps(asdict(record), indent=1) + '\n')
