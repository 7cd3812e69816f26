"""Checkpoints from strangers on every way into the commands: nothing of them runs."""

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mila_mm.cli import command as whole

TRAIN, TEST = 'train.py', 'test.py'


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """Path that hostile files try to make."""
    return tmp_path / 'executed'


@pytest.fixture
def hostile(tmp_path: Path, canary: Path) -> Path:
    """A checkpoint that makes a folder when it is unpickled."""

    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    torch.save({'state_dict': {'a': torch.ones(1)}, 'meta': {'hook_msgs': [Touch()]}}, tmp_path / 'stranger.pth')
    return tmp_path / 'stranger.pth'


@pytest.mark.parametrize('way', ['test', '--resume', 'load_from', 'init_cfg', 'init_cfg of another backbone'])
def test_nothing_runs(way, command, refused, detector, hostile, canary) -> None:
    ways: dict[str, Callable] = {
        'test': lambda: command(TEST, detector, hostile),
        '--resume': lambda: command(TRAIN, detector, '--resume', hostile),
        'load_from': lambda: command(TRAIN, detector, '--cfg-options', f'load_from={hostile}'),
        'init_cfg': lambda: command(
            TRAIN,
            detector,
            '--cfg-options',
            'model.backbone.init_cfg.type=Pretrained',
            f'model.backbone.init_cfg.checkpoint={hostile}',
        ),
        'init_cfg of another backbone': lambda: command(
            TRAIN,
            detector,
            '--cfg-options',
            'model.neck.init_cfg.type=Pretrained',
            f'model.neck.init_cfg.checkpoint={hostile}',
        ),
    }
    refused(ways[way](), 'stranger.pth', 'posix.mkdir')
    assert not canary.exists()


COMMANDS = {
    'predict': 'predict upernet_mila_nano_shapes {file} picture.png --device cpu',
    'train --pretrained': 'train upernet_mila_nano_shapes --pretrained {file} --work-dir out',
    'analyze': 'analyze upernet_mila_nano_shapes {file} --out out',
    'export': 'export upernet_mila_nano_shapes {file} --size 64 64 --format pt2',
    'weights inspect': 'weights inspect {file}',
    'weights strip': 'weights strip {file} out.pth',
    'weights export': 'weights export {file} out.pth',
    'run publish_model': 'run mmdet publish_model {file} out.pth',
}


@pytest.mark.parametrize('way', list(COMMANDS))
def test_no_command_runs_it(way, hostile, canary, shapes, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/shapes').symlink_to(shapes)
    cv2.imwrite('picture.png', np.zeros((48, 64, 3), np.uint8))
    assert whole.main(COMMANDS[way].format(file=hostile).split()) == 2
    said = capsys.readouterr().err
    assert 'stranger.pth' in said and 'posix.mkdir' in said
    assert not canary.exists() and not Path('out.pth').exists()


def test_weights_as_safetensors_and_by_name(command, detector, trained_detector, tmp_path, monkeypatch) -> None:
    from safetensors.torch import save_file

    weights = torch.load(trained_detector, weights_only=False)['state_dict']
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / 'weights.safetensors')
    ended = command(TEST, detector, tmp_path / 'weights.safetensors')
    assert ended.status == 0, ended.err
    monkeypatch.setenv('MILA_HOME', str(tmp_path))
    monkeypatch.setenv('MILA_OFFLINE', '1')
    torch.save({'state_dict': weights}, tmp_path / 'mila-mask-rcnn-tiny-3x.pth')
    ended = command(TEST, detector, 'mila://mask-rcnn-tiny-3x')
    assert ended.status == 0, ended.err
    ended = command(TEST, detector, 'mila://mask-rcnn-tiny-1x')
    assert ended.status == 2
    assert 'mila-mask-rcnn-tiny-1x.pth' in ended.err


def test_checkpoints_hold_the_random_state(trained_detector) -> None:
    state = torch.load(trained_detector, weights_only=False)['random_state']
    assert {'python', 'numpy', 'torch', 'loader'} <= set(state)
