"""One run at a time in a folder."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mila_mm.engine.runner import lease
from mila_mm.engine.runner.lease import LEASE, Holder, acquire, leased, release
from mila_mm.errors import UserError


def hold(folder: Path, **changes: object) -> Path:
    """Let somebody else hold a folder: this process, changed."""
    path = folder / LEASE
    path.write_text(json.dumps(asdict(replace(Holder.this_process(), **changes))))
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life come ten times a second, and are waited for a second."""
    monkeypatch.setattr(lease, 'BEAT', 0.1)
    monkeypatch.setattr(lease, 'STALE', 1.0)


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path) -> None:
    with leased(tmp_path / 'run'):
        with pytest.raises(UserError) as caught, leased(tmp_path / 'run'):
            pass
        said = str(caught.value)
        assert f'is in use by another run: process {os.getpid()} on ' in said and '--work-dir' in said
        assert said.count('\n') == 1
        assert [path.name for path in (tmp_path / 'run').iterdir()] == [LEASE]
    assert not list((tmp_path / 'run').iterdir())
    with leased(tmp_path / 'run'):
        pass


def test_after_a_failure_the_folder_is_free(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError), leased(tmp_path):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_a_killed_run_is_replaced_at_once(tmp_path) -> None:
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    hold(tmp_path, pid=ended.pid)
    with leased(tmp_path):
        assert Holder.read(tmp_path / LEASE).pid == os.getpid()


def test_one_that_has_ended_and_is_not_waited_for_as_well(tmp_path) -> None:
    zombie = subprocess.Popen([sys.executable, '-c', ''], stdout=subprocess.PIPE)
    zombie.stdout.read()
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    hold(tmp_path, pid=zombie.pid, started='5')
    with leased(tmp_path):
        pass
    zombie.wait()


def test_another_process_with_its_number_is_not_it(tmp_path) -> None:
    hold(tmp_path, started='1')
    with leased(tmp_path):
        pass


@pytest.mark.usefixtures('quick')
def test_one_on_another_machine_is_dead_without_a_sign_of_life(tmp_path) -> None:
    hold(tmp_path, host='elsewhere', machine='elsewhere 1')
    with leased(tmp_path):
        assert Holder.read(tmp_path / LEASE).host != 'elsewhere'


@pytest.mark.usefixtures('quick')
def test_one_on_another_machine_that_gives_signs_is_not(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lease, 'STALE', 60.0)
    path, over = hold(tmp_path, host='elsewhere', machine='elsewhere 1', job='77'), threading.Event()
    beating = threading.Thread(target=lease._beat, args=(path, over))
    beating.start()
    try:
        with pytest.raises(UserError, match='on elsewhere, job 77'), leased(tmp_path):
            pass
        assert path.exists()
    finally:
        over.set()
        beating.join()


def test_a_job_that_was_started_again_replaces_itself(tmp_path, monkeypatch) -> None:
    hold(tmp_path, machine='elsewhere 1', job='77', restart='1')
    monkeypatch.setenv('SLURM_JOB_ID', '77')
    monkeypatch.setenv('SLURM_RESTART_COUNT', '2')
    with leased(tmp_path):
        pass


@pytest.mark.usefixtures('quick')
@pytest.mark.parametrize('content', ['', '{}', '[]', '{"host": 3}', '\0' * 50, 'x' * 20_000, '[' * 9_000])
def test_what_says_nothing_is_replaced_once_it_is_old(tmp_path, content) -> None:
    (tmp_path / LEASE).write_text(content)
    with leased(tmp_path):
        assert Holder.read(tmp_path / LEASE) is not None


@pytest.mark.parametrize('attempt', range(20))
def test_of_many_one_gets_it(tmp_path, attempt) -> None:
    """Also from one that is dead."""
    hold(tmp_path, started='1')
    got, barrier = [], threading.Barrier(8)

    def try_it() -> None:
        holder = Holder.this_process()
        barrier.wait()
        try:
            acquire(tmp_path / LEASE, holder)
        except UserError:
            return
        got.append(holder)

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and Holder.read(tmp_path / LEASE) == got[0]
    release(tmp_path / LEASE, Holder.this_process())
    assert (tmp_path / LEASE).exists(), 'only its holder gives it back'


def test_names_are_printed_escaped(tmp_path) -> None:
    hold(tmp_path, host='\x1b[2Jgone\n11/27 - mmengine - INFO - done')
    with pytest.raises(UserError) as caught, leased(tmp_path):
        pass
    assert '\x1b' not in str(caught.value) and str(caught.value).count('\n') == 1


def test_a_folder_in_its_place_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lease, 'STALE', 0.0)
    (tmp_path / LEASE).mkdir()
    with pytest.raises(UserError, match='is in the way and cannot be removed'), lease.leased(tmp_path):
        pass
