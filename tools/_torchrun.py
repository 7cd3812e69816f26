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

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# As mila_mm.stopping has them; this process must not need the package.
EXIT_REQUEUE, EXIT_INTERRUPTED = 75, 130
_SIGNALS_OPTION = '--signals-to-handle'
_asked: list[int] = []


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
    """Pass a signal on to the processes of this machine; where there are none yet, end.

    Args:
        signum: The signal.
        frame: Not used.

    Raises:
        SystemExit: If no process has been started.
    """
    _asked.append(signum)
    found = children()
    if not found:
        sys.exit(stopped())
    for pid in found:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def stopped() -> int:
    """Say that the job was stopped before any of it had anything to save.

    Returns:
        The exit status.
    """
    sys.stderr.write(f'stopped by {signal.Signals(_asked[0]).name} before the training began\n')
    return EXIT_INTERRUPTED if _asked[0] == signal.SIGINT else EXIT_REQUEUE


def main(argv: list[str]) -> int:
    """Run torchrun.

    Args:
        argv: Its arguments.

    Returns:
        The exit status of the process that ended first with one other than 0; 128 + the signal where one was killed.
    """
    forwards = Path('/proc/self/stat').exists()
    for signum in FORWARDED if forwards else ():
        signal.signal(signum, forward)
    # Importing it takes seconds, in which a signal may come as well.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # It reports that it ends processes, and which; they have said why.
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)
    if forwards and _SIGNALS_OPTION in run.get_args_parser().format_help():
        argv = [f'{_SIGNALS_OPTION}=SIGHUP,SIGQUIT', *argv]
    try:
        run.main(argv)
    except ChildFailedError as error:
        # The others end with an error of their own once one has been killed, or are ended by SIGTERM.
        killed = {rank: each for rank, each in error.failures.items() if 0 > each.exitcode != -signal.SIGTERM}
        rank, failure = next(iter(killed.items()), error.get_first_failure())
        if _asked and all(each.exitcode in (-_asked[0], -signal.SIGTERM) for each in error.failures.values()):
            return stopped()  # it came before they could take it
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        sys.stderr.write(
            f'error: the process of rank {rank} was killed by {name}, and the job ended with it; '
            '--resume continues from the last checkpoint\n'
        )
        return 128 - failure.exitcode
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
