"""``make gpu-check`` needs torch, triton, numpy and pytest alone: its programs import without anything else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('triton')

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import importlib.util, sys

HIDDEN = ('timm', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'cv2', 'scipy', 'matplotlib')

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in HIDDEN:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition('.')[0] in HIDDEN else found(name, *rest)
sys.meta_path.insert(0, Hide())
sys.path[:0] = [ROOT, ROOT + '/benchmarks']
import attention_op, backbone, block_fusions, transcription

model = backbone.trunk('tiny', 'auto', True)
model.load_state_dict(transcription.TranscribedMILA('tiny').state_dict())
"""


def test_gpu_check_imports() -> None:
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    command = [sys.executable, '-c', f'ROOT = {str(ROOT)!r}\n{PROGRAM}']
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
