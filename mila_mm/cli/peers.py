"""How the processes of a job learn that one of them has failed, so that all end with its status and in one moment.

A launcher that kills the rest after the first bad status (``srun --kill-on-bad-exit``, ``mpirun``) reports the worst
of all: 137 for a process that it has killed itself, in place of the 2 or the 65 that tells the reason. So a process
that has failed says so at a store of torch's beside the training's, and all end together. Those that wait for it in a
collective, or for another machine, hear of it in a thread.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

_CONNECT = timedelta(seconds=600)  # until all machines of a job have started
_TOGETHER = timedelta(seconds=20)  # until all processes are ready to end, one of which may still be importing torch
_OWN_END = 5.0  # seconds in which a process that has the same mistake finds it by itself
_LOOK = 0.5  # seconds between two looks of a job of up to a hundred processes


class Peers:
    """The other processes of a job.

    Args:
        rank: Number of this process.
        size: Number of processes, above 1.
        address: ``MASTER_ADDR``.
        port: ``MASTER_PORT``.
    """

    def __init__(self, rank: int, size: int, address: str, port: int) -> None:
        self.rank, self.size = rank, size
        self._place = address, port
        self._store: Any = None
        self._connected = threading.Event()
        self._over = threading.Event()
        self._ending = threading.Lock()

    def watch(self) -> None:
        """Join the others at the store, and watch in a thread for one that fails.

        Raises:
            OSError: On rank 0, if the port is taken.
        """
        if self._is_server():
            self._connect()
        threading.Thread(target=self._watch, name='peers', daemon=True).start()

    def _is_server(self) -> bool:
        # under torchrun its agent serves
        return self.rank == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != str(True)

    def _connect(self) -> None:
        from torch import distributed

        try:
            # multi_tenant: torch.distributed makes its own one on the same port
            store = distributed.TCPStore(
                *self._place, self.size, self._is_server(), _CONNECT, wait_for_workers=False, multi_tenant=True
            )
        except distributed.DistNetworkError as error:
            raise OSError(None, str(error).partition('\n')[0]) from error
        # torchrun --max-restarts keeps its store for the next attempt
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        self._store = distributed.PrefixStore(f'mila_mm/peers/{attempt}', store)
        self._connected.set()

    def _watch(self) -> None:
        with suppress(RuntimeError, OSError):  # the store has gone with rank 0, or has never come
            if self._store is None:
                self._connect()
            while not self._over.wait(_LOOK * max(1.0, self.size / 100)):
                if self._store.check(['failed']):
                    self._over.wait(_OWN_END)
                    self.end(int(self._store.get('failed')), in_thread=True)

    def leave(self) -> None:
        """Watch no longer: this process comes to its end as it should."""
        self._over.set()

    def is_first(self, said: float) -> bool:
        """Tell whether it is for this process to say what is wrong: always on rank 0, elsewhere if that says nothing.

        Args:
            said: Seconds to wait for rank 0.
        """
        if not self.rank:
            return True
        if not self._connected.wait(said):
            return True
        with suppress(RuntimeError):
            self._store.wait(['said'], timedelta(seconds=said))
            return False
        return True

    def fail(self, status: int, waits: bool = True) -> int:
        """Tell the others.

        Args:
            status: Exit status.
            waits: Whether to wait for others that have not started yet. Defaults to True.

        Returns:
            The status to :meth:`end` with: where another one has failed before, that one's.
        """
        if self._connected.wait(_TOGETHER.total_seconds() if waits else 0.0):
            with suppress(RuntimeError):
                if not self.rank:
                    self._store.set('said', '1')
                return int(self._store.compare_set('failed', '', str(status)))
        return status

    def end(self, status: int, in_thread: bool = False) -> None:
        """Wait until all are ready to end, then end this process.

        Args:
            in_thread: Whether the main thread may be doing so already, which is then left to it. Defaults to False.
        """
        if not self._ending.acquire(blocking=not in_thread):
            return
        with suppress(OSError):  # the terminal has gone
            sys.stdout.flush()
            sys.stderr.flush()
        if self._store is None:  # never met the others
            os._exit(status)
        with suppress(RuntimeError):  # somebody does not come
            if self.rank:
                self._store.set(f'ready/{self.rank}', '1')
                self._store.wait(['go'], _TOGETHER)
            else:
                self._store.wait([f'ready/{rank}' for rank in range(1, self.size)], _TOGETHER)
        with suppress(RuntimeError):
            if not self.rank:
                self._store.set('go', '1')
                time.sleep(_LOOK / 5)  # the store goes with this process
        os._exit(status)
