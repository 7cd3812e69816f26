"""Which checkpoints are of a run's past, and what two parts of a run must have in common."""

from dataclasses import replace

import pytest
import torch
from mmengine.optim import ApexOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.optim.optimizer import apex_optimizer_wrapper

from mila_mm.engine.optimizers.amp import AmpOptimWrapper
from mila_mm.engine.runner.identity import (
    RECORD,
    RunRecord,
    Settings,
    changes,
    names_of,
    precision_of,
    read_record,
    remarks,
    write_record,
)
from mila_mm.errors import UserError

HELD = dict(classes='["a", "b"]', annotations='12 bytes, 3f', names='77', sizes='5')
SETTINGS = Settings(
    *(2, 4, 1, 100, 800, '12 epochs', (1e-4, 1e-5), '{"optimizer": {"type": "AdamW"}}', ('{}', '{}'), 'bf16', HELD)
)


def started(record: RunRecord, iteration: int) -> RunRecord:
    later = RunRecord(record.id, record.starts)
    later.start(iteration)
    return later


def test_what_a_run_wrote_before_it_was_killed_is_its_own() -> None:
    first = started(RunRecord(), 0)
    second = started(first, 10)
    assert first.holds(first, 12)
    assert second.holds(first, 10) and second.holds(first, 4) and second.holds(second, 12)
    assert not second.holds(first, 12), 'written, but not gone on from'


def test_what_came_before_a_roll_back_is_not() -> None:
    first = started(RunRecord(), 0)
    rolled_back = started(started(first, 10), 4)
    assert rolled_back.holds(first, 4)
    assert not rolled_back.holds(first, 10) and not rolled_back.holds(started(first, 10), 12)
    assert not started(first, 4).holds(rolled_back, 6), 'a second one from the same place'


def test_another_run_s_is_not() -> None:
    assert not started(RunRecord(), 0).holds(started(RunRecord(), 0), 2)


def test_what_an_earlier_version_wrote_counts_where_the_run_went_on_from_it() -> None:
    assert started(RunRecord(), 10).holds(None, 10)
    assert not started(RunRecord(), 0).holds(None, 10)


def test_a_record_comes_back_from_its_file(tmp_path) -> None:
    record = started(started(RunRecord(), 0), 7)
    record.finished = 9
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'\0' * 99,
        b'[]',
        b'{"id": 3, "starts": []}',
        b'{"id": "x", "starts": [[0]]}',
        b'{"id": "x", "starts": [["a", "b"]]}',
        b'{"id": "x", "starts": 5}',
        b'[' * 100_000,
        b'{"id": "x", "starts": [[1e400, "a"]]}',
        b'\xff\xfe',
    ],
)
def test_a_damaged_record_is_none(tmp_path, content) -> None:
    (tmp_path / RECORD).write_bytes(content)
    assert read_record(tmp_path) is None


def test_settings_come_back_from_a_checkpoint() -> None:
    assert Settings.read(SETTINGS.plain()) == SETTINGS
    for key, value in SETTINGS.plain().items():
        assert Settings.read({**SETTINGS.plain(), key: None}) is None
        assert Settings.read({**SETTINGS.plain(), key: [value]}) is None
        rest = Settings.read({name: kept for name, kept in SETTINGS.plain().items() if name != key})
        if key in ('precision', 'data'):  # earlier versions did not write them
            assert not changes(rest, SETTINGS)
        else:
            assert rest is None
    assert Settings.read(SETTINGS.plain() | dict(data=dict(classes=3))) is None
    assert Settings.read(None) is None


@pytest.mark.parametrize(
    ('change', 'names'),
    [
        (dict(lr=(0.5,)), ['lr']),
        (dict(lr=(1e-4, 1e-5 * (1 + 1e-12))), []),
        (dict(batch=8), ['batch']),
        (dict(batch=8, epoch_length=50), ['batch']),
        (dict(world_size=1, epoch_length=200), ['world_size']),
        (dict(world_size=4, batch=2), []),
        (dict(world_size=1, accumulation=2, epoch_length=200), ['world_size', 'accumulation']),
        (dict(images=900, epoch_length=113), ['epoch_length']),
        (dict(epoch_length=50), ['epoch_length']),
        (dict(schedule=('{}',)), ['schedule']),
        (dict(optimizer='{"optimizer": {"type": "SGD"}}'), ['optimizer']),
        (dict(length='24 epochs'), []),
        (dict(precision='fp32'), ['precision']),
        (dict(data={**HELD, 'names': '78'}), ['data']),
        (dict(data={**HELD, 'classes': '["b", "a"]'}), ['data']),
        (dict(data={'classes': HELD['classes']}), []),
        (dict(data={name: HELD[name] for name in ('classes', 'names')} | {'files': '1'}), []),
        (dict(data={**HELD, 'names': '78', 'annotations': ''}, images=900, epoch_length=113), ['epoch_length']),
        (dict(data={**HELD, 'classes': '[]'}, images=900, epoch_length=113), ['epoch_length', 'data']),
    ],
)
def test_what_cannot_be_continued_is_named(change, names) -> None:
    now = replace(SETTINGS, **change)
    found = changes(SETTINGS, now)
    assert list(found) == names
    harmless = bool({'length'} & set(change)) or change == dict(world_size=4, batch=2)
    assert bool(remarks(SETTINGS, now)) == harmless


def test_names_on_the_command_line() -> None:
    assert list(names_of('lr, world-size,')) == ['lr', 'world_size']
    with pytest.raises(UserError, match=r'got .speed'):
        list(names_of('lr,speed'))


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)


def test_loss_scales_of_several_optimizers() -> None:
    """Each wrapper's options stand under its name, where its constructor takes them from."""

    def precision(first: float, second: float, **options) -> str:
        each = dict(type=dict(loss_scale=first), b=dict(loss_scale=second), **options)
        wrappers = {name: AmpOptimWrapper('fp16', **given, optimizer=sgd()) for name, given in each.items()}
        return precision_of(OptimWrapperDict(**wrappers), dict(optim_wrapper=dict(constructor='C', **each)))

    assert precision(64.0, 64.0) == 'fp16, loss_scale 64.0'
    assert precision(64.0, 32.0) == 'fp16, loss_scale 64.0; fp16, loss_scale 32.0'
    again = dict(loss_scale=32.0)
    assert precision(64.0, 32.0, c=again) != precision(64.0, 64.0, c=again)
    mixed = OptimWrapperDict(type=AmpOptimWrapper('fp16', optimizer=sgd()), b=OptimWrapper(sgd()))
    assert precision_of(mixed, dict(optim_wrapper=dict(type='X'))) == 'fp16, loss_scale "dynamic"; fp32'


def test_apex_is_no_fp32(monkeypatch) -> None:
    monkeypatch.setattr(apex_optimizer_wrapper, 'apex_amp', object())  # it is not installed where there is no GPU
    built = [ApexOptimWrapper(optimizer=sgd(), **options) for options in ({}, dict(opt_level='O2', loss_scale=64.0))]
    assert precision_of(built[0], {}) == 'apex O1, loss_scale "dynamic"'
    assert precision_of(built[1], {}) == 'apex O2, loss_scale 64.0'
    assert precision_of(ApexOptimWrapper(optimizer=sgd(), enabled=False), {}) == 'fp32'
