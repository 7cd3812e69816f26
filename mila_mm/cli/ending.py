"""How the processes of a job end together: with one status, and none before the others are through.

A launcher kills what still runs when a process ends with another status than 0, and reports the worst of all. So each
does all that an end takes, waits for the others at a store of torch's, and ends at once.
"""

import atexit
import gc
import os
import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any

from mila_mm.cli.peers import Peers
from mila_mm.errors import UserError

_RANK_VARIABLES = {
    'pytorch': ('RANK', 'WORLD_SIZE'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE'),
}
_WAIT = timedelta(seconds=20)
_KEY = 'mila_mm/ended'
_CRASHED = 1  # as Python ends after a traceback


class Job:
    """What this process knows of the job that it is part of.

    Attributes:
        launcher: What the command line names; None where it has not been looked at.
        owns_process: Whether the process is there for the command alone.
        status: Exit status to end with together with the other ranks, None where each ends by itself.
        peers: The other processes of the job, once they are known.
        crashed: Whether the command has raised what no user is to blame for. The others are told at the end, once the
            traceback is on the screen.
    """

    def __init__(self) -> None:
        self.begin(owns_process=False)

    def begin(self, owns_process: bool) -> None:
        """Forget an earlier command of this process.

        Args:
            owns_process: Whether the process is there for the command alone.
        """
        self.launcher: str | None = None
        self.owns_process = owns_process
        self.status: int | None = None
        self.peers: Peers | None = None
        self.crashed = self._failed = False
        self._rank: int | None = None
        self._size = 1
        self._store: Any = None

    def rank(self) -> int | None:
        """Return the rank of this process in a distributed job, None outside of one.

        torch.distributed knows. Before it is there, the launcher that the command line names has said it in the
        environment; what else stands there is no matter: under ``srun`` a sweep's processes have ``SLURM_PROCID`` each.
        """
        if self._rank is not None:
            return self._rank if self._size > 1 else None
        distributed = _distributed()
        if distributed is not None:
            return distributed.get_rank() if distributed.get_world_size() > 1 else None
        rank, size = _RANK_VARIABLES.get(self.launcher or 'pytorch', ('', ''))
        if rank not in os.environ or not os.environ[rank].isdigit():
            return None
        return int(os.environ[rank]) if os.environ.get(size, '1') not in ('0', '1') else None

    def join(self) -> None:
        """Get to know the other processes, whose ranks have torch's names in the environment by now.

        Raises:
            UserError: If rank 0 cannot listen where the others look for it.
        """
        size = int(os.environ['WORLD_SIZE']) if self.launcher not in (None, 'none') else 1
        if size == 1 or not self.owns_process:
            return
        address, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
        peers = Peers(int(os.environ['RANK']), size, address, port)
        try:
            peers.watch()
        except OSError as error:
            raise UserError(
                f'MASTER_ADDR={address} MASTER_PORT={port}: rank 0 cannot listen there ({error.strerror})\n'
                'Is that the address of this machine? Does another job have the port? Take one of its own for each.'
            ) from error
        self.peers = peers

    def fail(self, status: int, waits: bool = True) -> int:
        """Tell the other processes that this one has to end; return the status that all end with.

        Args:
            waits: Whether to wait for others that have not started yet. Defaults to True.
        """
        if self.peers is None:
            return status
        self._failed, self.status = True, self.peers.fail(status, waits)
        return self.status

    def leave(self, status: int) -> None:
        """Leave the process group with the other ranks, all of which come here.

        Threads of gloo that still hold a tensor while the interpreter shuts down abort the process, in a run that has
        done all it should (github.com/pytorch/pytorch/pull/179291), and NCCL warns about groups that nobody closed.
        After a failure nobody waits: the other ranks may never come.

        Args:
            status: What they all end with; with another one than 0 they end together.
        """
        if self.peers is not None:
            self.peers.leave()
        distributed = _distributed()
        if distributed is None:
            return
        self._rank, self._size = distributed.get_rank(), distributed.get_world_size()
        with suppress(RuntimeError):  # the work is done here; a rank that does not come says itself why
            distributed.barrier()
        if status and self._size > 1:
            self._store, self.status = distributed.distributed_c10d._get_default_store(), status
        distributed.destroy_process_group()
        gc.collect()  # a model under DDP holds its group, and the runner holds itself

    def end_together(self) -> None:
        """Wait for the other ranks, then end; the last thing that a process does."""
        if self.crashed:
            self.fail(_CRASHED)
        if self.status is None:
            return
        if self._failed and self.peers is not None:
            self.peers.end(self.status)
        with suppress(OSError):  # the terminal has gone
            sys.stdout.flush()
            sys.stderr.flush()
        with suppress(RuntimeError):  # the others have gone without this one, or do not come
            if self._rank:
                self._store.set(f'{_KEY}/{self._rank}', '1')
                self._store.wait([_KEY], _WAIT)
            else:
                self._store.wait([f'{_KEY}/{rank}' for rank in range(1, self._size)], _WAIT)
                self._store.set(_KEY, '1')
        os._exit(self.status)


def _distributed() -> Any:
    """Return torch.distributed if it is in use."""
    torch = sys.modules.get('torch')
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed


job = Job()
# Called last: what is imported later registers later and is called earlier.
atexit.register(job.end_together)
