"""Where the weights of a new run come from, and whether the log says so."""

import pytest
import torch
from mmengine.config import Config

from mila_mm import MILA
from mila_mm.engine.training import nothing_to_resume, starts_from_scratch, use_pretrained
from mila_mm.errors import UserError


def test_backbone_starts_from_the_given_file(command, detector, workspace) -> None:
    torch.manual_seed(5)
    given = MILA('nano').state_dict()
    torch.save({'model': given}, workspace / 'backbone.pth')
    (workspace / 'run').mkdir()
    ended = command(
        'train.py',
        detector,
        '--resume',
        '--pretrained',
        workspace / 'backbone.pth',
        '--work-dir',
        workspace / 'run',
        '--cfg-options',
        'optim_wrapper.optimizer.lr=0.0',
    )
    assert ended.status == 0, ended.err
    log = next((workspace / 'run').rglob('*.log')).read_text()
    assert log.index('starts anew') > log.index('Checkpoints will be saved'), 'after the noise of the start'
    trained = torch.load(workspace / 'run' / 'epoch_1.pth', weights_only=False)['state_dict']
    parameters = [k for k, _ in MILA('nano').named_parameters()]
    assert all(torch.equal(trained[f'backbone.{k}'], given[k]) for k in parameters)


def test_a_missing_file_is_refused(command, detector, workspace, refused) -> None:
    refused(command('train.py', detector, '--pretrained', 'nowhere.pth'), 'nowhere.pth')
    assert not (workspace / 'work_dirs').exists()


def config(**backbone: object) -> Config:
    return Config(dict(model=dict(backbone=dict(type='mila_mm.MILA', **backbone))))


@pytest.mark.parametrize(
    ('cfg', 'says'),
    [
        (config(arch='small'), 'mila://small-in1k'),
        (config(), 'mila://tiny-in1k'),
        (config(arch='nano'), None),
        (config(arch='tiny', init_cfg=dict(type='Pretrained', checkpoint='x')), None),
        (Config(dict(model=dict(backbone=dict(type='ResNet')))), None),
    ],
    ids=['small', 'default', 'nano', 'pretrained', 'other'],
)
def test_random_weights_are_announced(cfg, says) -> None:
    notice = starts_from_scratch(cfg)
    assert (notice is None) == (says is None)
    assert says is None or says in notice


def test_another_backbone_is_refused() -> None:
    with pytest.raises(UserError, match=r'expected a backbone of type mila_mm\.MILA, got ResNet'):
        use_pretrained(Config(dict(model=dict(backbone=dict(type='ResNet')))), 'mila://tiny-in1k')


def test_resuming_nothing_is_announced(tmp_path) -> None:
    cfg = Config(dict(model=dict(backbone=dict(type='mila_mm.MILA')), resume=True, work_dir=str(tmp_path)))
    assert 'holds no checkpoint' in nothing_to_resume(cfg) and 'mila://tiny-in1k' in starts_from_scratch(cfg)
    (tmp_path / 'last_checkpoint').write_text('epoch_1.pth')
    assert nothing_to_resume(cfg) is None and starts_from_scratch(cfg) is None


def test_needs_a_backbone() -> None:
    with pytest.raises(UserError, match=r'no model\.backbone'):
        use_pretrained(Config(dict(model=dict(type='X'))), 'a.pth')
