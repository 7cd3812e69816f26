"""Processes of one job end with one status, whichever of them fails and how."""

import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed

from mila_mm import cli
from mila_mm.cli import peers
from mila_mm.errors import DivergedError, UserError
from mila_mm.stopping import Stopped

RANKS = 3
assert torch.distributed.is_available(), 'imported here, once for all processes'


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def be_rank(number: int, port: int, failures: dict[int, BaseException], late: float, said: Path) -> NoReturn:
    """Be a process of a job up to its end: fail, or wait as in a collective."""
    sys.stderr = said.open('w')
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(number), WORLD_SIZE=str(RANKS))
    os.environ['LOCAL_RANK'] = str(number)
    peers._OWN_END = cli._FIRST_WORD = 0.5

    def main(argv: object) -> None:
        cli.job.launcher = 'pytorch'
        time.sleep(late if number else 0)
        cli.job.join()
        if number in failures:
            raise failures[number]
        time.sleep(60)

    status = 1
    try:
        status = cli.execute(main)
    except ZeroDivisionError:  # what an interpreter does then
        traceback.print_exc()
    cli.job.end_together()
    os._exit(status)


BUG, MISTAKE, NAN = ZeroDivisionError('a bug'), UserError('a mistake'), DivergedError('NaN')


@pytest.mark.parametrize(
    ('failures', 'late', 'status', 'words'),
    [
        ({0: BUG}, 0, 1, 'ZeroDivisionError: a bug'),
        ({0: BUG}, 1, 1, 'ZeroDivisionError: a bug'),
        ({2: BUG}, 0, 1, 'ZeroDivisionError: a bug'),
        ({1: MISTAKE}, 1, 2, 'error (rank 1): a mistake'),
        ({0: NAN, 1: NAN, 2: NAN}, 0, 65, 'error (rank 0): NaN'),
        ({0: Stopped(signal.SIGTERM)}, 0, 75, 'stopped by SIGTERM before the training began'),
    ],
    ids=str,
)
def test_all_end_as_the_one_that_fails(tmp_path, failures, late, status, words) -> None:
    """A launcher kills the others at once, and reports 137, where one ends before them; also before all have come."""
    port, pids = free_port(), []
    for number in range(RANKS):
        pids.append(os.fork() or be_rank(number, port, failures, late, tmp_path / str(number)))
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    texts = ''.join((tmp_path / str(number)).read_text() for number in range(RANKS))
    assert ends == [status] * RANKS, texts
    assert texts.count(words) == 1 and texts.count('Traceback') == (status == 1), texts
