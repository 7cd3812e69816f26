"""A file on its way: ``X.part``, with a note ``X.part.json`` that says which address and version its bytes are of.

The cache may be a folder that others can write to. So a link, a pipe or another user's file in the place of ``X.part``
is never written to: it gives way to a fresh file, and where it cannot, the download ends.
"""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from mila_mm.errors import printable_path
from mila_mm.files import read_small, write_whole
from mila_mm.weights.errors import DownloadError

_MAX_NOTE = 16 << 10
_VALIDATOR = re.compile(r'[ -~]{0,200}')


@dataclass
class Version:
    """What a partial file holds.

    Attributes:
        source: The address that its bytes came from.
        validator: ETag or Last-Modified of that version, empty where the server gave none.
        total: Bytes of the whole file, ``None`` where the server did not say.
    """

    source: str = ''
    validator: str = ''
    total: int | None = None


class Part:
    """The bytes that have come, open for more.

    Args:
        path: Where they lie, or will.
        source: The address they come from; what came from another one is dropped.
    """

    def __init__(self, path: Path, source: str) -> None:
        self.path = path
        self.note = path.with_name(path.name + '.json')
        self.version = Version(source)
        self._descriptor: int | None = None
        kept = self._read_note()
        if kept is not None and kept.source == source:
            self._descriptor = _open(path, os.O_APPEND)
        if self._descriptor is not None:
            self.version = kept or self.version
        else:
            self.restart()

    def _read_note(self) -> Version | None:
        """Without a readable note nobody knows whose bytes these are."""
        try:
            raw = json.loads(read_small(self.note, _MAX_NOTE))
            version = Version(**raw)
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        total = version.total
        usable = isinstance(version.source, str) and isinstance(version.validator, str)
        if not usable or not _VALIDATOR.fullmatch(version.validator) or not (total is None or type(total) is int):
            return None
        return version

    @property
    def have(self) -> int:
        """Bytes that lie on disk."""
        return 0 if self._descriptor is None else os.fstat(self._descriptor).st_size

    def restart(self) -> None:
        """Forget what lies on disk."""
        self.close()
        discard(self.path)
        self.version = Version(self.version.source)

    def begin(self, validator: str, total: int | None) -> None:
        """Note which version the bytes are of that are about to come."""
        self.version = Version(self.version.source, validator if _VALIDATOR.fullmatch(validator) else '', total)
        if self._descriptor is None:
            self._descriptor = _open(self.path, os.O_APPEND | os.O_CREAT | os.O_EXCL)
        if self._descriptor is None:
            raise DownloadError(f'{printable_path(self.path)}: something else lies there that cannot be removed')
        write_whole(self.note, json.dumps(asdict(self.version)))

    def append(self, block: bytes) -> None:
        """Write bytes behind those that are there."""
        assert self._descriptor is not None, 'begin() first'
        view = memoryview(block)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def finish(self) -> None:
        """Bring the bytes to the disk.

        Raises:
            DownloadError: If the name leads to another file by now.
        """
        assert self._descriptor is not None, 'begin() first'
        os.fsync(self._descriptor)
        ours, there = os.fstat(self._descriptor), self.path.lstat()
        if (ours.st_ino, ours.st_dev) != (there.st_ino, there.st_dev):
            raise DownloadError(
                f'{printable_path(self.path)}: was replaced while it was written; who else may write there?'
            )

    def close(self) -> None:
        """Leave the file as it is."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _open(path: Path, flags: int) -> int | None:
    """Open a file of this user's to write to it, None where there is none: a link, a pipe, somebody else's."""
    safe = getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_CLOEXEC', 0)
    try:
        descriptor = os.open(path, os.O_WRONLY | flags | safe, 0o666)
    except (FileNotFoundError, FileExistsError):
        return None
    except OSError:
        if flags & os.O_CREAT:
            raise
        return None
    found = os.fstat(descriptor)
    own = not hasattr(os, 'geteuid') or found.st_uid == os.geteuid()
    # a second name: of a file elsewhere, linked here by somebody else
    if stat.S_ISREG(found.st_mode) and own and found.st_nlink == 1:
        return descriptor
    os.close(descriptor)
    return None


def discard(path: Path) -> None:
    """Remove a partial file and the note beside it; of a link, the link.

    Args:
        path: The ``.part`` file; it may be absent.
    """
    for each in (path, path.with_name(path.name + '.json')):
        try:
            each.unlink(missing_ok=True)
        except OSError as error:  # a folder, or somebody else's file where only owners may remove
            raise DownloadError(
                f'{printable_path(each)}: lies in the way and cannot be removed ({error.strerror}); remove it, or set '
                'MILA_HOME to a folder of your own'
            ) from error
