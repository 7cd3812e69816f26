"""Reading configs and their overrides."""

from pathlib import Path

import pytest
from mmengine.config import Config

from mila_mm.engine.config.load import load_config, parse_cfg_options, refuse_old, resolve_config, scope_of
from mila_mm.errors import UserError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / 'config.py'
    path.write_text("model = dict(type='mmseg.EncoderDecoder', arms=[dict(n=1), dict(n=2)])\ntrain_cfg = dict(n=1)\n")
    return path


@pytest.mark.parametrize(
    ('item', 'value'),
    [
        ('a.b=3', 3),
        ('a.b=1e-4', 1e-4),
        ('a.b=true', True),
        ('a.b=None', None),
        ('a.b=x=y', 'x=y'),
        ('a.b=1,2', [1, 2]),
        ('a.b=[(1,2),[x]]', [(1, 2), ['x']]),
        ('a.b=', ''),
        ('a.b=-1', -1),
    ],
)
def test_options_follow_openmmlab(item, value) -> None:
    assert parse_cfg_options([item]) == {'a.b': value}


@pytest.mark.parametrize(
    ('item', 'value'),
    [
        ("a=[dict(type='StepLR',step_size=2)]", [dict(type='StepLR', step_size=2)]),
        ("a=[dict(b=-1e-3),{'c':(1,[2])}]", [dict(b=-1e-3), {'c': (1, [2])}]),
        ('a={}', {}),
    ],
)
def test_values_with_dicts_are_written_as_in_a_config(item, value) -> None:
    assert parse_cfg_options([item]) == {'a': value}


@pytest.mark.parametrize(
    'item',
    [
        'a=[dict(type=StepLR)]',
        'a=dict(1)',
        'a=dict(b=f())',
        'a={1:{}[0]}',
        'a={[]:1}',
        'a=[{]',
        'a=' + '{1:' * 9999 + '}' * 9999,
    ],
)
def test_other_values_with_dicts_are_refused(item) -> None:
    with pytest.raises(UserError, match='--cfg-options'):
        parse_cfg_options([item])


def test_later_option_wins() -> None:
    assert parse_cfg_options(['a=1', 'b=2', 'a=3']) == {'a': 3, 'b': 2}


@pytest.mark.parametrize('item', ['a', '=1', 'a=(1', 'a=1]'])
def test_refused_options(item) -> None:
    with pytest.raises(UserError, match='--cfg-options'):
        parse_cfg_options([item])


def test_options_reach_into_lists_and_new_keys(config) -> None:
    cfg = load_config(str(config), ['model.arms.1.n=5', 'train_cfg.extra=1', 'randomness.seed=7', 'load_strict=False'])
    assert [arm.n for arm in cfg.model.arms] == [1, 5]
    assert cfg.train_cfg == dict(n=1, extra=1)
    assert cfg.randomness.seed == 7


@pytest.mark.parametrize('option', ['model.arms.2.n=5', 'model.type.name=1', 'modle.type=x'])
def test_options_that_do_not_fit(config, option) -> None:
    with pytest.raises(UserError, match=option.split('=', maxsplit=1)[0]):
        load_config(str(config), [option])


@pytest.mark.parametrize(
    ('values', 'scope'),
    [
        (dict(default_scope='mmdet', model=dict(type='X')), 'mmdet'),
        (dict(model=dict(type='mmseg.X')), 'mmseg'),
        (dict(default_scope='mila_mm', model=dict(type='X', _scope_='mmdet')), 'mmdet'),
    ],
)
def test_scope(values, scope) -> None:
    assert scope_of(Config(values)) == scope


@pytest.mark.parametrize('name', ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', 'mmseg::_base_/default_runtime'])
def test_configs_of_installed_packages(name) -> None:
    assert resolve_config(name).is_file()


@pytest.mark.parametrize(('key', 'successor'), [('data', 'train_dataloader'), ('optimizer', 'optim_wrapper')])
def test_configs_of_the_versions_before_are_told_what_has_changed(key, successor) -> None:
    with pytest.raises(UserError) as refused:
        refuse_old(Config({key: {}, 'model': {}}))
    for words in (f'mmdet 2 or mmseg 0 ({key})', f'{key} is now', successor, 'docs/custom_data.md'):
        assert words in str(refused.value)
    refuse_old(Config({key: {}, 'train_dataloader': {}}))
    refuse_old(Config({'model': {}}))


def test_many_old_entries_are_counted() -> None:
    keys = ('data', 'optimizer', 'optimizer_config', 'lr_config', 'runner', 'checkpoint_config')
    with pytest.raises(UserError, match='and 2 more') as refused:
        refuse_old(Config({key: {} for key in keys}))
    assert str(refused.value).count('is now') == 3
