"""Files that are whole or not there, also after a power failure; reading where others may have put what is no file."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

UNFINISHED = '.unfinished'


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder last through a power failure, where the system can do that.

    Some network file systems, and Windows, refuse it for folders. That is no error: the renames are done.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def move_into_place(source: Path, target: Path) -> None:
    """Give a finished file its name at once, in place of what had it; both lie in one file system."""
    os.replace(source, target)
    sync_folder(target.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to, which takes the place of a file when all went well.

    At every moment, also after a crash, ``path`` leads to the old content or to the new. The name that is given starts
    with a dot, ends in :data:`UNFINISHED` and differs between processes and threads. An error or an interrupt
    removes what was written under it.
    """
    # in the same folder, since only within a file system does a rename replace at once
    draft = path.with_name(f'.{path.name}.{os.getpid()}-{threading.get_ident()}{UNFINISHED}')
    # a link that somebody has put there is removed and not followed
    draft.unlink(missing_ok=True)
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield draft
        with draft.open('rb+') as file:
            os.fsync(file.fileno())  # else a power failure could leave the new name with no content
        move_into_place(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file whole or not at all, through :func:`replacing`.

    Raises:
        OSError: If it cannot be written; what was there before is untouched.
    """
    with replacing(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it; a pipe, which would be waited for, or a device, which never ends, is none.

    Raises:
        OSError: If it cannot be opened, or is no regular file.
    """
    # O_NONBLOCK: opening a pipe waits for a writer; for files it means nothing
    descriptor = os.open(path, os.O_RDONLY | getattr(os, 'O_NONBLOCK', 0) | getattr(os, 'O_CLOEXEC', 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(None, 'a folder, a pipe or a device, expected a file', str(path))
        return os.fdopen(descriptor, 'rb')
    except BaseException:
        os.close(descriptor)
        raise


def read_small(path: Path, most: int) -> bytes:
    """Read a file that should be small.

    Args:
        path: The file.
        most: Bytes.

    Raises:
        OSError: If it cannot be read, is no regular file, or holds more than ``most`` bytes.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(None, f'more than {most:,} bytes', str(path))
    return content
