"""Loading: as published, completely, with a report; or an error that lists what differs."""

import argparse
import json
import logging
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader

from mila_mm import MILA
from mila_mm.errors import UserError
from mila_mm.weights import (
    CheckpointError,
    MismatchError,
    load_backbone,
    load_model,
    read_checkpoint,
    read_file,
    to_project,
    to_released,
)
from mila_mm.weights.exporting import export
from mila_mm.weights.names import backbone_prefix, describe, rope_tables

NORMS = [f'norm{i}.{what}' for i in range(4) for what in ('weight', 'bias')]


@pytest.fixture
def file(tmp_path):
    """Save content and return the path."""

    def save(content, name='file.pth', **kwargs):
        torch.save(content, tmp_path / name, **kwargs)
        return tmp_path / name

    return save


@pytest.fixture
def model(micro):
    return MILA(**micro)


@pytest.fixture
def log(monkeypatch):
    """Lines logged to mmengine's logger."""
    lines = []

    class Collect(logging.Handler):
        def emit(self, record):
            lines.append((record.levelname, record.getMessage()))

    handler = Collect()
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def detector(dense, **heads):
    weights = OrderedDict((f'backbone.{name}', value) for name, value in dense.items())
    weights.update({name.replace('__', '.'): value for name, value in heads.items()})
    return weights


def assert_holds(module, weights, prefix=''):
    own = module.state_dict()
    for name, value in weights.items():
        if prefix + name in own:
            torch.testing.assert_close(own[prefix + name], value, rtol=0, atol=0)


def test_classifier_as_published(file, published, classifier, model, log):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_backbone(model, file(published))
    assert report.complete
    assert report.loaded == len(before) - 8
    assert_holds(model, classifier)
    ((why, fresh),) = report.fresh.items()
    assert fresh == NORMS
    assert 'classifier has no norms' in why
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in fresh)
    dropped = {name for names in report.dropped.values() for name in names}
    assert {'norm.weight', 'norm.bias', 'head.weight', 'head.bias'} < dropped
    assert {name for name in dropped if 'rope' in name} == {name for name in classifier if 'rope' in name}
    assert [level for level, _ in log] == ['INFO']
    assert f'{report.loaded} tensors loaded; 8 start fresh (norm0.weight' in log[0][1]


@pytest.mark.parametrize('layout', ['model', 'state_dict', 'bare', 'safetensors', 'legacy', 'module.', 'detector'])
def test_every_layout(layout, file, dense, model, tmp_path):
    weights = detector(dense) if layout == 'detector' else dense
    if layout == 'module.':
        weights = {f'module.{name}': value for name, value in dense.items()}
    if layout == 'safetensors':
        from safetensors.torch import save_file

        path = tmp_path / 'file.safetensors'
        save_file(dict(dense), path)
    else:
        content = weights if layout == 'bare' else {'model' if layout == 'model' else 'state_dict': weights}
        path = file(content, _use_new_zipfile_serialization=layout != 'legacy')
    report = load_backbone(model, path)
    assert report.complete
    assert not report.fresh
    assert report.loaded == len(dense)
    assert_holds(model, dense)


def test_heads_of_a_detector_are_left_out_of_the_backbone(file, dense, model):
    weights = detector(dense, neck__conv__weight=torch.ones(2), rpn_head__rpn_cls__bias=torch.ones(3))
    for prefix in (None, 'backbone', 'backbone.'):
        report = load_backbone(model, file({'state_dict': weights}), prefix=prefix)
        assert report.loaded == len(dense)
        assert ['neck.conv.weight', 'rpn_head.rpn_cls.bias'] in report.dropped.values()
    with pytest.raises(CheckpointError, match=r"no key starts with 'encoder\.'"):
        load_backbone(model, file({'state_dict': weights}), prefix='encoder')


def edited(classifier, **changes):
    weights = OrderedDict(classifier)
    for name, value in changes.items():
        if value is None:
            del weights[name.replace('__', '.')]
        else:
            weights[name.replace('__', '.')] = value
    return {'model': weights}


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'layers__0__blocks__0__cpe1__bias': None}, '1 missing: layers.0.blocks.0.cpe1.bias'),
        ({'layers__0__blocks__0__new__bias': torch.ones(3)}, '1 unexpected: layers.0.blocks.0.new.bias'),
        ({'layers__0__blocks__0__cpe1__bias': torch.ones(17)}, 'layers.0.blocks.0.cpe1.bias: file (17,), model (16,)'),
        ({'layers__0__blocks__0__cpe1__bias': torch.ones(16, dtype=torch.int64)}, 'file int64, model float32'),
        ({'layers__0__blocks__0__cpe1__bias': torch.ones(16, dtype=torch.complex64)}, 'file complex64, model float32'),
        ({'patch_embed__conv1__norm__num_batches_tracked': torch.tensor(1.5)}, 'file float32, model int64'),
        ({'norm0__weight': torch.ones(16)}, '7 missing: norm0.bias'),
        ({'layers__2__blocks__2__cpe1__bias': torch.ones(64)}, 'depths 1 1 3 1'),
        ({'norm9__weight': torch.ones(16)}, '1 unexpected: norm9.weight'),
        ({'norm__extra': torch.ones(16)}, '1 unexpected: norm.extra'),
        ({'normal__weight': torch.ones(16)}, '1 unexpected: normal.weight'),
        ({'head2__weight': torch.ones(16)}, '1 unexpected: head2.weight'),
        ({'head__extra': torch.ones(16)}, '1 unexpected: head.extra'),
        ({'rope__rotations': torch.ones(16)}, '1 unexpected: rope.rotations'),
    ],
    ids=[
        'missing',
        'unexpected',
        'shape',
        'integers',
        'complex',
        'fractional count',
        'one norm only',
        'another block',
        'tenth norm',
        'part of a norm',
        'like a norm',
        'second head',
        'part of a head',
        'like a table',
    ],
)
def test_what_differs_is_an_error_that_lists_it(file, classifier, model, changes, words):
    path = file(edited(classifier, **changes))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MismatchError, match=re.escape(words)) as caught:
        load_backbone(model, path)
    assert str(path) in str(caught.value)
    assert not caught.value.report.complete
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # all or nothing
    report = load_backbone(model, path, strict=False)
    assert (report.missing, report.unexpected) == (caught.value.report.missing, caught.value.report.unexpected)
    assert report.loaded > 150


def test_file_without_one_count_of_batches_changes_nothing(file, classifier, model):
    path = file(edited(classifier, patch_embed__conv1__norm__num_batches_tracked=None))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(MismatchError, match=r'1 missing: patch_embed\.conv1\.norm\.num_batches_tracked'):
        load_backbone(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_of_another_arch_say_which(file, published, model):
    with pytest.raises(
        MismatchError,
        match=r'The file is of MILA custom \(width 16, depths 1 1 2 1\), '
        r'the model is MILA nano \(width 32, depths 1 1 2 1\)',
    ):
        load_backbone(MILA('nano'), file(published))
    other = {'state_dict': {'conv1.weight': torch.ones(64, 3, 7, 7), 'fc.bias': torch.ones(1000)}}
    with pytest.raises(MismatchError, match='no MILA in the file'):
        load_backbone(model, file(other))


def test_not_weights_at_all(file, model):
    for content in ([1, 2], {'epoch': 3}, {'model': {}}, {'model': [1]}, 5, {'state_dict': {'a': 1}}):
        with pytest.raises(CheckpointError):
            load_backbone(model, file(content))


@pytest.mark.parametrize('out_indices', [(0,), (1, 2), (3,), (2, 0)])
def test_stages_that_are_not_built_are_left_out_by_name(file, published, dense, micro, out_indices):
    last = max(out_indices)
    for content in (published, {'state_dict': dense}):
        model = MILA(**micro, out_indices=out_indices)
        report = load_backbone(model, file(content))
        assert report.complete
        idle = [
            name
            for names in report.dropped.values()
            for name in names
            if name.startswith('layers') and 'rope' not in name
        ]
        assert all(int(name.split('.')[1]) > last or f'layers.{last}.downsample' in name for name in idle)
        assert bool(idle) == (last < 3)
        assert_holds(model, content.get('model', dense))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_are_cast_and_reported(file, dense, model, dtype):
    weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in dense.items()}
    report = load_backbone(model, file({'state_dict': weights}))
    assert len(report.cast) == sum(value.is_floating_point() for value in dense.values())
    assert next(iter(model.parameters())).dtype == torch.float32
    assert 'cast' in str(report)


def test_nan_and_infinity_are_named(file, classifier, model, log):
    changed = classifier['layers.1.blocks.0.in_proj.weight'].clone()
    changed[3, 5] = float('nan')
    bias = torch.full((16,), 3e38)  # finite, though its sum is not
    weights = edited(
        classifier,
        layers__1__blocks__0__in_proj__weight=changed,
        layers__0__blocks__0__cpe1__bias=bias,
        layers__3__blocks__0__cpe1__bias=torch.full((128,), float('-inf')),
    )
    report = load_backbone(model, file(weights))
    assert report.nonfinite == ['layers.1.blocks.0.in_proj.weight', 'layers.3.blocks.0.cpe1.bias']
    warnings = [text for level, text in log if level == 'WARNING']
    assert len(warnings) == 1
    assert 'layers.1.blocks.0.in_proj.weight' in warnings[0]


@pytest.mark.parametrize('channels', [1, 2, 4, 6])
def test_other_input_channels_need_the_option(file, published, micro, channels):
    model, three = MILA(**micro, in_channels=channels), MILA(**micro)
    with pytest.raises(MismatchError, match='adapt_in_channels=True'):
        load_backbone(model, file(published))
    report = load_backbone(model, file(published), adapt_in_channels=True)
    assert report.adapted == [f'patch_embed.conv1.conv.weight: 3 to {channels} input channels']
    load_backbone(three, file(published))
    grey = torch.rand(1, 1, 32, 32)
    with torch.no_grad():  # a grey image means the same to both
        for ours, theirs in zip(
            model.eval()(grey.expand(1, channels, 32, 32)), three.eval()(grey.expand(1, 3, 32, 32)), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_whole_model_given_a_backbone_says_where_it_belongs(file, published, model):
    whole = torch.nn.Module()
    whole.backbone = model
    whole.neck = torch.nn.Linear(2, 2)
    with pytest.raises(MismatchError, match=r'model\.backbone\.init_cfg'):
        load_model(whole, file(published))


def test_whole_model_with_leftovers_of_training(file, dense, model):
    whole = torch.nn.Module()
    whole.backbone = model
    whole.neck = torch.nn.Linear(2, 2)
    weights = detector(dense, neck__weight=torch.ones(2, 2), neck__bias=torch.ones(2))
    weights.update(rope_tables(weights, 'backbone.', 224))
    averages = {'ema_' + name.replace('.', '_'): value for name, value in weights.items()}
    report = load_model(whole, file({'meta': {'CLASSES': ('a',)}, 'state_dict': {**weights, **averages}}))
    assert report.complete
    assert report.loaded == len(dense) + 2
    assert {len(names) for names in report.dropped.values()} == {5, len(weights)}
    assert_holds(whole, weights)


def test_counts_that_old_pytorch_did_not_write(file, dense, model):
    old = {name: value for name, value in dense.items() if 'num_batches' not in name}
    report = load_backbone(model, file({'state_dict': old}))
    assert report.complete
    assert 'files of old PyTorch do not count batches' in report.fresh
    first = next(name for name in dense if 'num_batches' in name)
    with pytest.raises(MismatchError, match=f'1 missing: {first}'):
        load_backbone(model, file({'state_dict': {name: value for name, value in dense.items() if name != first}}))


def test_names_go_both_ways(classifier, dense):
    renamed, dropped = to_project(classifier)
    assert set(renamed) | {name for names in dropped.values() for name in names} == set(classifier)
    back = to_released(renamed, image_size=64)
    assert list(back) == ['model']
    assert set(back['model']) == set(classifier)
    for name, value in classifier.items():
        torch.testing.assert_close(back['model'][name], value, rtol=0, atol=0)
    whole = detector(dense)
    assert list(to_released(whole)) == ['state_dict']
    assert to_project(to_released(whole, image_size=224)['state_dict'])[0] == whole
    with pytest.raises(UserError, match='no MILA'):
        to_released({'conv1.weight': torch.ones(1)})
    with pytest.raises(UserError, match='multiple of 32'):
        to_released(whole, image_size=100)


def test_rope_tables_turn_like_the_model_does(classifier):
    """Rows turn the first half of the pairs, columns the second, at 10000 ** (-j / (C / 4))."""
    table = classifier['layers.1.blocks.0.attn.rope.rotations']
    assert table.shape == (8, 8, 16, 2)
    for row, column, pair in ((0, 0, 0), (3, 5, 2), (7, 1, 7), (2, 6, 8), (5, 4, 15)):
        angle = (row if pair < 8 else column) * 10000 ** (-(pair % 8) / 8)
        np.testing.assert_allclose(table[row, column, pair], [np.cos(angle), np.sin(angle)], atol=2e-6)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.sampled_from(['neck.a.weight', 'head.fc.bias', 'ema_x', 'layers.9.y', 'module.z', 'rope.rotations']),
        unique=True,
    ),
    st.sampled_from(['', 'backbone.', 'a.b.']),
)
def test_foreign_names_come_back_unchanged(names, prefix):
    weights = {prefix + name: torch.ones(1) for name in names}
    weights['anchor'] = torch.ones(1)  # no wrapper holds them all
    renamed, dropped = to_project(weights)
    assert list(renamed) == list(weights)
    assert not dropped
    assert backbone_prefix(renamed) is None


def test_archs_are_named(dense):
    assert describe(dense) == 'MILA custom (width 16, depths 1 1 2 1)'
    assert describe(MILA('tiny').state_dict()) == 'MILA tiny (width 64, depths 2 4 8 4)'
    assert describe(MILA('base', out_indices=(0, 1)).state_dict()) == 'MILA base (width 96, depths 3 6)'


@pytest.mark.parametrize('new_format', [True, False])
def test_leftovers_of_training_scripts_become_plain(file, dense, new_format):
    hub = MessageHub('weights-test')
    hub.update_scalar('train/loss', 2.0)
    hub.update_scalar('train/loss', 4.0)
    hub.update_info('iter', 7)
    hub.update_info('palette', np.array([[1, 2], [3, 4]], dtype=np.uint8, order='F'))
    content = {
        'model': dense,
        'args': argparse.Namespace(lr=0.1, output=Path('/a/b'), nested=argparse.Namespace(x=1)),
        'config': ConfigDict(a=1, b=dict(c=[1, 2])),
        'full': Config(dict(z=dict(y=2))),
        'max_accuracy': np.float64(83.5),
        'wide': np.arange(3, dtype='>i4'),
        'flag': np.bool_(True),
        'name': np.str_('abc'),
        'message_hub': hub.state_dict(),
        'whole_hub': hub,
        'seen': {1, 2},
        'random': np.random.get_state(),
    }
    read = read_file(file(content, _use_new_zipfile_serialization=new_format))
    assert read['args'] == {'lr': 0.1, 'output': '/a/b', 'nested': {'x': 1}}
    assert read['config'] == {'a': 1, 'b': {'c': [1, 2]}}
    assert read['full'] == {'z': {'y': 2}}
    assert (read['max_accuracy'], read['flag'], read['name'], read['seen']) == (83.5, True, 'abc', {1, 2})
    assert type(read['max_accuracy']) is np.float64
    np.testing.assert_array_equal(read['wide'], [0, 1, 2])
    np.testing.assert_array_equal(read['random'][1], content['random'][1])
    for stored in (read['message_hub'], read['whole_hub']):
        assert type(stored['log_scalars']['train/loss']) is HistoryBuffer
        assert stored['log_scalars']['train/loss'].mean() == 3.0
        assert stored['runtime_info']['iter'] == 7
        np.testing.assert_array_equal(stored['runtime_info']['palette'], [[1, 2], [3, 4]])
        MessageHub('weights-test-back').load_state_dict(stored)


def test_yacs_config_as_the_released_code_saves_it(file, dense, monkeypatch):
    """yacs itself is not needed: its class is made here, under its name."""
    import sys
    import types

    class CfgNode(dict):
        def __init__(self, content):
            super().__init__({k: CfgNode(v) if isinstance(v, dict) else v for k, v in content.items()})
            self.__dict__.update({'__immutable__': True, '__deprecated_keys__': set()})

    CfgNode.__module__, CfgNode.__qualname__ = 'yacs.config', 'CfgNode'
    module = types.ModuleType('yacs.config')
    module.CfgNode = CfgNode
    monkeypatch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    path = file({'model': dense, 'config': CfgNode({'MODEL': {'TYPE': 'mlla', 'DEPTHS': [2, 4]}, 'EPOCHS': 300})})
    monkeypatch.delitem(sys.modules, 'yacs.config')
    assert read_file(path)['config'] == {'MODEL': {'TYPE': 'mlla', 'DEPTHS': [2, 4]}, 'EPOCHS': 300}


def test_entry_can_be_chosen(file, dense, model):
    averaged = {name: value * 2 if value.is_floating_point() else value for name, value in dense.items()}
    path = file({'model': dense, 'state_dict_ema': averaged})
    load_backbone(model, path)
    assert_holds(model, dense)
    load_backbone(model, path, key='state_dict_ema')
    assert_holds(model, averaged)
    with pytest.raises(CheckpointError, match='expected a dict with state_dict_emma, found model, state_dict_ema'):
        load_backbone(model, path, key='state_dict_emma')


# Through init_cfg and through mmengine's loaders


def test_init_cfg_by_name_without_a_network(home, published_bytes, classifier, micro, monkeypatch, log):
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


def test_init_cfg_beside_others(file, published, classifier, micro):
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


def test_loaders_of_mmengine_give_our_names(file, dense, published, server, published_bytes, home):
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


# Export


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_export_writes_what_the_released_code_loads(file, published, classifier, tmp_path, suffix):
    out = tmp_path / f'out{suffix}'
    export(file(published), out, image_size=64)
    content = read_file(out)
    assert ('model' if suffix == '.pth' else 'state_dict') in content
    weights = content.get('model') or content['state_dict']
    assert set(weights) == set(classifier)
    assert all(torch.equal(weights[name], value) for name, value in classifier.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file.pth', out.name]
    if suffix == '.pth':  # by anyone, without our reader
        assert list(torch.load(out, weights_only=True)) == ['model']


def test_export_of_a_part_and_of_shared_memory(file, dense, tmp_path, micro):
    block = torch.arange(10.0)
    weights = detector(dense, neck__a=block[:5], neck__b=block[5:], neck__c=torch.ones(4, 4).t())
    path = file({'state_dict': weights, 'optimizer': {'state': {}}})
    export(path, tmp_path / 'all.safetensors', naming='project')
    assert torch.equal(read_file(tmp_path / 'all.safetensors')['state_dict']['neck.b'], block[5:])
    assert export(path, tmp_path / 'part.pth', part='backbone') == len(dense)
    written = read_file(tmp_path / 'part.pth')['model']
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in written.values())
    load_backbone(MILA(**micro), tmp_path / 'part.pth')


def test_export_refuses_what_it_cannot_do(file, dense, tmp_path):
    path = file({'state_dict': dense})
    for target, options, words in (
        ('a.onnx', {}, 'ends in .safetensors or .pth'),
        ('no/folder/a.pth', {}, 'no such folder'),
        ('a.pth', {'naming': 'mine'}, 'naming'),
        ('a.pth', {'image_size': 33}, 'multiple of 32'),
    ):
        with pytest.raises(UserError, match=words):
            export(path, tmp_path / target, **options)
    with pytest.raises(UserError, match='no MILA'):
        export(file({'conv.weight': torch.ones(1)}, 'other.pth'), tmp_path / 'a.pth')
    assert not (tmp_path / 'a.pth').exists()


def test_safetensors_with_meta_data(tmp_path, dense):
    from safetensors.torch import save_file

    save_file(dict(dense), tmp_path / 'a.safetensors', metadata={'note': json.dumps({'epoch': 3})})
    assert read_checkpoint(tmp_path / 'a.safetensors')['meta'] == {'note': '{"epoch": 3}'}


def test_public_names_stay_what_they_are():
    """A module of the same name would take a function's place once it is imported."""
    import mila_mm.weights as room

    for name in room.__all__:
        getattr(room, name)
    modules = [name for name in room.__all__ if type(getattr(room, name)).__name__ == 'module']
    assert not modules
    assert callable(room.fetch)
    assert callable(room.export)
    with pytest.raises(AttributeError):
        room.nonsense  # noqa: B018
