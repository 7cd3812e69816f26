"""Loading: as published, completely, with a report; or an error that lists what differs."""

import json
import re
from collections import OrderedDict

import pytest
import torch

from mila_mm import MILA
from mila_mm.weights import (
    CheckpointError,
    MismatchError,
    load_backbone,
    load_model,
    read_checkpoint,
)
from mila_mm.weights.names import rope_tables

NORMS = [f'norm{i}.{what}' for i in range(4) for what in ('weight', 'bias')]


def test_classifier_as_published(file, published, classifier, model, log, assert_holds):
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
def test_every_layout(layout, file, dense, model, tmp_path, detector, assert_holds):
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


def test_heads_of_a_detector_are_left_out_of_the_backbone(file, dense, model, detector):
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
def test_stages_that_are_not_built_are_left_out_by_name(file, published, dense, micro, out_indices, assert_holds):
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


def test_whole_model_with_leftovers_of_training(file, dense, model, detector, assert_holds):
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


def test_entry_can_be_chosen(file, dense, model, assert_holds):
    averaged = {name: value * 2 if value.is_floating_point() else value for name, value in dense.items()}
    path = file({'model': dense, 'state_dict_ema': averaged})
    load_backbone(model, path)
    assert_holds(model, dense)
    load_backbone(model, path, key='state_dict_ema')
    assert_holds(model, averaged)
    with pytest.raises(CheckpointError, match='expected a dict with state_dict_emma, found model, state_dict_ema'):
        load_backbone(model, path, key='state_dict_emma')


# Through init_cfg and through mmengine's loaders


# Export


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
