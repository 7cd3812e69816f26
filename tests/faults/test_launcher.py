"""What tools/_torchrun.py makes of how its processes ended."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'


@pytest.fixture(scope='module')
def torchrun() -> ModuleType:
    spec = importlib.util.spec_from_file_location('own_torchrun', TOOLS / '_torchrun.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('name', [b'\xff\xfe', b'a) S 1 (', b'\n)', b''])
def test_processes_may_have_any_name(torchrun, name) -> None:
    program = f'import sys; open("/proc/self/comm", "wb").write({name!r}); print(flush=True); sys.stdin.read()'
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, '-c', program], **pipes) as process:
        process.stdout.readline()
        assert process.pid in torchrun.children()
        assert os.getppid() not in torchrun.children()


TERM, KILL = -signal.SIGTERM, -signal.SIGKILL


@pytest.mark.parametrize(
    ('asked', 'codes', 'first', 'status'),
    [
        ([15], {0: 75, 1: 75}, 0, 75),
        ([15], {0: 75, 1: KILL}, 0, 75),  # it was late for the end
        ([15], {0: KILL, 1: 75}, 0, 75),
        ([10], {0: -10, 1: -10}, 0, 75),  # before they could take it
        ([2], {0: -2, 1: TERM}, 0, 130),
        ([2], {0: 130, 1: 130}, 0, 130),
        ([2, 15], {0: -2, 1: TERM}, 0, 75),  # a scheduler's signal counts for more than the keyboard's
        ([2, 15], {0: 75, 1: 75}, 0, 75),
        ([15, 15], {0: TERM, 1: 75}, 0, 75),
        ([], {0: 75, 1: 75}, 1, 75),  # a signal to the ranks alone
        ([], {0: 75, 1: KILL}, 0, 75),
        ([], {0: 2, 1: 75}, 0, 2),  # the second was ended by torchrun, with SIGTERM
        ([], {0: 75, 1: 1}, 1, 1),
        ([], {0: 2, 1: KILL}, 1, 137),
        ([], {0: TERM, 1: KILL}, 1, 137),
        ([], {0: TERM, 1: 65}, 1, 65),
        ([15], {1: 2}, 1, 2),
    ],
)
def test_status_of_the_job(torchrun, capsys, asked, codes, first, status) -> None:
    launcher = torchrun.Launcher()
    launcher.asked = asked
    assert launcher.status(codes, first) == status
    assert ('was killed by SIGKILL' in capsys.readouterr().err) == (status == 137)


@pytest.mark.parametrize('words', [['--work-dir', '~/run'], ['--work-dir=~/run'], ['--work_dir=/x/../run/']])
def test_the_work_folder_is_the_training_s(torchrun, monkeypatch, words) -> None:
    monkeypatch.setenv('HOME', '/home/me')
    found = torchrun.work_dir_in(['config.py', *words, '--resume'])
    assert str(found) == ('/x/../run' if '/x' in words[0] else '/home/me/run')
    assert torchrun.work_dir_in(['config.py', '--work-dir']) is None


TORCHRUN_FAILS = """
import runpy, signal, subprocess, sys, threading
from torch.distributed import run

def main(argv):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    task = subprocess.Popen([sys.executable, '-c', 'print(flush=True); input()'], **pipes)
    task.stdout.readline()
    if sys.argv[1] == 'asked':
        signal.raise_signal(signal.SIGTERM)
        task.wait()
    raise RuntimeError('the store has gone')

run.main = main
runpy.run_path(TOOL, run_name='__main__')
"""


@pytest.mark.parametrize(('said', 'status'), [('asked', 75), ('', 1)])
def test_a_machine_that_was_slower_to_end_ends_alike(said, status) -> None:
    """The first of several takes torchrun's store with it."""
    program = TORCHRUN_FAILS.replace('TOOL', repr(str(TOOLS / '_torchrun.py')))
    command = [sys.executable, '-c', program, said]
    env = {**os.environ, 'PYTHONPATH': str(TOOLS.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == status, done.stderr
    assert ('Traceback' in done.stderr) == (not said)
    assert ('stopped by SIGTERM: RuntimeError after the end of another machine' in done.stderr) == bool(said)


@pytest.mark.parametrize('missing', ['MASTER_ADDR', 'NODE_RANK'])
def test_several_machines_need_an_address_and_a_number(missing) -> None:
    env = {**os.environ, 'NNODES': '2', 'MASTER_ADDR': 'there', 'NODE_RANK': '0', 'PYTHON': sys.executable}
    del env[missing]
    command = ['bash', TOOLS / 'dist_train.sh', 'config.py', '1']
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith('error: NNODES=2: expected MASTER_ADDR') and done.stderr.count('\n') == 1
