"""mmengine's checkpoint loaders, init_cfg and the zoos read through ours."""

from collections import OrderedDict

import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader

from mila_mm import MILA
from mila_mm.errors import UserError
from mila_mm.weights import (
    CheckpointError,
    MismatchError,
)
from mila_mm.weights.names import rope_tables


def edited(classifier, **changes):
    weights = OrderedDict(classifier)
    for name, value in changes.items():
        if value is None:
            del weights[name.replace('__', '.')]
        else:
            weights[name.replace('__', '.')] = value
    return {'model': weights}


def test_init_cfg_by_name_without_a_network(home, published_bytes, classifier, micro, monkeypatch, log, assert_holds):
    home.mkdir()
    (home / 'mila-tiny-in1k.pth').write_bytes(published_bytes)
    monkeypatch.setenv('MILA_OFFLINE', '1')
    model = MODELS.build(
        dict(type='mila_mm.MILA', **micro, init_cfg=dict(type='Pretrained', checkpoint='mila://tiny-in1k'))
    )
    model.init_weights()
    assert_holds(model, classifier)
    assert any(text.startswith('mila://tiny-in1k: ') and 'tensors loaded; 8 start fresh' in text for _, text in log)
    assert any('Pretrained: load from mila://tiny-in1k' in text for _, text in log)


def test_init_cfg_is_strict_unless_told(file, classifier, micro):
    path = str(file(edited(classifier, layers__0__blocks__0__cpe1__bias=None)))
    with pytest.raises(MismatchError):
        MILA(**micro, init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights()
    MILA(**micro, init_cfg=dict(type='Pretrained', checkpoint=path, strict=False)).init_weights()
    MILA(
        **micro,
        in_channels=4,
        init_cfg=dict(type='Pretrained', checkpoint=str(file({'model': classifier})), adapt_in_channels=True),
    ).init_weights()
    with pytest.raises(UserError, match='unknown option stric;'):
        MILA(**micro, init_cfg=dict(type='Pretrained', checkpoint=path, stric=False)).init_weights()
    with pytest.raises(UserError, match='expected a checkpoint'):
        MILA(**micro, init_cfg=dict(type='Pretrained')).init_weights()


def test_init_cfg_beside_others(file, published, classifier, micro, assert_holds):
    model = MILA(
        **micro,
        init_cfg=[
            dict(type='Constant', layer='LayerNorm', val=0.5),
            dict(type='Pretrained', checkpoint=str(file(published))),
        ],
    )
    model.init_weights()
    assert_holds(model, classifier)
    assert model.norm0.weight.eq(0.5).all()
    assert [cfg['type'] for cfg in model.init_cfg] == ['Constant', 'Pretrained']
    model.init_weights()  # a second call loads nothing again


def test_loaders_of_mmengine_are_ours_for_every_prefix():
    for address in (
        'x.pth',
        '/x.pth',
        'mila://a',
        'http://a/x',
        'https://a/x',
        'torchvision://a',
        'modelzoo://a',
        'open-mmlab://a',
        'openmmlab://a',
        'mmcls://a',
        's3://a/b',
        'c:s3://a/b',
        'petrel://a',
        'pavi://a',
    ):
        assert CheckpointLoader._get_checkpoint_loader(address).__module__ == 'mila_mm.weights.loaders', address
    assert all(loader.__module__ == 'mila_mm.weights.loaders' for loader in CheckpointLoader._schemes.values())


def test_loaders_of_mmengine_give_our_names(file, dense, published, server, published_bytes, home, detector):
    weights = detector(dense)
    weights.update(rope_tables(weights, 'backbone.', 224))
    read = CheckpointLoader.load_checkpoint(str(file({'state_dict': weights, 'meta': {'config': 'x', 'epoch': 1}})))
    assert set(read['state_dict']) == set(detector(dense))
    assert read['meta'] == {'config_text': 'x', 'epoch': 1}
    server.put('/a.pth', body=published_bytes)
    read = CheckpointLoader.load_checkpoint(server.base + '/a.pth')
    assert 'layers.0.blocks.0.attn.rope.rotations' not in read['state_dict']
    assert 'model' not in read
    foreign = {'conv1.weight': torch.ones(1), 'fc.bias': torch.ones(1)}
    assert CheckpointLoader.load_checkpoint(str(file(foreign))) == foreign
    assert CheckpointLoader.load_checkpoint(str(file([1, 2]))) == [1, 2]
    with pytest.raises(FileNotFoundError):
        CheckpointLoader.load_checkpoint('/no/such/file.pth')
    with pytest.raises(CheckpointError, match='no such model in that zoo'):
        CheckpointLoader.load_checkpoint('torchvision://resnet5000')
    with pytest.raises(CheckpointError, match='pavi'):
        CheckpointLoader.load_checkpoint('pavi://a')


def test_zoos_are_read_safely(server, home, monkeypatch):
    weights = {'backbone.conv1.weight': torch.ones(2), 'head.fc.bias': torch.ones(1)}
    import io

    raw = io.BytesIO()
    torch.save({'state_dict': weights}, raw)
    server.put('/resnet-x.pth', body=raw.getvalue())
    for function in ('get_mmcls_models', 'get_torchvision_models', 'get_external_models'):
        monkeypatch.setattr(f'mmengine.runner.checkpoint.{function}', lambda: {'x': server.base + '/resnet-x.pth'})
    read = CheckpointLoader.load_checkpoint('mmcls://x')
    assert list(read['state_dict']) == ['conv1.weight']
    for scheme in ('torchvision', 'open-mmlab'):
        assert list(CheckpointLoader.load_checkpoint(f'{scheme}://x')['state_dict']) == list(weights)
