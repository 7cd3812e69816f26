#!/usr/bin/env python
"""torchrun for _launch.sh: passes signals on to the training, and ends with its exit status and without a traceback.

torchrun itself takes SIGTERM for an order to end its processes within 30 seconds, and ends with 1 whatever they ended
with. Here they save and end by themselves, and the launcher ends as they did: 75 asks for the job to be
queued again. Signals are heard by a thread, since torchrun's own may wait for another machine to come.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mila_mm.marker import EXIT_IN_VAIN, IN_VAIN, MARKER, StopCount
from mila_mm.stopping import EXIT_REQUEUE, SIGNALS, SignalWatch, exit_code_of, grace_of

# Seconds that the processes have to end after their time is over, before they are killed.
_LATE = 3.0
_SIGNALS_OPTION = '--signals-to-handle'


def children() -> list[int]:
    """Return the ids of the processes that this one has started; none where there is no ``/proc``."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            # in bytes: the name in the middle is the process's own choice, and need be no text
            parent = stat.read_bytes().rpartition(b')')[2].split()[1]
        except (OSError, IndexError):
            continue  # it has ended meanwhile
        if int(parent) == os.getpid():
            found.append(int(stat.parent.name))
    return found


def signal_children(signum: int) -> int:
    """Send a signal to the processes of this machine; return how many there are."""
    found = children()
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)
    return len(found)


def work_dir_in(argv: Sequence[str]) -> Path | None:
    """Return what a command line names by ``--work-dir``, None where it does not."""
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        name, joined, value = word.partition('=')
        if name in ('--work-dir', '--work_dir') and (joined or following):
            return Path(value if joined else following).expanduser().absolute()
    return None


class Launcher:
    """What this machine's part of a job was asked to do.

    Args:
        argv: What the training is called with; names the work folder, or not. Defaults to none.

    Attributes:
        asked: The signals that have come.
    """

    def __init__(self, argv: Sequence[str] = ()) -> None:
        self.asked: list[int] = []
        folder = work_dir_in(argv)
        self._count = None if folder is None else StopCount(folder)
        if folder is not None:
            with suppress(OSError):  # of an earlier start, where there is one
                (folder / MARKER).unlink()
        self._deadline: float | None = None

    def hear(self, signum: int) -> float | None:
        """Pass a signal on; where there are no processes yet, end. Return when to end in any case."""
        self.asked.append(signum)
        count = signal_children(signum)
        if not count:
            sys.stderr.write(self.nothing_begun())
            sys.stderr.flush()
            os._exit(exit_code_of(self.reason()))
        if len(self.asked) == 1:  # a process that hangs cannot say so itself
            self.say(f'{self.name()}: passed on to {count} process{"es" if count > 1 else ""}')
        if signum != signal.SIGINT:
            deadline = time.monotonic() + grace_of(signum) + _LATE
            self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
        return self._deadline

    def expire(self) -> None:
        """End what has not ended by itself, which may be stopped or wait for another machine."""
        signal_children(signal.SIGKILL)
        self.say(f'stopped by {self.name()}, and a process did not end in time: --resume continues from the last save')
        status = exit_code_of(self.reason())
        # The processes leave the marker and count, unless none of them could do anything any more.
        if status == EXIT_REQUEUE and self._count is not None and not self._count.path.with_name(MARKER).exists():
            with suppress(OSError):
                if not self._count.one_more():
                    self.say(IN_VAIN)
                    status = EXIT_IN_VAIN
        os._exit(status)

    def reason(self) -> int:
        """Return the signal that decides: the first one that is not from the keyboard, where there is one."""
        return next((signum for signum in self.asked if signum != signal.SIGINT), signal.SIGINT)

    def name(self) -> str:
        """Return the name of that signal."""
        return signal.Signals(self.reason()).name

    def nothing_begun(self) -> str:
        """Return the line for a job that was stopped before any of it had anything to save."""
        return f'stopped by {self.name()} before the training began\n'

    def say(self, line: str) -> None:
        """Write a line to stderr."""
        sys.stderr.write(f'{line}\n')
        sys.stderr.flush()

    def status(self, codes: dict[int, int], first: int) -> int:
        """Work out the exit status from those of the processes that did not end with 0.

        Args:
            codes: Exit status, or minus the signal, by rank.
            first: Rank of the one that ended first.
        """
        if self.asked and EXIT_IN_VAIN in codes.values():
            return EXIT_IN_VAIN
        # Whoever came too late to the end of a stop was killed for that. Where another failure came first, torchrun has
        # ended the others by SIGTERM, which some of them take for an order to stop.
        if EXIT_REQUEUE in (codes.values() if self.asked else [codes[first]]):
            return EXIT_REQUEUE
        if self.asked and {-code for code in codes.values()} <= {*self.asked, signal.SIGTERM}:
            sys.stderr.write(self.nothing_begun())  # it came before they could take it
            return exit_code_of(self.reason())
        # The others end with an error of their own once one has been killed, or are ended by SIGTERM.
        rank = next((rank for rank, code in codes.items() if 0 > code != -signal.SIGTERM), first)
        if codes[rank] >= 0:
            return codes[rank]
        name = signal.Signals(-codes[rank]).name
        self.say(
            f'error: the process of rank {rank} was killed by {name}, and the job ended with it; '
            '--resume continues from the last checkpoint'
        )
        return 128 - codes[rank]


def main(argv: list[str]) -> int:
    """Run torchrun.

    Returns:
        75 where the job was stopped; else the exit status of the process that ended first with one other than 0; 128 +
        the signal where one was killed.
    """
    launcher = Launcher(argv)
    forwards = Path('/proc/self/stat').exists()
    if forwards:
        for signum in SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN or signum != signal.SIGHUP:  # nohup ignores that
                signal.signal(signum, lambda *_: None)  # the watch hears it
        SignalWatch(launcher.hear, launcher.expire)
    # Importing it takes seconds, in which a signal may come as well.
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # It reports that it ends processes, and which; they have said why.
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)
    if forwards and _SIGNALS_OPTION in run.get_args_parser().format_help():
        argv = [f'{_SIGNALS_OPTION}=SIGQUIT', *argv]
    try:
        run.main(argv)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return launcher.status(codes, error.get_first_failure()[0])
    except Exception as error:
        if not launcher.asked:
            raise
        # another machine of the job was quicker to end, and took the store with it
        launcher.say(f'stopped by {launcher.name()}: {type(error).__name__} after the end of another machine')
        return exit_code_of(launcher.reason())
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
