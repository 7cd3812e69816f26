"""How often a run that saves nothing new may ask for another start."""

import json
import os
import signal
import subprocess
import sys
from textwrap import dedent

import pytest

from mila_mm.marker import COUNT, EXIT_IN_VAIN, MARKER, StopCount, most_stops
from mila_mm.stopping import StopRequest, stop_signals


def stop(folder, saved=False, signum=signal.SIGTERM, checkpoint=None) -> tuple[int, bool]:
    """Start and stop a run; return its status and whether the marker is there."""
    request = StopRequest()
    request.settle(folder, first=True)
    assert not (folder / MARKER).exists(), 'of the start before'
    request.has_saved = lambda: saved
    return request.close(signum, checkpoint), (folder / MARKER).exists()


def test_a_run_that_gets_nowhere_asks_five_times(tmp_path) -> None:
    folder = tmp_path / 'not there yet'
    assert stop(folder) == (75, False) and not folder.exists(), 'it has just been started'
    folder.mkdir()
    assert [stop(folder) for _ in range(6)] == [(75, True)] * 4 + [(EXIT_IN_VAIN, False), (75, True)]


def test_what_is_saved_again_is_nothing_new(tmp_path) -> None:
    """A validation that takes longer than a job may last is begun again and again, and each time the stop is saved."""
    assert [stop(tmp_path, checkpoint='stop_iter_4.pth') for _ in range(5)][-1] == (EXIT_IN_VAIN, False)


def test_one_iteration_that_was_saved_is_enough(tmp_path) -> None:
    for _ in range(3):
        assert [stop(tmp_path) for _ in range(4)] == [(75, True)] * 4
        assert stop(tmp_path, saved=True) == (75, True)


def test_the_keyboard_counts_nothing(tmp_path) -> None:
    assert [stop(tmp_path, signum=signal.SIGINT) for _ in range(9)] == [(130, False)] * 9


def test_all_processes_come_to_the_same(tmp_path) -> None:
    for last in (False, False, False, False, True):
        ranks = [StopRequest() for _ in range(3)]
        for request in ranks:
            request.settle(tmp_path, first=request is ranks[0])
        assert {request.close(signal.SIGTERM, None) for request in ranks} == {EXIT_IN_VAIN if last else 75}
        assert (tmp_path / MARKER).exists() == (not last)


@pytest.mark.parametrize(
    'content', ['', 'null', '[]', '{}', '{"in_vain": -1}', '{"in_vain": 1e9}', '{"in_vain": true}']
)
def test_a_count_that_is_none_is_not_believed(tmp_path, content) -> None:
    (tmp_path / COUNT).write_text(content)
    assert StopCount(tmp_path).before == 0
    (tmp_path / COUNT).unlink()
    (tmp_path / COUNT).mkdir()
    assert StopCount(tmp_path).before == 0


@pytest.mark.parametrize(('said', 'most'), [('3', 3), ('0', 5), ('-1', 5), ('x', 5), ('', 5), ('1' * 5000, 5)])
def test_how_many_are_allowed(monkeypatch, said, most) -> None:
    monkeypatch.setenv('MILA_MM_MAX_STOPS', said)
    assert most_stops() == most


HANGING = """
    import ctypes, sys, threading
    from pathlib import Path
    from mila_mm.stopping import stop_signals

    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    with stop_signals(until_exit=True) as request:
        request.settle(Path(sys.argv[1]), first=True)
        request.armed = request.begun = True
        threading.Timer(0.5, print, ['waiting'], dict(flush=True)).start()
        libc.pthread_mutex_lock(mutex)
"""


def test_a_hang_is_ended_without_asking_for_another_start(tmp_path) -> None:
    """The main thread is in C and stays there."""
    (tmp_path / COUNT).write_text(json.dumps(dict(in_vain=1)))
    env = {**os.environ, 'MILA_MM_STOP_GRACE': '1', 'MILA_MM_MAX_STOPS': '2'}
    command = [sys.executable, '-c', dedent(HANGING), tmp_path]
    with subprocess.Popen(command, text=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == EXIT_IN_VAIN and 'does not ask for another start' in said
    assert not (tmp_path / MARKER).exists()


WAITING = """
    import signal, sys, time
    from mila_mm import cli
    from mila_mm.stopping import stop_signals

    def main(argv):
        with stop_signals(until_exit=True) as request:
            print('waiting', flush=True)
            time.sleep(20)

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup around the tests would be left as it is
    sys.exit(cli.execute(main))
"""


@pytest.mark.parametrize('name', ['SIGHUP', 'SIGUSR2', 'SIGXCPU'])
def test_other_signals_that_schedulers_and_terminals_send(name) -> None:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([sys.executable, '-c', dedent(WAITING)], text=True, **pipes) as process:
        process.stdout.readline()
        process.send_signal(signal.Signals[name])
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and f'stopped by {name} before the training began' in said


def test_a_terminal_that_has_gone_changes_no_status() -> None:
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, '-c', dedent(WAITING)], stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert os.read(ours, 100)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 75


def test_nohup_is_left_as_it_is() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGUSR2) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
