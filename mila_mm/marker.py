"""What a run that was stopped leaves for whoever starts it again, and how often in a row it may do so in vain.

Only the standard library, as :mod:`mila_mm.stopping`, which uses it.
"""

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path

from mila_mm.files import read_small, write_whole

MARKER, COUNT = 'stopped.json', 'stops.json'
MARKER_VARIABLE, MOST_VARIABLE = 'MILA_MM_STOP_MARKER', 'MILA_MM_MAX_STOPS'
MOST = 5  # stops in a row with nothing new saved; one iteration is enough to save
EXIT_IN_VAIN = 69  # EX_UNAVAILABLE of sysexits.h: run again it would most likely wait for the same once more
IN_VAIN = (
    'stopped too often in a row (MILA_MM_MAX_STOPS, 5) with no new iteration saved: this run does not ask for another '
    f'start, and ends with {EXIT_IN_VAIN}\nFind out what it waits for, then start it with --resume.'
)
_MAX_BYTES = 1000


def leave_marker(path: Path, signum: int, checkpoint: str | None) -> None:
    """Say in a file that a run was stopped and waits to be continued, for scripts that would queue it again.

    An exit status does not say so for certain: that of a job is the worst of all its processes', of which a scheduler
    may have killed one.

    Args:
        path: The file, ``stopped.json`` in the work folder; whoever starts the run again removes it.
        checkpoint: What was saved for the stop, None where nothing was.

    Raises:
        OSError: If it cannot be written.
    """
    content = dict(
        signal=signal.Signals(signum).name,
        checkpoint=checkpoint,
        time=time.strftime('%Y-%m-%dT%H:%M:%S%z'),
        host=socket.gethostname(),
        job=os.environ.get('SLURM_JOB_ID'),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content) + '\n')


def most_stops() -> int:
    """Return how many stops in a row may save nothing new: ``MILA_MM_MAX_STOPS``, else 5."""
    said = os.environ.get(MOST_VARIABLE, '')
    return int(said) if said.isascii() and said.isdecimal() and 0 < len(said) < 10 and int(said) > 0 else MOST


class StopCount:
    """How many stops in a row have saved nothing new, counted in a file of the work folder.

    All processes of a start read it before any of them can write to it, so that all of them come to the same.

    Args:
        work_dir: The work folder, which may not exist yet.
    """

    def __init__(self, work_dir: Path) -> None:
        self.path = work_dir / COUNT
        self.before = self._read()

    def _read(self) -> int:
        try:
            said = json.loads(read_small(self.path, _MAX_BYTES))['in_vain']
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return 0
        return said if type(said) is int and 0 <= said < 10**9 else 0

    def one_more(self) -> bool:
        """Count a stop that has saved nothing new; return whether the run may ask for another start.

        Where it may not, the count begins anew: somebody has been told.

        Raises:
            OSError: If the count cannot be written.
        """
        if self.before + 1 >= most_stops():
            self.forget()
            return False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(dict(in_vain=self.before + 1)) + '\n')
        return True

    def forget(self) -> None:
        """Begin anew: something was saved."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
