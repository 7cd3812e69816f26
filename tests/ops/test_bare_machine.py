"""``make gpu-check`` needs torch, triton, numpy and pytest alone for the ops and the backbone."""

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


LIST = """
sys.path.insert(0, ROOT)
from benchmarks import gpu_check

sys.exit(gpu_check.main(['--list']))
"""


def steps() -> list[str]:
    """The commands of the check on such a machine."""
    run = run_bare(LIST)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.splitlines()


def test_gpu_check_collects_its_tests() -> None:
    files = re.findall(r'tests/\S+\.py', '\n'.join(steps()))
    assert len(files) == len(set(files)) >= 4
    run = run_bare(COLLECT, *files)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    for file in files:
        assert f'{file}::' in run.stdout, f'{file} has no GPU test'


def test_every_gpu_test_of_ops_and_network_is_in_gpu_check() -> None:
    command = [sys.executable, '-m', 'benchmarks.gpu_check', '--list']
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    marked = [
        path.relative_to(ROOT)
        for folder in ('ops', 'nn')
        for path in sorted((ROOT / 'tests' / folder).glob('test_*.py'))
        if re.search(r'^(pytestmark = |@)pytest\.mark\.gpu', path.read_text(), re.MULTILINE)
    ]
    assert len(marked) >= 4
    assert [path for path in marked if str(path) not in listed] == []


def test_peers_are_left_out_where_timm_is_missing() -> None:
    backbone = next(line for line in steps() if line.startswith('backbone '))
    assert ' ours ' in backbone and 'convnext-t' not in backbone


def test_make_passes_interpreter_options_and_status_on(tmp_path: Path) -> None:
    if shutil.which('make') is None:
        pytest.skip('no make')
    python, log = tmp_path / 'python', tmp_path / 'log'
    python.write_text(f'#!/bin/sh\necho "$*" >> {log}\nexit 3\n')
    python.chmod(0o755)
    command = ['make', 'gpu-check', f'PYTHON={python}', 'GPU_CHECK=--resume --patience 1']
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert log.read_text().splitlines() == ['-m benchmarks.gpu_check --resume --patience 1']
    assert run.returncode != 0 and 'Error 3' in run.stderr
