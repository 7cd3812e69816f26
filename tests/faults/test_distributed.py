"""Two processes: they stop after the same iteration, and the death of one ends both."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 12


class Job:
    """A training of two processes, started as a user does."""

    def __init__(self, folder: Path, work_dir: str, *options: str) -> None:
        self.log, self.err = folder / f'{work_dir}.log', folder / f'{work_dir}.err'
        command = ['bash', str(ROOT / 'tools/dist_train.sh'), 'seg.py', '2', '--work-dir', work_dir, *options]
        env = {**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'}
        for name in ('PORT', 'NNODES', 'NODE_RANK', 'MASTER_ADDR'):
            env.pop(name, None)  # of this machine; two jobs on one port would collide
        with self.log.open('wb') as out, self.err.open('wb') as err:
            self.process = subprocess.Popen(
                command, cwd=folder, env=env, stdout=out, stderr=err, start_new_session=True
            )

    def ranks(self) -> list[int]:
        """Return the processes of rank 0 and 1."""
        found = {}
        for environ in Path('/proc').glob('[0-9]*/environ'):
            try:
                variables = environ.read_bytes().split(b'\0')
                parent = int((environ.parent / 'stat').read_text().rpartition(')')[2].split()[1])
            except (OSError, ValueError):
                continue
            ranks = [word[5:] for word in variables if word.startswith(b'RANK=')]
            if ranks and parent == self.process.pid:
                found[int(ranks[0])] = int(environ.parent.name)
        return [found[rank] for rank in sorted(found)]

    def reach(self, iteration: int) -> None:
        """Wait until an iteration is done."""
        deadline = time.monotonic() + 200
        while f'Iter(train) [{iteration:2d}/{ITERATIONS}]' not in self.log.read_text():
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() < deadline, self.log.read_text()[-1000:]
            time.sleep(0.05)

    def wait(self, timeout: float = 240) -> int:
        """Return the exit status."""
        return self.process.wait(timeout)

    def end(self) -> None:
        """Leave nothing running."""
        for pid in [*self.ranks(), self.process.pid]:
            if self.process.poll() is None or pid != self.process.pid:
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the data and the config."""
    folder = tmp_path_factory.mktemp('distributed')
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        import config

        config.write_config(folder, 'seg', ITERATIONS)
    return folder


@pytest.fixture
def job(folder: Path) -> Iterator:
    """Start jobs."""
    jobs = []

    def start(*args: str) -> Job:
        jobs.append(Job(folder, *args))
        return jobs[-1]

    yield start
    for each in jobs:
        each.end()


def same(one: object, two: object) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def test_stopped_and_killed_it_continues_exactly(job, folder) -> None:
    assert job('straight').wait() == 0
    stopped = job('run')
    stopped.reach(3)
    os.kill(stopped.ranks()[1], signal.SIGTERM)  # the other one learns of it from there
    assert stopped.wait() == 75, stopped.err.read_text()
    text = stopped.err.read_text()
    assert re.search(r'stopped by SIGTERM: --resume continues from \S+iter_\d+\.pth', text)
    assert 'Traceback' not in text
    killed = job('run', '--resume')
    killed.reach(8)
    os.kill(killed.ranks()[1], signal.SIGKILL)
    begin = time.monotonic()
    assert killed.wait() == 128 + signal.SIGKILL
    assert time.monotonic() - begin < 60
    assert not killed.ranks()
    text = killed.err.read_text()
    assert 'rank 1 was killed by SIGKILL' in text
    assert 'Traceback' not in text
    assert job('run', '--resume').wait() == 0
    ends = (folder / f'{name}/iter_{ITERATIONS}.pth' for name in ('straight', 'run'))
    one, two = (torch.load(end, weights_only=False) for end in ends)
    assert len(one['random_states']) == 2
    for state in (*one['random_states'], *two['random_states']):
        del state['loader']  # counts how often the dataloader was started; no sample depends on it
    for key in ('state_dict', 'ema_state_dict', 'optimizer', 'random_states', 'param_schedulers'):
        assert same(one[key], two[key]), key


@pytest.mark.slow
def test_a_signal_to_the_launcher_reaches_the_ranks(job) -> None:
    stopped = job('launcher')
    stopped.reach(1)
    stopped.process.send_signal(signal.SIGUSR1)
    assert stopped.wait() == 75, stopped.err.read_text()
    assert 'stopped by SIGUSR1' in stopped.err.read_text()


@pytest.mark.parametrize(('signum', 'status'), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_before_there_are_ranks_ends_the_launcher(job, signum, status) -> None:
    early = job(f'early_{status}')
    while not Path(f'/proc/{early.process.pid}/cmdline').read_bytes().count(b'_torchrun.py') or not handles(
        early.process.pid, signal.SIGUSR1
    ):
        assert early.process.poll() is None, early.err.read_text()
        time.sleep(0.01)
    early.process.send_signal(signum)
    assert early.wait() == status, early.err.read_text()
    assert early.err.read_text().startswith(f'stopped by {signal.Signals(signum).name} before the training began')


def handles(pid: int, signum: int) -> bool:
    """Tell whether a process has a handler for a signal."""
    caught = re.search(r'SigCgt:\s*(\w+)', Path(f'/proc/{pid}/status').read_text())
    return bool(int(caught[1], 16) >> (signum - 1) & 1)


@pytest.mark.slow
def test_a_mistake_is_said_once(job) -> None:
    """In each run of the suite under srun: test_cluster.py."""
    wrong = job('wrong', '--cfg-options', 'train_cfg.max_iter=3')
    assert wrong.wait() == 2
    text = wrong.err.read_text()
    assert text.startswith('error (rank 0): ')
    assert text.count("'max_iter'") == 1, text
    assert len(text.splitlines()) <= 2, text
