"""``make gpu-check`` needs torch, triton, numpy and pytest alone, and goes through to its end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('triton')

ROOT = Path(__file__).resolve().parents[2]
BARE = """
import importlib.util, sys

HIDDEN = ('timm', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'cv2', 'scipy', 'matplotlib',
          'hypothesis')

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in HIDDEN:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition('.')[0] in HIDDEN else found(name, *rest)
sys.meta_path.insert(0, Hide())
"""
BENCHMARKS = """
sys.path.insert(0, ROOT)
from benchmarks import attention_op, backbone, block_fusions, report, transcription

model = backbone.trunk('tiny', 'auto', True)
model.load_state_dict(transcription.TranscribedMILA('tiny').state_dict())
"""
COLLECT = """
import pytest
sys.path.insert(0, ROOT)
sys.exit(pytest.main(['--collect-only', '-q', '-m', 'gpu', '-p', 'no:cacheprovider', *sys.argv[1:]]))
"""


def run_bare(program: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a program that finds nothing but what such a machine has."""
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    env['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'
    command = [sys.executable, '-c', f'ROOT = {str(ROOT)!r}\n{BARE}{program}', *argv]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_gpu_check_imports() -> None:
    run = run_bare(BENCHMARKS)
    assert run.returncode == 0, run.stderr[-2000:]


def make_gpu_check(python: Path | str, *options: str) -> subprocess.CompletedProcess[str]:
    if shutil.which('make') is None:
        pytest.skip('no make')
    return subprocess.run(
        ['make', *options, 'gpu-check', f'PYTHON={python}', 'BENCHMARK_FLAGS=--resume'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_gpu_check_collects_its_tests() -> None:
    files = re.findall(r'tests/\S+\.py', make_gpu_check('python', '-n').stdout)
    assert len(files) == len(set(files)) >= 4
    run = run_bare(COLLECT, *files)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    for file in files:
        assert f'{file}::' in run.stdout, f'{file} has no GPU test'


def test_every_gpu_test_of_the_ops_is_in_gpu_check() -> None:
    listed = make_gpu_check('python', '-n').stdout
    marked = [
        path
        for path in sorted(Path(__file__).parent.glob('test_*.py'))
        if re.search(r'^(pytestmark = |@)pytest\.mark\.gpu', path.read_text(), re.MULTILINE)
    ]
    assert len(marked) >= 4
    assert [path.name for path in marked if f'tests/ops/{path.name}' not in listed] == []


def test_gpu_check_goes_on_after_a_failure(tmp_path: Path) -> None:
    python, log = tmp_path / 'python', tmp_path / 'log'
    # The tests end with 1, the third benchmark with 3.
    cases = '*pytest*) exit 1;; *block_fusions*) exit 3;;'
    python.write_text(f'#!/bin/sh\necho "$*" >> {log}\ncase "$*" in {cases} esac\n')
    python.chmod(0o755)
    run = make_gpu_check(python)
    # Those with -c ask what is installed; this python finds everything.
    steps = [line.removeprefix('-m ') for line in log.read_text().splitlines() if line.startswith('-m')]
    assert [step.split()[0] for step in steps] == [
        'pytest',
        'benchmarks.backbone',
        'benchmarks.attention_op',
        'benchmarks.block_fusions',
        'benchmarks.detector_step',
    ]
    assert all(step.endswith(' --resume') for step in steps[1:4])
    assert run.returncode != 0 and 'Error 3' in run.stderr
    assert 'tests/ops/test_attention_gpu.py' in run.stderr and re.search(
        r'benchmarks.block_fusions .*--resume ended with 3', run.stderr
    )
