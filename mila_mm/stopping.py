"""Ending a training on a signal: asked for by SIGTERM, SIGINT or SIGUSR1, done where nothing is lost.

Only the standard library: the handlers are in place before torch is imported.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# SIGUSR1 is what Slurm is usually told to send ahead of the time limit (sbatch --signal).
SIGNALS = tuple(getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGUSR1') if hasattr(signal, name))
_POLL = 5.0  # seconds until a worker notices that its parent is gone


class Stopped(BaseException):
    """A run that ended because a signal asked for it; like ``KeyboardInterrupt``, no error.

    Args:
        signum: The signal.
        checkpoint: What was saved for the stop, None where nothing was.
        begun: Whether the training had begun, where nothing was saved. Defaults to False.
    """

    def __init__(self, signum: int, checkpoint: str | None = None, begun: bool = False) -> None:
        self.signum = signum
        self.checkpoint = checkpoint
        name = signal.Signals(signum).name
        if begun:
            super().__init__(
                f'stopped by {name} outside of the training steps: --resume continues from the last checkpoint'
            )
        elif checkpoint is None:
            super().__init__(f'stopped by {name} before the training began')
        else:
            super().__init__(f'stopped by {name}: --resume continues from {checkpoint}')

    @property
    def exit_code(self) -> int:
        """Return the exit status: 130 after SIGINT, else 75, which asks for the job to be queued again."""
        return EXIT_INTERRUPTED if self.signum == signal.SIGINT else EXIT_REQUEUE


class StopRequest:
    """Whether a signal has asked this process to stop.

    Attributes:
        signum: The first signal that came, None before.
        armed: Whether the training loop looks at ``signum`` by itself. While it does not, a signal ends the
            process at once: there is nothing to save.
        begun: Whether the loop has ever looked at it.
        saved: Whether the stop has been saved; the process is about to end, and further signals change nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.armed = False
        self.begun = False
        self.saved = False
        self._pid = os.getpid()

    def receive(self, signum: int, frame: FrameType | None = None) -> None:
        """Handle a signal.

        Args:
            signum: The signal.
            frame: Not used.

        Raises:
            KeyboardInterrupt: On SIGINT before the loop runs, or on SIGINT after any other signal.
            Stopped: On the other signals before the loop runs.
        """
        if os.getpid() != self._pid:
            return  # a forked helper process, whose end is the business of its parent
        if self.saved:
            return
        first = self.signum is None
        if signum == signal.SIGINT and not (first and self.armed):
            raise KeyboardInterrupt
        if first:
            self.signum = signum
        if not self.armed:
            raise Stopped(signum, begun=self.begun)
        if first:
            again = ', a second one ends at once' if signum == signal.SIGINT else ''
            # os.write: print() may be what the signal interrupted
            os.write(2, f'{signal.Signals(signum).name}: ending after this iteration{again}\n'.encode())


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Receive SIGTERM, SIGINT and SIGUSR1 as requests to stop.

    Outside the main thread, where Python sets no handlers, the request stays empty.

    Yields:
        The request.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {signum: signal.signal(signum, request.receive) for signum in SIGNALS}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            # After a stop the process ends; schedulers repeat their signal, which must not change the exit status.
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
        """Prepare the worker.

        Args:
            worker_id: Number of the worker.
        """
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
