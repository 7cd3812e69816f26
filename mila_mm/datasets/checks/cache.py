"""Results of checks kept beside each other, so that a second start does not read a file again that has not changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mila_mm.files import write_whole

# Raised with every change of what is checked, so that results of older code are not taken for today's.
VERSION = 3


def cache_folder() -> Path:
    """Return where results of checks are kept: ``$MILA_HOME/checks``, else below the user's cache."""
    home = os.environ.get('MILA_HOME')
    if home:
        return Path(home).expanduser() / 'checks'
    return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'mila_mm' / 'checks'


def remembered(folder: Path | None, path: Path, question: Any, answer: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what was computed for a file of the same name, size and time, else compute and keep it.

    Args:
        folder: Where results are kept, None for nowhere. A folder that cannot be written costs only the memory.
        question: What the answer depends on besides the file, as JSON can hold it.
        answer: Computes the result, which JSON can hold too.
    """
    try:
        stat = path.stat()
    except OSError:
        return answer()
    key = json.dumps([VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino, question])
    if folder is None:
        return answer()
    place = folder / f'{hashlib.sha256(key.encode()).hexdigest()[:32]}.json'
    with suppress(OSError, ValueError):
        kept = json.loads(place.read_text())
        if kept.get('key') == key:
            return kept['answer']
    result = answer()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(place, json.dumps({'key': key, 'answer': result}))
    return result
