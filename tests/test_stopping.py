"""Signals that ask a training to stop."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from textwrap import dedent

import pytest
import torch
from torch.utils.data import DataLoader

from mila_mm import cli
from mila_mm.engine.config.build_errors import plain_failures
from mila_mm.errors import LostPeerError, UserError
from mila_mm.stopping import EXIT_REQUEUE, Stopped, StopRequest, WorkerStart, grace_of, stop_signals


def test_other_signals_are_no_business_of_the_watch() -> None:
    """torch has a handler for SIGCHLD, and what Python handles comes through the same pipe."""
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        with stop_signals() as request:
            os.kill(os.getpid(), signal.SIGCHLD)
        assert request._heard == []
    finally:
        signal.signal(signal.SIGCHLD, before)


# A mutex that is taken twice waits in C through any signal, as a collective does that another rank never comes to.
IN_C = """
    import ctypes, sys, threading
    from mila_mm.stopping import stop_signals

    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    with stop_signals(until_exit=True) as request:
        request.armed = request.begun = sys.argv[1] == 'armed'
        threading.Timer(0.5, print, ['waiting'], dict(flush=True)).start()
        libc.pthread_mutex_lock(mutex)
"""


def signalled(program: str, argument: str, *signums: int, **env: str) -> tuple[int, str]:
    """Start a program, signal it once it has printed a line, and return its status and what it said."""
    command = [sys.executable, '-c', dedent(program), argument]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(command, text=True, env={**os.environ, **env}, **pipes)
    process.stdout.readline()
    hung = threading.Timer(60, process.kill)  # one that says nothing is not waited for
    hung.start()
    said = ''
    for signum in signums:
        process.send_signal(signum)
        said = said or process.stderr.readline()
    said += process.stderr.read()
    status = process.wait()
    hung.cancel()
    return status, said


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize('state', ['armed', 'not armed'])
def test_a_signal_is_answered_and_obeyed_while_the_main_thread_is_in_c(tmp_path, signum, state) -> None:
    marker, name = tmp_path / 'run/stopped.json', signal.Signals(signum).name
    status, said = signalled(IN_C, state, signum, MILA_MM_STOP_GRACE='1', MILA_MM_STOP_MARKER=str(marker))
    assert status == 75, said
    first, last = said.splitlines()
    assert first == f'{name}: ending' + (' after this iteration' if state == 'armed' else '')
    why = 'which did not come to a step in time: --resume continues from the last checkpoint'
    assert last == f'stopped by {name} ' + (why if state == 'armed' else 'before the training began')
    content = json.loads(marker.read_text())
    assert content['signal'] == name and content['checkpoint'] is None


@pytest.mark.parametrize(('state', 'count'), [('not armed', 1), ('armed', 2)])
def test_so_is_the_keyboard(state, count) -> None:
    status, said = signalled(IN_C, state, *[signal.SIGINT] * count, MILA_MM_STOP_GRACE='1')
    assert status == 130
    assert said.startswith('SIGINT: ending')


def test_a_later_signal_brings_the_end_no_further_away(monkeypatch) -> None:
    monkeypatch.delenv('MILA_MM_STOP_GRACE', raising=False)
    request = StopRequest()
    request.armed = True
    late, soon, again = request.hear(signal.SIGUSR1), request.hear(signal.SIGTERM), request.hear(signal.SIGUSR1)
    assert soon == again < late
    monkeypatch.setenv('MILA_MM_STOP_GRACE', '7')
    assert grace_of(signal.SIGTERM) == grace_of(signal.SIGUSR1) == 7
    monkeypatch.setenv('MILA_MM_STOP_GRACE', 'soon')
    assert grace_of(signal.SIGTERM) < 30 < grace_of(signal.SIGUSR1) < 120


def test_a_signal_after_the_training_asks_for_another_start() -> None:
    program = """
        import time
        from mila_mm.stopping import stop_signals

        with stop_signals(until_exit=True) as request:
            request.begun = True
        print('leaving', flush=True)
        time.sleep(60)
    """
    status, said = signalled(program, '', signal.SIGTERM)
    assert status == 75
    assert 'stopped by SIGTERM after the training' in said


def test_a_forked_helper_does_not_speak_for_its_parent() -> None:
    with stop_signals() as request:
        request.armed = True
        if os.fork() == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        os.wait()
    assert request._heard == [] and request.signum is None


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGUSR1])
def test_before_the_loop_a_signal_ends_at_once(signum) -> None:
    with stop_signals(), pytest.raises(Stopped, match='before the training began') as caught:
        os.kill(os.getpid(), signum)
    assert caught.value.exit_code == EXIT_REQUEUE == 75


def test_in_the_loop_a_signal_waits(capfd) -> None:
    with stop_signals() as request:
        request.armed = True
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.signum == signal.SIGTERM
    assert capfd.readouterr().err == 'SIGTERM: ending after this iteration\n'


def test_a_second_interrupt_ends_at_once(capfd) -> None:
    with stop_signals() as request:
        request.armed = True
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert 'a second one ends at once' in capfd.readouterr().err


def test_a_schedulers_signal_after_the_keyboards_counts(capfd) -> None:
    with stop_signals() as request:
        request.armed = True
        for signum, noted in ((signal.SIGINT, signal.SIGINT), (signal.SIGTERM, signal.SIGTERM)):
            os.kill(os.getpid(), signum)
            assert request.signum == noted
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.signum == signal.SIGTERM


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with stop_signals():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_outside_the_main_thread_nothing_is_handled() -> None:
    seen = []

    def run() -> None:
        with stop_signals() as request:
            seen.append(request.signum)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None]


def test_a_forked_helper_is_not_concerned() -> None:
    request = StopRequest()
    request._pid = -1
    request.receive(signal.SIGTERM)
    assert request.signum is None


@pytest.mark.parametrize(('signum', 'status'), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_exit_status_and_message(capfd, signum, status) -> None:
    def stopped(_) -> None:
        raise Stopped(signum, 'run/stop_iter_7.pth')

    assert cli.execute(stopped) == status
    name = signal.Signals(signum).name
    assert capfd.readouterr().err == f'stopped by {name}: --resume continues from run/stop_iter_7.pth\n'


def test_a_rank_that_had_nothing_to_save_ends_the_job(monkeypatch, capfd) -> None:
    """The others may wait for it in a collective: only a status other than 0 makes the launcher end them."""
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')

    def stopped(_) -> None:
        raise Stopped(signal.SIGTERM)

    assert cli.execute(stopped) == EXIT_REQUEUE
    assert 'before the training began' in capfd.readouterr().err


@pytest.mark.parametrize(
    'variables',
    [
        dict(SLURM_PROCID='1', SLURM_NTASKS='2'),
        dict(RANK='1', WORLD_SIZE='2'),
        dict(OMPI_COMM_WORLD_RANK='3'),
        dict(RANK='x'),
    ],
)
def test_a_single_process_is_no_rank_whatever_its_environment_says(monkeypatch, capfd, variables) -> None:
    """As each process of a sweep under srun."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def stopped(_) -> None:
        cli.export_local_rank(argparse.Namespace(local_rank=0, launcher='none'))
        raise Stopped(signal.SIGTERM, 'run/stop_iter_7.pth')

    monkeypatch.setenv('LOCAL_RANK', '0')
    assert cli.execute(stopped) == 75
    assert capfd.readouterr().err == 'stopped by SIGTERM: --resume continues from run/stop_iter_7.pth\n'


def test_after_the_stop_has_been_saved_repeated_signals_change_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with stop_signals() as request:
            request.begun = request.saved = True
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signum is None
    finally:
        for signum in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(signum, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_after_the_loop_a_signal_does_not_claim_that_nothing_began() -> None:
    with stop_signals() as request, pytest.raises(Stopped, match='continues from the last checkpoint'):
        request.begun = True
        os.kill(os.getpid(), signal.SIGTERM)


def test_workers_survive_the_signals_of_the_job_and_obey_their_parent() -> None:
    program = """
        import os, signal, time
        from torch.utils.data import DataLoader
        from mila_mm.stopping import WorkerStart

        data = DataLoader(range(8), num_workers=1, persistent_workers=True, worker_init_fn=WorkerStart(None))
        stream = iter(data)
        next(stream)
        worker = stream._workers[0]
        for name in ('SIGTERM', 'SIGINT', 'SIGUSR1'):
            if os.fork() == 0:
                os.kill(worker.pid, getattr(signal, name))
                os._exit(0)
            os.wait()
        time.sleep(0.3)
        assert len([*stream]) == 7 and worker.is_alive()
        worker.terminate()
        worker.join(10)
        print('exit code', worker.exitcode)
    """
    command = [sys.executable, '-c', dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == 'exit code 0\n'


def test_workers_end_with_their_parent() -> None:
    """Also one that cannot hand over its batch: torch's own check does not end that."""
    program = """
        import os, sys, time
        import numpy
        from torch.utils.data import DataLoader
        from mila_mm import stopping

        class Large:
            def __len__(self): return 8
            def __getitem__(self, index): return numpy.zeros(1 << 20)

        stopping._POLL = 0.2
        if os.fork() == 0:
            start = stopping.WorkerStart(None)
            stream = iter(DataLoader(Large(), num_workers=1, batch_size=None, prefetch_factor=4, worker_init_fn=start))
            print(stream._workers[0].pid, flush=True)
            time.sleep(1)
            os._exit(9)
        os.wait()
    """
    command = [sys.executable, '-c', dedent(program)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60, check=True)
    # run() has seen the end of the pipe, which the worker held as well
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(int(done.stdout), 0)
            time.sleep(0.1)


class Mortal(torch.utils.data.Dataset):
    """Kills the worker that reads it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_killed_worker_is_said_in_two_lines() -> None:
    # which of the two torch says depends on what it looks at first
    said = r'(?s)worker process of the dataloader (was killed \(Killed\)|ended unexpectedly).*--resume'
    with pytest.raises(UserError, match=said) as caught, plain_failures():
        list(DataLoader(Mortal(), num_workers=1, worker_init_fn=WorkerStart()))
    assert str(caught.value).count('\n') == 1


@pytest.mark.parametrize('error', [RuntimeError('Connection closed by peer'), RuntimeError('x'), OSError(2, 'x')])
def test_other_errors_pass(error) -> None:
    """Also one that reads like the end of a peer, in a process that has none."""
    with pytest.raises(type(error)) as caught, plain_failures():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ('resumes', 'then'), [(True, r'.*make room, then continue with --resume\.$'), (False, r'Make room\.$')]
)
def test_a_full_disk_is_said_in_two_lines(resumes, then) -> None:
    said = rf'(?s)scalars\.json: No space left on device\n{then}'
    with pytest.raises(UserError, match=said), plain_failures(resumes):
        raise OSError(28, os.strerror(28), '/run/scalars.json')


@pytest.mark.parametrize(
    ('error', 'local', 'said', 'waits'),
    [
        (UserError('wrong'), '1', 'error (rank 1): wrong\n', True),
        (LostPeerError('lost'), '1', '', False),
        (LostPeerError('lost'), '0', 'error (rank 1): lost\n', True),  # each machine says it once
    ],
)
def test_other_ranks_leave_the_first_word_to_rank_0(monkeypatch, capfd, error, local, said, waits) -> None:
    waited = []
    monkeypatch.setenv('LOCAL_RANK', local)
    monkeypatch.setattr(cli.time, 'sleep', waited.append)
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')

    def fail(_) -> None:
        raise error

    assert cli.execute(fail) == cli.EXIT_USER_ERROR
    assert capfd.readouterr().err == said
    assert bool(waited) == waits


@pytest.mark.parametrize(('error', 'left'), [(None, True), (UserError('wrong'), False)])
def test_the_process_group_is_left_after_a_success(tmp_path, error, left) -> None:
    """After a failure the other ranks may never come to leave it with this one."""

    def main(_) -> None:
        torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
        if error is not None:
            raise error

    try:
        cli.execute(main)
        assert torch.distributed.is_initialized() is not left
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
