#!/usr/bin/env python
"""torchrun for _launch.sh: passes signals on to the training, and ends with its exit status and without a traceback.

torchrun itself takes SIGTERM for an order to end its processes within 30 seconds, and ends with 1 whatever they ended
with. Here they save and end by themselves, and the launcher ends as they did: 75 asks for the job to be
queued again.
"""

import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_SIGNALS_OPTION = '--signals-to-handle'


def children() -> list[int]:
    """Return the processes that this one has started.

    Returns:
        Their ids; none where there is no ``/proc``.
    """
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            parent = stat.read_text().rpartition(')')[2].split()[1]
        except OSError:
            continue  # it has ended meanwhile
        if int(parent) == os.getpid():
            found.append(int(stat.parent.name))
    return found


def forward(signum: int, frame: object = None) -> None:
    """Pass a signal on to the processes of this machine.

    Args:
        signum: The signal.
        frame: Not used.
    """
    for pid in children():
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def main(argv: list[str]) -> int:
    """Run torchrun.

    Args:
        argv: Its arguments.

    Returns:
        The exit status of the process that ended first with one other than 0; 128 + the signal where one was killed.
    """
    # It reports that it ends processes, and which; they have said why.
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)
    if Path('/proc/self/stat').exists() and _SIGNALS_OPTION in run.get_args_parser().format_help():
        argv = [f'{_SIGNALS_OPTION}=SIGHUP,SIGQUIT', *argv]
        for signum in FORWARDED:
            signal.signal(signum, forward)
    try:
        run.main(argv)
    except ChildFailedError as error:
        # The others end with an error of their own once one has been killed, or are ended by SIGTERM.
        killed = {rank: each for rank, each in error.failures.items() if 0 > each.exitcode != -signal.SIGTERM}
        rank, failure = next(iter(killed.items()), error.get_first_failure())
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        sys.stderr.write(f'error: the process of rank {rank} was killed by {name}, and the job ended with it; '
                         '--resume continues from the last checkpoint\n')
        return 128 - failure.exitcode
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
