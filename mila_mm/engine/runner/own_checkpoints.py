"""Which checkpoints in a folder a run has written itself, and may therefore remove.

A checkpoint carries a list of those before it and of the best one. Whoever resumes a file of somebody else's would
remove by such a list what it names, so the list is not taken: what a run may remove carries the run's own id.
"""

import re
import uuid
from pathlib import Path
from typing import Any

from mila_mm.weights.errors import CheckpointError
from mila_mm.weights.file.reader import read_file
from mila_mm.weights.file.sharded import is_sharded, read_state

_RUN_ID = re.compile(r'[0-9a-f]{32}')


def new_run_id() -> str:
    """Return an id that no other run has: 128 random bits, in hexadecimal digits."""
    return uuid.uuid4().hex


def run_id_of(checkpoint: Any) -> str | None:
    """Return the id of the run that wrote a checkpoint; None where it has none, as those of other programs."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    run_id = meta.get('run_id') if isinstance(meta, dict) else None
    return run_id if isinstance(run_id, str) and _RUN_ID.fullmatch(run_id) else None


def is_of_run(path: Path, run_id: str | None) -> bool:
    """Tell whether a checkpoint, a file or a folder of shards, says that a run has written it."""
    try:
        return run_id is not None and run_id_of(read_small(path)) == run_id
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


def own_steps(folder: Path, template: str, run_id: str, upto: int) -> list[int]:
    """List the regular checkpoints that a run has written.

    Args:
        folder: Where it writes.
        template: Their names, with ``{}`` for the step.
        run_id: The run.
        upto: The step that the run continues from; what lies after it is not listed.

    Returns:
        Their steps (epochs or iterations), ascending.
    """
    name = re.compile(re.escape(template).replace(r'\{\}', r'(0|[1-9]\d{0,11})'))
    matches = (name.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    steps = sorted(int(match[1]) for match in matches if match)
    return [step for step in steps if step <= upto and is_of_run(folder / template.format(step), run_id)]


def own_best(named: Any, folders: list[Path], run_id: str) -> Path | None:
    """Find the best checkpoint so far by the name that a resumed checkpoint gives it.

    Args:
        named: What the checkpoint says; of a path only the last part counts, also where the folder was moved.
        folders: Where the run writes.
        run_id: The run.

    Returns:
        The file in one of the folders, None if the run has written none of that name there.
    """
    name = Path(named).name if isinstance(named, str) and '\0' not in named else ''
    if not name.startswith('best_'):
        return None
    return next((path for path in (folder / name for folder in folders) if is_of_run(path, run_id)), None)
