"""What a run shows on the screen, and what in its log file alone."""

import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.optim import LinearLR

from mila_mm import cli
from mila_mm.cli import command
from mila_mm.engine import screen
from mila_mm.models import MILAImageClassifier

SHORT = [
    'shapes.num_train=4', 'shapes.num_val=2', 'train_cfg.max_iters=2', 'train_cfg.val_interval=2',
    'default_hooks.logger.interval=1', 'train_dataloader.batch_size=2', 'train_dataloader.num_workers=0',
    'val_dataloader.num_workers=0', 'test_dataloader.num_workers=0',
]  # fmt: skip


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('OMP_WAIT_POLICY', 'PASSIVE')

    def run(*words: str) -> list[str]:
        assert command.main(['demo', 'det', '--work-dir', 'out', *words, '--cfg-options', *SHORT]) == 0
        captured = capfd.readouterr()
        return (captured.out + captured.err).splitlines()

    return run


def test_a_run_shows_what_one_watches(demo) -> None:
    lines = demo()
    first = next(index for index, line in enumerate(lines) if 'Iter(train)' in line)
    assert first < 40
    start = '\n'.join(lines[:first])
    assert 'MaskRCNN on MILA nano, 2.8 M parameters' in start
    assert re.search(r'4 images, 6 classes, \d+ boxes', start)
    assert '2 iterations, 2 images each' in start
    assert 'writes to: ' in start
    assert 'images/s: ' in lines[first] and 'eta: ' in lines[first] and 'loss: ' in lines[first]
    text = '\n'.join(lines)
    for noise in ('OneDL', 'FileClient', 'HardDiskBackend', 'creating index', 'Warning:', 'paramwise_options'):
        assert noise not in text
    assert 'Average Precision' in text
    log = max(Path('out').glob('*/*.log'), key=lambda path: path.stat().st_size).read_text()
    for told in ('System environment', 'Hooks will be executed', 'paramwise_options', 'backbone = dict', 'Iter(train)'):
        assert told in log or told.replace(' = ', '=') in log


def test_verbose_brings_all_back(demo) -> None:
    text = '\n'.join(demo('--verbose'))
    for told in ('System environment', 'Hooks will be executed', 'paramwise_options', 'creating index'):
        assert told in text


def test_warnings_pass_before_the_first_batch() -> None:
    shown = screen.Screen()
    record = logging.LogRecord('x', logging.WARNING, '', 1, 'the backbone starts from random weights', (), None)
    assert shown.filter(record)
    record.levelno = logging.INFO
    assert not shown.filter(record)
    shown.started = True
    assert shown.filter(record)


@pytest.mark.parametrize('why', ['gradients are accumulated', 'mixed precision'])
def test_what_mmengine_says_of_its_own_order_of_steps_is_not_shown(why: str) -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scheduler = LinearLR(optimizer, start_factor=0.5, end=2)
    if why == 'mixed precision':
        optimizer.step = lambda: None  # as torch's scaler does
    for options, shown in ((['--verbose'], 1), ([], 0)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            scheduler._global_step = 0
            assert cli.execute(lambda argv: scheduler.step(), options) == 0
        assert len(seen) == shown, [str(each.message) for each in seen]


def test_a_model_without_a_backbone_is_named_by_itself() -> None:
    detector, classifier = torch.nn.Module(), MILAImageClassifier('nano', num_classes=2)
    detector.backbone = torch.nn.Identity()
    assert screen._named(classifier, {'arch': 'nano'}) == 'MILAImageClassifier nano'
    assert screen._named(detector, {'backbone': {'arch': 'tiny'}}) == 'Module on Identity tiny'
    assert screen._named(detector, {'backbone': {'arch': {'embed_dim': 8}}}) == 'Module on Identity'


def test_what_a_library_says_in_its_own_terms_is_said_in_ours(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with screen.quiet():
        logger = MMLogger('reworded', log_file=str(tmp_path / 'a.log'))
        screen.watch(logger)
        screen.screen_of(logger).started = True
        logger.error('The testing results of the whole dataset is empty.')
        logger.warning('Since `metrics` is an empty dict, the behavior to save the best checkpoint will be skipped')
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line]
    assert 'WARNING - nothing was found in any image' in line
    kept = (tmp_path / 'a.log').read_text()
    assert 'ERROR' in kept and 'results of the whole dataset is empty' in kept and 'an empty dict' in kept


def test_outside_of_quiet_nothing_changes(tmp_path: Path) -> None:
    logger = MMLogger('screen-test', log_file=str(tmp_path / 'a.log'))
    screen.watch(logger)
    assert screen.screen_of(logger) is None
    with screen.quiet(verbose=True):
        screen.watch(logger)
        assert screen.screen_of(logger) is None
    with screen.quiet():
        screen.watch(logger)
        assert screen.screen_of(logger) is not None


GONE = """
import logging, sys
from mmengine.logging import MMLogger
from mila_mm.engine import screen

with screen.quiet():
    logger = MMLogger('gone', log_file='a.log')
    screen.watch(logger)
    screen.screen_of(logger).started = True
    from pycocotools import coco
    for step in range(3):
        logger.info(f'step {step}')
        coco.print(f'AP {step}')
        sys.stdout.flush() if step else None
print('on', file=sys.stderr)
"""


def test_a_run_outlives_its_reader(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command_line = [sys.executable, '-c', GONE]
    done = subprocess.run(command_line, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, 'on\n')
    assert 'step 2' in (tmp_path / 'a.log').read_text()
