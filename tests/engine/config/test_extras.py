"""Flags that add something to a config, and what comes of them in a training."""

from pathlib import Path

import pytest
from mmengine.config import Config

from mila_mm.engine.config import extras
from mila_mm.engine.config.extras import Extras
from mila_mm.errors import UserError


def config(**more: object) -> Config:
    return Config({'val_cfg': dict(type='ValLoop'), 'default_hooks': dict(checkpoint=dict(interval=2)), **more})


def test_nothing_asked_changes_nothing() -> None:
    cfg = config(custom_hooks=[dict(type='x')])
    before = cfg.pretty_text
    Extras().apply(cfg)
    assert cfg.pretty_text == before


def test_checkpoints() -> None:
    cfg = config()
    Extras(save_best='auto', keep=3).apply(cfg)
    assert cfg.default_hooks.checkpoint == dict(interval=2, save_best='auto', max_keep_ckpts=3)


def test_a_missing_logger_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='the package wandb is not installed: pip install wandb'):
        Extras(loggers=('wandb',)).apply(config())


def test_loggers_are_added_once() -> None:
    cfg = config(visualizer=dict(type='V', vis_backends=[dict(type='LocalVisBackend')]))
    for _ in range(2):
        Extras(loggers=('tensorboard',)).apply(cfg)
    assert [backend.type for backend in cfg.visualizer.vis_backends] == ['LocalVisBackend', 'TensorboardVisBackend']


@pytest.mark.parametrize('asked', [dict(early_stop='mIoU'), dict(save_best='mIoU')])
def test_a_metric_needs_a_validation(asked: dict) -> None:
    with pytest.raises(UserError, match='validates nothing'):
        Extras(**asked).apply(Config({}))


@pytest.mark.parametrize('name', ['coco/bbox_mAP', 'bbox_mAP'])
def test_names_of_metrics(name: str) -> None:
    assert extras.metric_key(name, {'coco/bbox_mAP': 1.0, 'coco/segm_mAP': 1.0}, '--x') == 'coco/bbox_mAP'


def test_an_unknown_metric_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r'no such metric; this validation gives coco/bbox_mAP'):
        extras.metric_key('mAP', {'coco/bbox_mAP': 1.0}, '--early-stop')


SHORT = [
    'shapes.num_train=4', 'shapes.num_val=2', 'train_cfg.max_iters=6', 'train_cfg.val_interval=1',
    'default_hooks.logger.interval=1', 'default_hooks.checkpoint.interval=1', 'train_dataloader.batch_size=2',
    'train_dataloader.num_workers=0', 'val_dataloader.num_workers=0', 'optim_wrapper.optimizer.lr=0.0',
]  # fmt: skip


def test_a_training_with_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    import torch

    from mila_mm.cli import command

    monkeypatch.chdir(tmp_path)
    assert command.main(['demo', 'seg', '--data-only', '--cfg-options', *SHORT]) == 0
    flags = ['--early-stop', 'mIoU', '--patience', '2', '--ema', '--keep', '1', '--save-best', 'mIoU']
    flags += ['--logger', 'tensorboard', '--work-dir', 'out']
    status = command.main(['train', 'upernet_mila_nano_shapes', *flags, '--cfg-options', *SHORT])
    said = capfd.readouterr()
    assert status == 0, said.err
    assert 'no better mIoU in 2 validations' in said.out + said.err
    names = sorted(path.name for path in Path('out').glob('*.pth'))
    assert len(names) == 2 and names[0].startswith('best_mIoU') and names[1] == 'iter_3.pth'
    content = torch.load(f'out/{names[1]}', weights_only=False)
    assert 'ema_state_dict' in content
    assert list(Path('out').glob('*/curves.png'))
    assert list(Path('out').glob('*/vis_data/events.*'))

    assert command.main(['weights', 'strip', f'out/{names[1]}', 'small.pth']) == 0
    small = torch.load('small.pth', weights_only=True)
    assert sorted(small) == ['meta', 'state_dict']
    assert Path('small.pth').stat().st_size < 0.5 * Path(f'out/{names[1]}').stat().st_size
    assert all(torch.equal(value, content['state_dict'][name]) for name, value in small['state_dict'].items())
    assert command.main(['weights', 'strip', 'small.pth', 'small.pth']) == 2
