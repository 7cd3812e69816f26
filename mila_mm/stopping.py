"""Ending a training on a signal: asked for by SIGTERM, SIGINT, SIGUSR1 or SIGHUP, done where nothing is lost.

Only the standard library: the handlers are in place before torch is imported.
"""

import contextlib
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mila_mm.marker import EXIT_IN_VAIN, IN_VAIN, MARKER, MARKER_VARIABLE, StopCount, leave_marker

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# SIGUSR1 is what Slurm is usually told to send ahead of the time limit (sbatch --signal); LSF and Grid Engine send
# SIGUSR2 and SIGXCPU; SIGHUP comes when the terminal of a run is gone.
_NAMES = ('SIGTERM', 'SIGINT', 'SIGUSR1', 'SIGUSR2', 'SIGXCPU', 'SIGHUP')
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
_POLL = 5.0  # seconds until a worker notices that its parent is gone

# Seconds from a signal to the end of the process, whatever it is doing. Slurm kills 30 after SIGTERM unless told
# otherwise. Where there is nothing to save, a few are enough for an orderly end.
GRACE_VARIABLE = 'MILA_MM_STOP_GRACE'
_GRACE = {'SIGTERM': 25.0, 'SIGXCPU': 25.0, 'SIGUSR1': 110.0, 'SIGUSR2': 110.0, 'SIGHUP': 110.0}
_NOTHING_TO_SAVE = 5.0
_HANGUP = getattr(signal, 'SIGHUP', None)
_BRIEF = 60.0  # seconds that a start takes which does not hang


def grace_of(signum: int) -> float:
    """Return the seconds that a training has after a signal: those of ``MILA_MM_STOP_GRACE``, else 25 or 110."""
    try:
        return max(float(os.environ[GRACE_VARIABLE]), 0.0)
    except (KeyError, ValueError):
        return _GRACE.get(signal.Signals(signum).name, _NOTHING_TO_SAVE)


def exit_code_of(signum: int) -> int:
    """Return the exit status after a signal: 130 after SIGINT, else 75, which asks for the job to be queued again."""
    return EXIT_INTERRUPTED if signum == signal.SIGINT else EXIT_REQUEUE


class SignalWatch:
    """A thread that hears signals whatever the main thread does.

    Python's handlers wait for the main thread to leave the C++ that it may be in: a collective, or a store that
    another machine never comes to. The C-level handler writes to a pipe at once, from which this thread reads.

    Args:
        heard: Called with each signal, in the thread; returns when to call ``expired``, as of ``time.monotonic()``, or
            None for never.
        expired: Called in the thread once that time has come.
    """

    def __init__(self, heard: Callable[[int], float | None], expired: Callable[[], None]) -> None:
        self._heard, self._expired = heard, expired
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._thread = threading.Thread(target=self._run, name='signals', daemon=True)
        self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after what it has heard so far."""
        signal.set_wakeup_fd(self._before)
        os.write(self._writing, b'\0')
        self._thread.join()
        os.close(self._reading)
        os.close(self._writing)

    def _run(self) -> None:
        deadline: float | None = None
        while True:
            wait = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not select.select([self._reading], [], [], wait)[0]:
                self._expired()
                deadline = None
                continue
            for signum in os.read(self._reading, 64):
                if not signum:
                    return
                if signum in SIGNALS:  # torch has a handler for SIGCHLD, which comes here as well
                    deadline = self._heard(signum)


def _begin_child() -> None:
    # A forked helper has the pipe as well, and what it hears is not for the parent. Those of multiprocessing.Pool, in
    # which mmdet evaluates VOC, are ended by SIGTERM and then waited for.
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)
    if any(frame.f_globals['__name__'] == 'multiprocessing.pool' for frame, _ in traceback.walk_stack(None)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_begin_child)


def _write(line: str) -> None:
    # not print(), which may be what a signal has interrupted
    with contextlib.suppress(OSError):
        os.write(2, f'{line}\n'.encode())


class Stopped(BaseException):
    """A run that ended because a signal asked for it; like ``KeyboardInterrupt``, no error.

    Args:
        checkpoint: What was saved for the stop, None where nothing was.
        begun: Whether the training had begun, where nothing was saved. Defaults to False.

    Attributes:
        exit_code: Exit status: 75, 130 after SIGINT, or 69 where it is better not started again as it is.
    """

    def __init__(self, signum: int, checkpoint: str | None = None, begun: bool = False) -> None:
        self.signum = signum
        self.checkpoint = checkpoint
        self.exit_code = exit_code_of(signum)
        name = signal.Signals(signum).name
        if begun:
            super().__init__(
                f'stopped by {name} outside of the training steps: --resume continues from the last checkpoint'
            )
        elif checkpoint is None:
            super().__init__(f'stopped by {name} before the training began')
        else:
            super().__init__(f'stopped by {name}: --resume continues from {checkpoint}')


class StopRequest:
    """Whether a signal has asked this process to stop.

    Attributes:
        signum: The first signal that came, None before; another takes the place of SIGINT.
        armed: Whether the training loop looks at ``signum`` by itself. While it does not, a signal ends the
            process at once: there is nothing to save.
        begun: Whether the loop has ever looked at it.
        saved: Whether the stop has been saved; the process is about to end, and further signals change nothing.
        ended: Whether the training is over and the process is about to end.
        marker: File to leave behind for whoever queues the job again; None while it is not known where.
        count: Stops in a row that saved nothing new; None while the work folder is not known.
        has_saved: Tells whether this start has saved a later iteration than it began with.
        status: Exit status, once the stop has been saved.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.armed = self.begun = self.saved = self.ended = False
        self.marker = Path(os.environ[MARKER_VARIABLE]) if os.environ.get(MARKER_VARIABLE) else None
        self.count: StopCount | None = None
        self.has_saved: Callable[[], bool] = lambda: False
        self.status: int | None = None
        self._brief = 0.0
        self._pid = os.getpid()
        self._answered = threading.Lock()
        self._heard: list[int] = []
        self._deadline: float | None = None

    def settle(self, work_dir: Path, first: bool) -> None:
        """Take note of the work folder; the first process, of rank 0, removes what asked for this start."""
        self.count = StopCount(work_dir)
        if self.marker is None:
            self._brief = time.monotonic() + _BRIEF
            self.marker = work_dir / MARKER
        if first:
            with contextlib.suppress(OSError):  # then there is none
                self.marker.unlink(missing_ok=True)

    def close(self, signum: int, checkpoint: str | None, leaves_marker: bool = True) -> int:
        """Ask for another start, unless too many in a row have saved nothing new; return the exit status.

        Args:
            checkpoint: What was saved for the stop.
            leaves_marker: Whether this process writes the marker; others save for it. Defaults to True.
        """
        if signum == signal.SIGINT and checkpoint is None:
            return exit_code_of(signum)
        if self.count is not None and time.monotonic() < self._brief and not self.count.path.parent.exists():
            return exit_code_of(signum)  # it has just been started, and leaves nothing
        try:
            if signum != signal.SIGINT and self.count is not None and not self.has_saved():
                if not self.count.one_more():
                    self._write_in_vain(leaves_marker)
                    return EXIT_IN_VAIN
            elif self.count is not None:
                self.count.forget()
            if leaves_marker and self.marker is not None:
                leave_marker(self.marker, signum, checkpoint)
        except OSError as error:
            _write(f'{error.filename} cannot be written: {error.strerror}')
        return exit_code_of(signum)

    def _write_in_vain(self, says: bool) -> None:
        if self.marker is not None:
            with contextlib.suppress(OSError):
                self.marker.unlink(missing_ok=True)
        if says:
            _write(IN_VAIN)

    def receive(self, signum: int, frame: FrameType | None = None) -> None:
        """Handle a signal, in the main thread.

        Raises:
            KeyboardInterrupt: On SIGINT before the loop runs, or on SIGINT after any other signal.
            Stopped: On the other signals before the loop runs.
        """
        if os.getpid() != self._pid:
            return  # a forked helper process, whose end is the business of its parent
        if self.saved:
            return
        first = self.signum is None
        if self.ended:
            if first:
                self._end(
                    signum, 'after the training: --resume finds it finished, or continues from the last checkpoint'
                )
            return
        if signum == signal.SIGINT and not (first and self.armed):
            raise KeyboardInterrupt
        if first or self.signum == signal.SIGINT:  # a scheduler's signal counts for more
            self.signum = signum
        self._answer(signum)
        if not self.armed:
            raise Stopped(signum, begun=self.begun)

    def hear(self, signum: int) -> float | None:
        """Answer a signal and settle until when the process must have ended, in the thread of the watch."""
        if self.saved:
            return self._deadline
        self._answer(signum)
        self._heard.append(signum)
        if self.armed and signum != signal.SIGINT:
            grace = grace_of(signum)
        elif self.armed and self._heard == [signal.SIGINT]:
            return self._deadline  # whoever sits at the keyboard can press it once more
        else:
            grace = min(_NOTHING_TO_SAVE, grace_of(signal.SIGTERM))
        deadline = time.monotonic() + grace
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
        return self._deadline

    def expire(self) -> None:
        """End the process: its time is over, and the main thread has not come to an end."""
        signum = next((each for each in self._heard if each != signal.SIGINT), signal.SIGINT)
        if self.saved:
            os._exit(self.status if self.status is not None else exit_code_of(self.signum or signum))
        self._end(
            signum,
            'which did not come to a step in time: --resume continues from the last checkpoint'
            if self.begun
            else 'before the training began',
        )

    def _end(self, signum: int, what: str) -> None:
        _write(f'stopped by {signal.Signals(signum).name} {what}')
        self._brief = 0.0
        os._exit(self.close(signum, None))

    def _answer(self, signum: int) -> None:
        if self._answered.acquire(blocking=False):  # once, by whichever thread comes first
            again = ', a second one ends at once' if signum == signal.SIGINT else ''
            _write(f'{signal.Signals(signum).name}: ending{f" after this iteration{again}" if self.armed else ""}')


@contextmanager
def stop_signals(until_exit: bool = False) -> Iterator[StopRequest]:
    """Receive SIGTERM, SIGINT, SIGUSR1 and their like as requests to stop.

    They are answered on stderr at once, and the process ends in :func:`grace_of` seconds whatever it does. Outside the
    main thread, where Python sets no handlers, the request stays empty.

    Args:
        until_exit: Whether signals are answered until the process ends, because it has nothing else to do. Defaults to
            False.

    Yields:
        The request.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # nohup ignores SIGHUP for a program
    heard = [each for each in SIGNALS if each != _HANGUP or signal.getsignal(each) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, request.receive) for signum in heard}
    watch = SignalWatch(request.hear, request.expire)
    keep = until_exit
    try:
        yield request
    except Stopped as stopped:
        if not request.saved:
            stopped.exit_code = request.close(stopped.signum, None)
        raise
    except BaseException:
        keep = False  # it failed: a launcher that then ends it by a signal does not ask for another start
        raise
    finally:
        request.ended = True
        if not keep:
            watch.stop()
        for signum, handler in before.items():
            # After a stop the process ends; schedulers repeat their signal, which must not change the exit status.
            if request.saved or not keep:
                signal.signal(signum, signal.SIG_IGN if request.saved else handler)


class WorkerStart:
    """What a dataloader's worker calls first: the signals of a job are for the process that trains.

    A scheduler signals every process of a job, and a worker that dies of it takes the iteration down which is to be
    finished. SIGINT and SIGUSR1 are left to the parent; SIGTERM is obeyed where the parent sends it. A worker
    also ends when its parent is gone.

    Args:
        inner: The dataloader's own ``worker_init_fn``.
    """

    def __init__(self, inner: Callable[[int], None] | None = None) -> None:
        self.inner = inner

    def __call__(self, worker_id: int) -> None:
        """Prepare the worker."""
        for signum in SIGNALS:
            if signum != signal.SIGTERM:
                signal.signal(signum, signal.SIG_IGN)
        if hasattr(signal, 'sigtimedwait'):  # not on macOS, where SIGTERM ends a worker whoever sends it
            # Only a thread that waits learns who has sent a signal; threads made later inherit the mask.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
        if self.inner is not None:
            self.inner(worker_id)


def _obey_parent(parent: int) -> None:
    # The parent's death is looked for here as well: torch's worker then waits for somebody to take its last batch.
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _POLL)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
