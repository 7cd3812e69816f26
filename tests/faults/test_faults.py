"""The fault tests in their small form; ``make faults`` runs them in full."""

import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name('driver.py')


def drive(folder: Path, *options: str) -> str:
    command = [sys.executable, DRIVER, '--iterations', '20', '--launch', 'fork', '--work-dir', folder, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    'damage',
    [
        ['truncated', 'one bit'],
        pytest.param(['empty', 'garbage', 'header'], marks=pytest.mark.slow),
    ],
    ids=' '.join,
)
def test_epochs(tmp_path, damage) -> None:
    """Kills in a step, an evaluation and a write; signals; damaged checkpoints; no room on the disk."""
    said = drive(tmp_path, '--task', 'det', '--kills', '3', '--damage', *damage)
    assert 'killed 3 times (1 in step, 1 in eval, 1 in write); the end equals the undisturbed run bit for bit' in said
    for stop in ('SIGTERM in step: status 75', 'SIGUSR1 in eval: status 75', 'SIGINT in step: status 130'):
        assert stop in said
    for kind in damage:
        assert f'newest checkpoint {kind}: skipped' in said
    assert 'full disk (file size limit)' in said


def test_iterations(tmp_path) -> None:
    said = drive(tmp_path, '--task', 'seg', '--kills', '3', '--kills-only')
    assert 'killed 3 times (1 in step, 1 in eval, 1 in write); the end equals the undisturbed run bit for bit' in said
