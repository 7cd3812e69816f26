"""Values out of a resumed checkpoint: of the right kind, or refused in one line."""

import math
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import CosineAnnealingLR, MultiStepLR
from torch import nn

from mila_mm.engine.random_state import capture_random_state, restore_random_state
from mila_mm.engine.resumed_state import check_groups, check_optimizer, check_resumed, check_schedulers
from mila_mm.weights.errors import CheckpointError

NO_COUNTS = [-1, 10**13, 10**400, True, 3.0, math.inf, math.nan, '7', None, [7], torch.ones(2), '\x1b[2J']
SOURCE = '--resume: file.pth'


def sound() -> dict[str, Any]:
    scalars = {'train/loss': HistoryBuffer([1.0], [1])}
    hub = dict(log_scalars=scalars, runtime_info=dict(epoch=1, iter=4, best_score=0.5), resumed_keys={'epoch': True})
    return dict(state_dict={}, meta=dict(epoch=1, iter=4, seed=3), message_hub=hub, position=dict(batches=2, length=5))


def place(*keys: str) -> Callable[[dict, Any], None]:
    def put(content: dict, value: Any) -> None:
        for key in keys[:-1]:
            content = content.setdefault(key, {})
        content[keys[-1]] = value

    return put


def is_refused(check: Callable, *args: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        check(*args)
    assert str(caught.value).replace('\n', '').isprintable() and len(str(caught.value)) < 400, caught.value
    return str(caught.value)


def test_what_a_run_writes_passes_unchanged() -> None:
    content = sound()
    check_resumed(content, SOURCE)
    check_resumed(content, SOURCE)
    expected = sound()
    assert content.pop('named_best') == {}
    assert content['message_hub'].pop('log_scalars').keys() == expected['message_hub'].pop('log_scalars').keys()
    assert content == expected


@pytest.mark.parametrize('value', NO_COUNTS)
@pytest.mark.parametrize('keys', [('meta', 'iter'), ('meta', 'epoch'), ('position', 'batches'), ('position', 'length')])
def test_numbers_that_cannot_be_a_position(keys, value) -> None:
    content = sound()
    place(*keys)(content, value)
    assert keys[-1] in is_refused(check_resumed, content, SOURCE)


@pytest.mark.parametrize('value', [-1, 2**32, 10**13, 10**400, True, 3.0, math.inf, math.nan, '7', [7]])
def test_seeds(value) -> None:
    content = sound()
    content['meta']['seed'] = value
    assert 'meta.seed' in is_refused(check_resumed, content, SOURCE)


def test_other_positions() -> None:
    for change in (
        dict(position=dict(batches=6, length=5)),
        dict(position=[1, 2]),
        dict(validated_iter=-3),
        dict(sampler_seed='x'),
        dict(ema_state_dict=dict(steps=torch.tensor(-1))),
        dict(ema_state_dict=dict(steps=torch.tensor(0.5))),
        dict(ema_state_dict=dict(steps=torch.ones(3))),
        dict(ema_state_dict=[1]),
        dict(ema_state_dict={3: torch.ones(1)}),
        dict(ema_state_dict=dict(steps=3)),
        dict(ema_state_dict={'module.w': torch.ones(2)}),
        dict(ema_state_dict={'module.w': torch.ones(2)}, state_dict=dict(w=torch.ones(3))),
        dict(ema_state_dict={'module.w': torch.ones(2)}, state_dict=dict(w=3)),
        dict(message_hub=[1]),
        dict(message_hub=dict(log_scalars=[1])),
        dict(message_hub=dict(runtime_info=7)),
        dict(meta=None),
    ):
        is_refused(check_resumed, {**sound(), **change}, SOURCE)


def test_the_message_hub_keeps_what_is_of_use() -> None:
    content = sound()
    hub = content['message_hub']
    hub['log_scalars'].update({'train/\x1b[31mred\nline': HistoryBuffer([1.0], [1]), 'train/none': HistoryBuffer()})
    hub['log_scalars'].update({'train/number': 3, 7: HistoryBuffer([1.0], [1])})
    hub['runtime_info'].update(epoch='many', iter=-4, max_iters=math.inf, best_score=math.nan, best_score_b='high')
    hub['runtime_info'].update({'keep_ckpt_ids': [1], 'last_ckpt': '\x1b[2J', 'best_ckpt': '/etc/x', 'seed': 3, 5: 6})
    hub['resumed_keys'].update({'\x1b]0;title': True, 'nothing': True, 'keep_ckpt_ids': True, 'seed': 'yes'})
    check_resumed(content, SOURCE)
    assert list(content['message_hub']['log_scalars']) == ['train/loss']
    assert content['message_hub']['runtime_info'] == {'seed': 3}
    assert content['message_hub']['resumed_keys'] == {'seed': True}
    assert content['named_best'] == {'best_ckpt': '/etc/x'}


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([dict(params=[model.weight]), dict(params=[model.bias], lr=0.5)], lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


def test_schedulers_take_no_entry_that_they_do_not_have(optimizer) -> None:
    """mmengine puts every entry into the object's ``__dict__``: one called 'step' would take the method's place."""
    ours = [MultiStepLR(optimizer, milestones=[2, 4]), CosineAnnealingLR(optimizer, T_max=9)]
    states = deepcopy([each.state_dict() for each in ours])
    expected = deepcopy(states)
    states[0].update(step='no method', optimizer='none', __class__='x')
    assert check_schedulers(states, ours, SOURCE) == expected
    assert type(expected[0]['milestones']) is Counter


@pytest.mark.parametrize(
    ('key', 'value'),
    [
        *(('last_step', value) for value in ('7', 1.5, math.inf, None, True, 10**30)),
        ('begin', -(10**30)),
        ('by_epoch', 'yes'),
        ('base_values', [0.1]),
        ('base_values', [0.1, math.nan]),
        ('_last_value', 'ab'),
        ('T_max', math.nan),
        ('param_name', 5),
    ],
)
def test_schedulers_take_no_other_kinds(optimizer, key, value) -> None:
    ours = [CosineAnnealingLR(optimizer, T_max=9)]
    states = [{**ours[0].state_dict(), key: value}]
    assert f'param_schedulers[0].{key}' in is_refused(check_schedulers, states, ours, SOURCE)


@pytest.mark.parametrize('states', [5, 'abc', {}, [3], [None]])
def test_states_of_schedulers_that_are_none(optimizer, states) -> None:
    if states != {}:
        is_refused(check_schedulers, states, [CosineAnnealingLR(optimizer, T_max=9)], SOURCE)
    is_refused(check_schedulers, states, dict(a=[CosineAnnealingLR(optimizer, T_max=9)]), SOURCE)


SCALER = dict(scale=1024.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, _growth_tracker=0)


def test_optimizers(optimizer) -> None:
    check_optimizer(optimizer.state_dict(), optimizer, SOURCE)
    for scaler in (SCALER, {}):
        base = dict(optimizer.defaults, params=torch.zeros(1), initial_lr=0.1)
        check_optimizer(dict(optimizer.state_dict(), loss_scaler=scaler, base_param_settings=base), optimizer, SOURCE)
    lies: list[tuple[str, Callable]] = [
        ('exp_avg', lambda state: state['state'][0].update(exp_avg=torch.ones(5))),
        ('no group has', lambda state: state['state'].update({9: {}})),
        ('no group has', lambda state: state['state'].update({'\x1b[2J': {}})),
        ('parameters', lambda state: state['param_groups'].pop()),
        ('parameters', lambda state: state['param_groups'][0].update(params=[0, 1])),
        ('parameters', lambda state: state['param_groups'][0].update(params=[[0]])),
        ('parameters', lambda state: state.update(param_groups='xy')),
        ('optimizer.state', lambda state: state.update(state=[1])),
        ('optimizer.state[1]', lambda state: state['state'].update({1: 5})),
        *(
            ('lr', lambda state, lr=lr: state['param_groups'][1].update(lr=lr))
            for lr in ('x', math.nan, math.inf, True)
        ),
        ('betas', lambda state: state['param_groups'][0].update(betas=(0.9,))),
        ('betas', lambda state: state['param_groups'][0].update(betas=0.9)),
        ('loss_scaler', lambda state: state.update(loss_scaler=5)),
        *(
            (f'loss_scaler.{key}', lambda state, key=key, value=value: state.update(loss_scaler={**SCALER, key: value}))
            for key in SCALER
            for value in (None, 'x', True, -1, math.nan, math.inf)
        ),
        ('loss_scaler._growth', lambda state: state.update(loss_scaler={**SCALER, '_growth_tracker': 1.5})),
        ('base_param_settings', lambda state: state.update(base_param_settings=5)),
        *(
            ('base_param_settings.lr', lambda state, lr=lr: state.update(base_param_settings=dict(lr=lr)))
            for lr in (None, 'x', math.nan, True)
        ),
        ('base_param_settings.betas', lambda state: state.update(base_param_settings=dict(lr=0.1, betas=7))),
    ]
    for words, change in lies:
        state = deepcopy(optimizer.state_dict())
        change(state)
        assert words in is_refused(check_optimizer, state, optimizer, SOURCE), words
    is_refused(check_optimizer, 'none', optimizer, SOURCE)


GROUP = dict(params=[0], lr=0.1)


@pytest.mark.parametrize(
    'content',
    [
        dict(optimizer=5),
        dict(optimizer=dict(main=7)),
        dict(optimizer=dict(param_groups=[5], state={})),
        dict(optimizer=dict(param_groups=[{}], state={})),
        dict(optimizer=dict(param_groups=[GROUP], state=3)),
        dict(optimizer=dict(param_groups=[dict(GROUP, weight_decay=[1])], state={})),
        dict(optimizer=dict(param_groups=[dict(GROUP, initial_lr='x')], state={})),
        dict(optimizer=dict(param_groups=[dict(params=[[0]])], state={})),
        dict(param_schedulers='abc'),
        dict(param_schedulers=[1]),
        dict(param_schedulers=dict(main=[1])),
    ],
    ids=repr,
)
def test_optimizers_and_schedulers_that_are_none(content) -> None:
    is_refused(check_groups, content, SOURCE)


def test_optimizers_and_schedulers_of_any_layout_pass() -> None:
    one = dict(param_groups=[GROUP, dict(params=['a.weight'])], state={})
    check_groups(dict(optimizer=one, param_schedulers=[{}]), SOURCE)
    check_groups(dict(optimizer=dict(a=one, b=one), param_schedulers=dict(a=[{}], b=[])), SOURCE)
    check_groups({}, SOURCE)


@pytest.mark.parametrize('position', [-1, 625, 10**6, 10**30, True, 1.0, 'x'])
def test_a_position_outside_of_numpys_state(position) -> None:
    """numpy would read memory that is not its own."""
    state = capture_random_state()
    name, words, _, *rest = state['numpy']
    with pytest.raises(CheckpointError, match='random_state'):
        restore_random_state({**state, 'numpy': (name, words, position, *rest)})
    np.random.rand()
