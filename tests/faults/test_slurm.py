"""tools/slurm_train.sh as a batch job, with stand-ins of Slurm's commands."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / 'tools/slurm_train.sh'


def submit(folder: Path, status: int, **env: str) -> tuple[int, str]:
    """Run the script where srun ends with a status; return how it ended and what scontrol was told."""
    told = folder / 'told'
    for name, body in (('srun', f'exit {status}'), ('scontrol', f'echo "$@" >> {told}')):
        path = folder / name
        path.write_text(f'#!/bin/sh\n{body}\n')
        path.chmod(0o755)
    environment = {'PATH': f'{folder}:{os.environ["PATH"]}', 'PYTHON': sys.executable, **env}
    command = ['bash', SCRIPT, 'gpu', 'job', 'c.py', 'run', '--resume']
    done = subprocess.run(command, env=environment, cwd=folder, check=False)
    return done.returncode, told.read_text() if told.exists() else ''


BATCH = dict(REQUEUE='1', SLURM_JOB_ID='77')


@pytest.mark.parametrize(
    ('status', 'env', 'told'),
    [
        (75, BATCH, 'requeue 77\n'),
        (75, {}, ''),
        (75, dict(REQUEUE='1'), ''),
        (0, BATCH, ''),
        (2, BATCH, ''),
        (130, BATCH, ''),
        (143, BATCH, ''),
    ],
)
def test_only_a_stopped_job_is_queued_again(tmp_path, status, env, told) -> None:
    assert submit(tmp_path, status, **env) == (status, told)


@pytest.mark.parametrize('status', [0, 75, 137, 143])
def test_what_a_stopped_training_left_behind_counts(tmp_path, status) -> None:
    """srun's status is the worst of its tasks', one of which may have been killed for being late."""
    for name, body in (
        ('srun', f'echo {{}} > "$MILA_MM_STOP_MARKER"; exit {status}'),
        ('scontrol', f'echo "$@" >> {tmp_path}/told'),
    ):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\n{body}\n')
        path.chmod(0o755)
    env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'PYTHON': sys.executable, **BATCH}
    command = ['bash', SCRIPT, 'gpu', 'job', 'c.py', tmp_path, '--resume']
    assert subprocess.run(command, env=env, check=False).returncode == 75
    assert (tmp_path / 'told').read_text() == 'requeue 77\n'


def test_what_an_earlier_start_left_behind_does_not(tmp_path) -> None:
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/stopped.json').touch()
    assert submit(tmp_path, 2, **BATCH) == (2, '')


def test_a_signal_to_the_batch_script_leaves_the_requeue_to_it(tmp_path) -> None:
    started = tmp_path / 'started'
    for name, body in (('srun', f'touch {started}; sleep 1; exit 75'), ('scontrol', f'echo "$@" >> {tmp_path}/told')):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\n{body}\n')
        path.chmod(0o755)
    env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'PYTHON': sys.executable, **BATCH}
    job = subprocess.Popen(['bash', SCRIPT, 'gpu', 'job', 'c.py', 'run', '--resume'], env=env)
    while not started.exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == 75
    assert (tmp_path / 'told').read_text() == 'requeue 77\n'


def test_a_signal_to_the_batch_script_alone_is_passed_on(tmp_path) -> None:
    """As --signal=B:USR1@120 sends it."""
    started = tmp_path / 'started'
    heard = (
        f'import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75)); open("{started}", "w"); '
    )
    for name, body in (
        ('srun', f"exec {sys.executable} -c '{heard}time.sleep(60)'"),
        ('scontrol', f'echo "$@" >> {tmp_path}/told'),
    ):
        (tmp_path / name).write_text(f'#!/bin/sh\n{body}\n')
        (tmp_path / name).chmod(0o755)
    env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'PYTHON': sys.executable, **BATCH}
    job = subprocess.Popen(['bash', SCRIPT, 'gpu', 'job', 'c.py', 'run', '--resume'], env=env)
    while not started.exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(40) == 75
    assert (tmp_path / 'told').read_text() == 'requeue 77\n'


@pytest.mark.parametrize('signum', [signal.SIGUSR1, signal.SIGTERM], ids=['USR1', 'TERM'])
def test_a_signal_while_srun_is_being_started_asks_for_another_start(tmp_path, signum) -> None:
    """Its parent, the batch script, gets it from srun's own first line, before any task can hear it."""
    for name, body in (
        ('srun', f'kill -{int(signum)} $PPID; exec sleep 30'),
        ('scontrol', f'echo "$@" >> {tmp_path}/told'),
    ):
        (tmp_path / name).write_text(f'#!/bin/sh\n{body}\n')
        (tmp_path / name).chmod(0o755)
    env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'PYTHON': sys.executable, **BATCH}
    command = ['bash', SCRIPT, 'gpu', 'job', 'c.py', 'run', '--resume']
    ended = subprocess.run(command, env=env, timeout=20, check=False)
    if signum == signal.SIGTERM:  # scancel sends it as well: what no task has heard is not queued again
        assert ended.returncode == 143 and not (tmp_path / 'told').exists()
    else:
        assert ended.returncode == 75 and (tmp_path / 'told').read_text() == 'requeue 77\n'


@pytest.mark.parametrize(
    ('name', 'value'),
    [
        *(
            (name, value)
            for name in ('GPUS', 'GPUS_PER_NODE', 'CPUS_PER_TASK')
            for value in ('0', 'x', '-1', 'a[$(id)]')
        ),
        *(('MASTER_PORT', value) for value in ('0', '65536', 'x')),
        ('SLURM_JOB_ID', '--help'),
    ],
)
def test_a_variable_that_is_no_number_is_named(tmp_path, name, value) -> None:
    (tmp_path / 'srun').write_text('#!/bin/sh\nexit 0\n')
    (tmp_path / 'srun').chmod(0o755)
    env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'PYTHON': sys.executable, **BATCH, name: value}
    command = ['bash', SCRIPT, 'gpu', 'job', 'c.py', 'run']
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f'error: {name}: expected ') and done.stderr.count('\n') == 1
