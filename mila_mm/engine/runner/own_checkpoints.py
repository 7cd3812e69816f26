"""Which checkpoints in a folder a run has written itself, and may therefore remove.

A checkpoint carries a list of those before it and of the best one. Whoever resumes a file of somebody else's would
remove by such a list what it names, so the list is not taken: what a run may remove carries the run's own id. Those of
mmengine and of earlier versions have none; they are of one run where mmengine has given them one name, which holds the
second that the run was started in, and one seed.
"""

import os
import re
import tempfile
import uuid
from pathlib import Path
from typing import Any

from mila_mm.weights.errors import CheckpointError
from mila_mm.weights.file.reader import read_file
from mila_mm.weights.file.sharded import is_sharded, read_state

_RUN_ID = re.compile(r'[0-9a-f]{32}')
_STARTED = re.compile(r'_\d{8}_\d{6} \d+$', re.ASCII)  # the end of mmengine's names, and a seed
_MAX_NAME = 300


def checkpoint_folders(work_dir: str | Path, out_dir: str | Path | None) -> list[Path]:
    """List where the checkpoints of a run may lie.

    Args:
        out_dir: What the config of the checkpoint hook names.

    Returns:
        The run's folder, and the one of its name in a local ``out_dir``.
    """
    work_dir = Path(os.path.abspath(work_dir))
    if not out_dir or '://' in str(out_dir):
        return [work_dir]
    return list(dict.fromkeys((work_dir, Path(os.path.abspath(out_dir)) / work_dir.name)))


def new_run_id() -> str:
    """Return an id that no other run has: 128 random bits, in hexadecimal digits."""
    return uuid.uuid4().hex


def run_id_of(checkpoint: Any) -> str | None:
    """Return the id of the run that wrote a checkpoint; None where it has none, as those of other programs."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    run_id = meta.get('run_id') if isinstance(meta, dict) else None
    return run_id if isinstance(run_id, str) and _RUN_ID.fullmatch(run_id) else None


def origin_of(checkpoint: Any) -> str | None:
    """Return what tells which run wrote a checkpoint: its id, else mmengine's name and seed, None without either."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if not isinstance(meta, dict) or meta.get('run_id') is not None:
        return run_id_of(checkpoint)
    origin = f'{meta.get("experiment_name")} {meta.get("seed")}'
    return origin if is_earlier(origin) else None


def is_earlier(value: Any) -> bool:
    """Tell whether a value out of a file can be what :func:`origin_of` returns for a checkpoint without an id."""
    return isinstance(value, str) and len(value) <= _MAX_NAME and value.isprintable() and bool(_STARTED.search(value))


def is_of_run(path: Path, origin: str | None) -> bool:
    """Tell whether a checkpoint, a file or a folder of shards, says that a run has written it.

    Args:
        origin: Of the run, as :func:`origin_of` returns it.
    """
    try:
        return origin is not None and origin_of(read_small(path)) == origin
    except (CheckpointError, OSError):
        return False


def read_small(path: Path) -> Any:
    """Read a checkpoint for its small entries: tensors are mapped, and not read.

    Args:
        path: A file, or a folder to which each rank wrote one.

    Raises:
        CheckpointError: If it is damaged, or not whole at first sight.
    """
    if is_sharded(path):
        return read_state(path, mmap=True)
    return read_file(path / 'rank0.pth' if path.is_dir() else path, mmap=True)


def own_steps(folder: Path, template: str, origin: str, upto: int) -> list[int]:
    """List the regular checkpoints that a run has written.

    Args:
        folder: Where it writes.
        template: Their names, with ``{}`` for the step.
        origin: The run.
        upto: The step that the run continues from; what lies after it is not listed.

    Returns:
        Their steps (epochs or iterations), ascending.
    """
    name = re.compile(re.escape(template).replace(r'\{\}', r'(0|[1-9]\d{0,11})'))
    matches = (name.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    steps = sorted(int(match[1]) for match in matches if match)
    return [step for step in steps if step <= upto and is_of_run(folder / template.format(step), origin)]


def own_best(named: Any, folders: list[Path], origin: str) -> Path | None:
    """Find the best checkpoint so far by the name that a resumed checkpoint gives it.

    Args:
        named: What the checkpoint says; of a path only the last part counts, also where the folder was moved.
        folders: Where the run writes.
        origin: The run.

    Returns:
        The file in one of the folders, None if the run has written none of that name there.
    """
    name = best_name(named)
    if name is None:
        return None
    return next((path for path in (folder / name for folder in folders) if is_of_run(path, origin)), None)


def best_name(named: Any) -> str | None:
    """Return the last part of a path that a checkpoint gives, None where it is no name of a best checkpoint."""
    name = Path(named).name if isinstance(named, str) and named.isprintable() else ''
    return name if name.startswith('best_') and name.endswith('.pth') and len(name) <= _MAX_NAME else None


def is_remote_of_run(backend: Any, address: str, origin: str) -> bool:
    """Tell whether a checkpoint in an object store says that a run has written it; it is fetched for that.

    Args:
        backend: A file backend of mmengine.
    """
    try:
        if not backend.exists(address):
            return False
        with tempfile.NamedTemporaryFile(suffix='.pth') as copy:
            copy.write(backend.get(address))
            copy.flush()
            return is_of_run(Path(copy.name), origin)
    except (CheckpointError, OSError, NotImplementedError):
        return False
