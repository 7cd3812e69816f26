"""``tools/demo.py``: with a schedule of a few iterations it goes through all that the demo goes through."""

import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from mila_mm.datasets import ADE_CLASSES, COCO_CLASSES
from mila_mm.engine import load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {'det': 'mask_rcnn_mila_nano_shapes.py', 'seg': 'upernet_mila_nano_shapes.py'}
SHORT = [
    'shapes.num_train=8', 'shapes.num_val=3',
    'train_cfg.max_iters=2', 'train_cfg.val_interval=1',
    'default_hooks.logger.interval=1', 'default_hooks.checkpoint.interval=2',
    'train_dataloader.batch_size=2', 'train_dataloader.num_workers=0',
    'val_dataloader.num_workers=0', 'test_dataloader.num_workers=0',
]  # fmt: skip


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch):
    # Set by the demo where it is absent
    monkeypatch.setenv('OMP_WAIT_POLICY', os.environ.get('OMP_WAIT_POLICY', 'PASSIVE'))


@pytest.mark.parametrize(
    ('task', 'names'), [('det', ['box AP50', 'mask AP50', 'box AP', 'mask AP']), ('seg', ['mIoU (%)'])]
)
def test_it_trains_tests_and_draws(command, workspace, task, names):
    ended = command('demo.py', task, '--work-dir', 'out', '--data-root', 'elsewhere/set', '--cfg-options', *SHORT)
    assert ended.status == 0, ended.err
    assert sorted(path.name for path in workspace.iterdir()) == ['elsewhere', 'out']
    for name in ('predictions.png', 'curves.png'):
        picture = cv2.imread(f'out/{name}')
        assert np.ptp(picture) > 200
        assert f'out/{name}' in ended.out
    assert (workspace / 'out' / 'iter_2.pth').is_file()
    # The figures at the end are those that the library printed in its own words before
    summary = ended.out[ended.out.rindex('held-out images:') :]
    last = next(line for line in reversed(ended.out.splitlines()) if 'Iter(test)' in line and 'data_time' in line)
    key = {'det': 'coco/bbox_mAP_50', 'seg': 'mIoU'}[task]
    measured = float(re.search(rf'{key}: ([0-9.]+)', last)[1])
    for name in names:
        assert re.search(rf'{re.escape(name)} +[0-9]+\.[0-9]+', summary)
    assert float(re.search(rf'{re.escape(names[0])} +([0-9.]+)', summary)[1]) == pytest.approx(measured, abs=6e-4)


def test_it_writes_the_set_alone(command, workspace):
    ended = command('demo.py', 'seg', '--data-only', '--cfg-options', 'shapes.num_train=2', 'shapes.num_val=1')
    assert ended.status == 0, ended.err
    assert (workspace / 'data' / 'shapes' / 'annotations' / 'instances_val.json').is_file()
    assert not (workspace / 'work_dirs').exists()


def test_a_folder_in_the_way_is_one_line(command, workspace):
    (workspace / 'mine').mkdir()
    (workspace / 'mine' / 'file').write_text('x')
    ended = command('demo.py', 'det', '--data-root', 'mine')
    assert ended.status == 2
    assert ended.err.startswith('error: mine exists and is not a shapes set')
    assert len(ended.err.strip().splitlines()) == 1


def test_an_argument_of_the_set_out_of_range_is_a_user_error(command, workspace):
    ended = command('demo.py', 'det', '--cfg-options', 'shapes.size=8')
    assert ended.status == 2
    assert 'size must be a whole number from 32' in ended.err
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize('task', CONFIGS)
def test_the_configs_name_the_classes_of_the_set(task):
    cfg = load_config(str(ROOT / 'configs' / 'demo' / CONFIGS[task]))
    classes = {'det': COCO_CLASSES, 'seg': ADE_CLASSES}[task]
    for stage in ('train', 'val', 'test'):
        metainfo = cfg[f'{stage}_dataloader'].dataset.metainfo
        assert tuple(metainfo.classes) == classes
        assert len(metainfo.palette) == len(classes)
    heads = {'det': lambda m: [m.roi_head.bbox_head, m.roi_head.mask_head],
             'seg': lambda m: [m.decode_head, m.auxiliary_head]}  # fmt: skip
    assert {head.num_classes for head in heads[task](cfg.model)} == {len(classes)}
    # Measured on images that were never trained on
    train, test = cfg.train_dataloader.dataset, cfg.test_dataloader.dataset
    for prefix in train.data_prefix:
        assert 'training' in train.data_prefix[prefix]
        assert 'validation' in test.data_prefix[prefix]
