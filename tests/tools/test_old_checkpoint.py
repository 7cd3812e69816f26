"""Checkpoints outlive the modules that wrote them: nothing of ours is pickled, and an old one resumes."""

import pickletools
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from mila_mm.engine.optimizers import groups
from mila_mm.weights import read_checkpoint

OLD = Path(__file__).resolve().parents[1] / 'data' / 'resume' / 'before_the_moves.pth'
CONFIG = """
_base_ = ['BASE']
data_root = ROOT
model = dict(
    data_preprocessor=dict(size=(32, 32)),
    backbone=dict(
        arch=dict(_delete_=True, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1]),
        out_indices=(0,), mlp_ratio=1.0,
    ),
    decode_head=dict(
        _delete_=True, type='FCNHead', in_channels=8, in_index=0, channels=4, num_convs=1, num_classes=7,
    ),
    auxiliary_head=None,
)
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root=data_root, serialize_data=False)
)
val_dataloader = None
val_evaluator = None
val_cfg = None
test_dataloader = None
test_evaluator = None
test_cfg = None
train_cfg = dict(max_iters=6, val_interval=100)
param_scheduler = [dict(type='CosineAnnealingLR', T_max=6, eta_min=1e-5, by_epoch=False)]
default_hooks = dict(
    logger=dict(interval=1),
    checkpoint=dict(_delete_=True, type='CheckpointHook', by_epoch=False, interval=3, max_keep_ckpts=2),
)
custom_hooks = [dict(type='EMAHook', momentum=0.1)]
"""


def pickled_names(path: Path) -> set[str]:
    """Return the 'module name' pairs that a checkpoint would import."""
    with zipfile.ZipFile(path) as file:
        (record,) = (name for name in file.namelist() if name.endswith('data.pkl'))
        return {arg for op, arg, _ in pickletools.genops(file.read(record)) if op.name == 'GLOBAL'}


def test_no_path_of_ours_is_in_a_checkpoint(trained_detector, trained_segmentor) -> None:
    for path in (trained_detector, trained_segmentor, OLD):
        names = pickled_names(path)
        assert 'collections OrderedDict' in names
        assert not {name for name in names if 'mila' in name.lower()}


def test_a_checkpoint_from_before_the_moves_resumes(command, workspace, write_config, shapes, root) -> None:
    config = CONFIG.replace('BASE', str(root / 'configs' / 'demo' / 'upernet_mila_nano_shapes.py'))
    path = write_config(workspace, config, shapes, name='small.py')
    (workspace / 'run').mkdir()
    shutil.copy(OLD, workspace / 'run' / 'iter_3.pth')
    ended = command('train.py', path, '--work-dir', 'run', '--resume')
    assert ended.status == 0, ended.err
    assert 'resumed epoch: 0, iter: 3' in max((workspace / 'run').glob('*/*.log')).read_text()
    old, new = read_checkpoint(OLD), read_checkpoint(workspace / 'run' / 'iter_6.pth')
    assert new['state_dict'].keys() == old['state_dict'].keys()
    assert new['ema_state_dict'].keys() == old['ema_state_dict'].keys()
    steps = {state['step'].item() for state in new['optimizer']['state'].values()}
    assert steps == {6.0}, 'three steps of the old run and three of this one'
    assert new['optimizer']['param_groups'][0]['lr'] == pytest.approx(1.0981e-4, rel=1e-4), 'as without a stop'
    assert all(torch.isfinite(value).all() for value in new['state_dict'].values())


def test_a_run_with_a_group_for_each_parameter_resumes_to_the_same_weights(
    command, workspace, detector, monkeypatch
) -> None:
    """As mmengine's constructor makes them; since then groups of equal settings are merged."""
    more = 'optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-3, weight_decay=0.05), '
    more += 'paramwise_cfg=dict(norm_decay_mult=0.0), clip_grad=dict(max_norm=10.0))\n'
    more += 'train_cfg = dict(max_epochs=2)\n'
    detector.write_text(detector.read_text() + more)
    with monkeypatch.context() as patch:
        patch.setattr(groups, '_equal', lambda a, b: False)
        ended = command('train.py', detector, '--work-dir', 'old')
        assert ended.status == 0, ended
    old, whole = (read_checkpoint(workspace / 'old' / f'epoch_{n}.pth') for n in (1, 2))
    assert len(old['optimizer']['param_groups']) > 100
    ended = command('train.py', detector, '--work-dir', 'new', '--resume', 'old/epoch_1.pth')
    assert ended.status == 0, ended
    new = read_checkpoint(workspace / 'new' / 'epoch_2.pth')
    assert len(new['optimizer']['param_groups']) == 2
    moved = 0
    for name, value in whole['state_dict'].items():
        limit = 1e-6 * value.abs().max().item()
        torch.testing.assert_close(new['state_dict'][name], value, rtol=1e-6, atol=limit, msg=lambda m, n=name: n + m)
        moved += not torch.equal(value, old['state_dict'][name])
    assert moved > 100
