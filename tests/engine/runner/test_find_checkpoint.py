"""Which checkpoint a run continues from."""

import contextlib
import json
import logging
import os
import socket
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from torch import nn

from mila_mm.engine.runner.find_checkpoint import candidates, last_saved, newest_readable, settle_resume


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(2, 2)


def write(path: Path, iteration: int, epoch: int = 0, model: nn.Module | None = None, **more) -> Path:
    state = (model or nn.Linear(2, 2)).state_dict()
    content = dict(state_dict=state, meta=dict(iter=iteration, epoch=epoch), message_hub={}, optimizer={}, **more)
    torch.save(content, path)
    return path


def found(folder: Path, **options) -> list[str]:
    return [path.name for path in candidates(Config(dict(work_dir=str(folder), **options)))]


def test_what_a_run_saves_is_found(tmp_path) -> None:
    for name in (
        'epoch_3.pth',
        'iter_7.pth',
        'stop_iter_8.pth',
        'best_acc_epoch_3.pth',
        'epoch_3-12345678.pth',
        'weights.pth',
        '.iter_9.pth.4.unfinished',
        'epoch_x.pth',
    ):
        (tmp_path / name).touch()
    assert found(tmp_path) == ['epoch_3.pth', 'iter_7.pth', 'stop_iter_8.pth']


def test_other_names_and_folders(tmp_path) -> None:
    folder = tmp_path / 'elsewhere' / 'run'
    folder.mkdir(parents=True)
    (folder / 'model_5.pth').touch()
    hooks = dict(checkpoint=dict(filename_tmpl='model_{}.pth', out_dir=str(tmp_path / 'elsewhere')))
    assert found(tmp_path / 'run', default_hooks=hooks) == ['model_5.pth']


def test_last_checkpoint_names_one_of_any_name_in_a_folder_that_was_moved(tmp_path) -> None:
    write(tmp_path / 'other.pth', 1)
    (tmp_path / 'last_checkpoint').write_text('/where/it/was/other.pth')
    assert candidates(Config(dict(work_dir=str(tmp_path)))) == [tmp_path / 'other.pth']


@pytest.mark.parametrize(
    'content',
    [
        b'/there\0/iter_4.pth',
        b'x' * 5000,
        b'a/' * 3000,
        b'y' * 300,
        b'\xff\xfe',
        b'\x1b[2J',
        b'iter_4.pth\n2026 - mmengine - INFO - all is well',
        b'iter_4.pth\x00',
    ],
    ids=repr,
)
def test_a_last_checkpoint_that_names_nothing_is_left_alone(tmp_path, model, content, capsys) -> None:
    sound = write(tmp_path / 'iter_4.pth', 4)
    (tmp_path / 'last_checkpoint').write_bytes(content)
    assert last_saved(tmp_path) is None
    assert newest_readable(candidates(Config(dict(work_dir=str(tmp_path)))), model) == (sound, [])
    said = capsys.readouterr()
    assert 'last_checkpoint is of no use' in said.out + said.err
    assert '\x1b' not in said.out + said.err and 'all is well' not in said.out + said.err


@pytest.mark.parametrize('kind', ['pipe', 'device', 'folder', 'link to itself'])
def test_a_last_checkpoint_that_is_no_file_is_left_alone(tmp_path, kind) -> None:
    path = tmp_path / 'last_checkpoint'
    make = {
        'pipe': os.mkfifo,
        'device': lambda path: path.symlink_to('/dev/zero'),
        'folder': Path.mkdir,
        'link to itself': lambda path: path.symlink_to(path),
    }
    make[kind](path)
    assert found(tmp_path) == []


@pytest.mark.parametrize(
    ('named', 'taken'),
    [
        ('s3://bucket/run/iter_4.pth', True),
        ('https://elsewhere/iter_4.pth', False),
        ('s3://bucket-of-another/iter_4.pth', False),
        ('s3://bucket/../other/iter_4.pth', False),
    ],
)
def test_an_address_counts_where_the_config_saves(tmp_path, named, taken) -> None:
    (tmp_path / 'last_checkpoint').write_text(named)
    hooks = dict(checkpoint=dict(type='CheckpointHook', out_dir='s3://bucket/'))
    logger = logging.getLogger('test_an_address')
    runner = SimpleNamespace(
        _resume=True, _load_from=None, work_dir=str(tmp_path), cfg=Config(dict(default_hooks=hooks)), logger=logger
    )
    settle_resume(runner)
    assert runner._load_from == (named if taken else None)


@pytest.mark.parametrize('own', [True, False])
def test_what_lies_elsewhere_is_taken_where_this_run_wrote_it(tmp_path, own) -> None:
    """A stranger's last_checkpoint leads to no other run; out_dir may have been taken out of the config."""
    for name in ('run', 'elsewhere'):
        (tmp_path / name).mkdir()
    run = dict(run_id='a' * 32, run=dict(starts=[[0, 'x']]))
    there = write(tmp_path / 'elsewhere/iter_9.pth', 9)
    content = torch.load(there)
    content['meta'].update(run, run_id=('a' if own else 'b') * 32)
    torch.save(content, there)
    write(tmp_path / 'run/iter_4.pth', 4)
    (tmp_path / 'run/last_checkpoint').write_text(str(there))
    if own:
        record = dict(id='a' * 32, starts=[[0, 'x']], finished=None)
        (tmp_path / 'run/run.json').write_text(json.dumps(record))
    runner = SimpleNamespace(
        _resume=True, _load_from=None, work_dir=str(tmp_path / 'run'), cfg=Config(dict()), logger=logging.getLogger('x')
    )
    settle_resume(runner)
    assert Path(runner._load_from) == (there if own else tmp_path / 'run/iter_4.pth')


def test_nothing(tmp_path) -> None:
    assert found(tmp_path / 'nowhere') == []
    (tmp_path / 'last_checkpoint').touch()
    assert found(tmp_path) == []
    assert newest_readable([]) == (None, [])


def test_the_highest_iteration_counts_not_the_name_or_the_time(tmp_path, model) -> None:
    newest = write(tmp_path / 'epoch_1.pth', 30, 3)
    older = [write(tmp_path / 'epoch_9.pth', 10, 1), write(tmp_path / 'iter_20.pth', 20, 2)]
    assert newest_readable([newest, *older], model) == (newest, [])


def test_an_epoch_that_is_complete_comes_before_the_same_iteration_inside_it(tmp_path) -> None:
    whole, inside = write(tmp_path / 'epoch_2.pth', 10, 2), write(tmp_path / 'stop_iter_10.pth', 10, 1)
    assert newest_readable([inside, whole])[0] == whole


def broken() -> nn.Module:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.bias, float('nan'))
    return model


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flipped(path: Path) -> None:
    weight = torch.load(path)['state_dict']['weight'].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(weight)] ^= 1
    path.write_bytes(content)


def renamed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[30] ^= 0x80  # the first letter of the first record's name, where the record lies
    path.write_bytes(content)


def marked_as_folders(path: Path) -> None:
    content = path.read_bytes()
    start = content.index(b'PK\x01\x02')
    while start >= 0:  # the attributes of each record in the directory
        content = content[: start + 38] + bytes([content[start + 38] | 0x10]) + content[start + 39 :]
        start = content.find(b'PK\x01\x02', start + 1)
    path.write_bytes(content)


def bind(path: Path) -> None:
    """Leave a socket; its name is short, since that of the folder may be too long for one."""
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listening:
        link = Path(tempfile.mkdtemp()) / 's'
        listening.bind(str(link))
        link.rename(path)


DAMAGE = {
    'truncated': (truncated, 'truncated'),
    'empty': (lambda path: path.write_bytes(b''), 'empty'),
    'garbage': (lambda path: path.write_bytes(b'garbage' * 99), 'no known checkpoint format'),
    'one bit': (flipped, 'checksum'),
    'a name': (renamed, 'damaged'),
    'attributes': (marked_as_folders, 'marked as a folder'),
    'gone': (Path.unlink, 'no such file'),
    'weights alone': (lambda path: torch.save({'state_dict': {}}, path), 'no state of a training run'),
    'no optimizer': (
        lambda path: torch.save(dict(state_dict={}, meta=dict(iter=9), message_hub={}), path),
        'no optimizer state',
    ),
    'no iteration': (
        lambda path: torch.save(dict(state_dict={}, meta={}, message_hub={}, optimizer={}), path),
        'which iteration',
    ),
    **{
        f'iteration {repr(value)[:20]}': (lambda path, value=value: write(path, value), 'meta.iter is')
        for value in (float('inf'), float('nan'), -1, True, 3.0, 10**30, 10**400, '7', [7], None, '\x1b[2J\n')
    },
    'epoch': (lambda path: write(path, 9, -1), 'meta.epoch is -1'),
    'a pipe': (lambda path: (path.unlink(), os.mkfifo(path)), 'a pipe or a device'),
    'a device': (lambda path: (path.unlink(), path.symlink_to('/dev/zero')), 'a pipe or a device'),
    'a link to itself': (lambda path: (path.unlink(), path.symlink_to(path)), 'symbolic links'),
    'a socket': (lambda path: (path.unlink(), bind(path)), 'cannot be read'),
    'another model': (lambda path: write(path, 9, model=nn.Linear(3, 2)), 'does not fit'),
    'a weight that is no number': (lambda path: write(path, 9, model=broken()), '1 weights are not finite'),
    'a model with more': (lambda path: write(path, 9, model=nn.Sequential(nn.Linear(2, 2))), 'does not fit'),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_what_cannot_be_resumed_is_skipped_and_named(tmp_path, model, damage) -> None:
    sound, bad = write(tmp_path / 'iter_4.pth', 4), write(tmp_path / 'iter_8.pth', 8)
    change, words = DAMAGE[damage]
    change(bad)
    chosen, skipped = newest_readable([sound, bad], model)
    assert chosen == sound
    assert [each.path for each in skipped] == [bad]
    assert words in skipped[0].reason
    assert str(skipped[0]).isprintable() and len(str(skipped[0])) < 600
    assert newest_readable([bad], model)[0] is None


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_crashes_or_changes_weights(tmp_path, data) -> None:
    torch.manual_seed(0)
    sound, bad = write(tmp_path / 'iter_4.pth', 4), write(tmp_path / 'iter_8.pth', 8)
    expected = torch.load(bad)['state_dict']
    content = bytearray(bad.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    bad.write_bytes(content)
    model = nn.Linear(2, 2)
    chosen, skipped = newest_readable([sound, bad], model)
    if chosen == bad:  # the flip was in padding, or in what nobody reads
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    else:
        assert chosen == sound and [each.path for each in skipped] == [bad]


def test_a_damaged_one_that_is_older_is_not_read_whole(tmp_path, model) -> None:
    old, new = write(tmp_path / 'iter_4.pth', 4), write(tmp_path / 'iter_8.pth', 8)
    flipped(old)
    assert newest_readable([old, new], model) == (new, [])


def test_what_need_not_fit_strictly_is_taken(tmp_path, model) -> None:
    path = write(tmp_path / 'iter_8.pth', 8, model=nn.Linear(3, 2))
    assert newest_readable([path], model, strict=False)[0] == path


def test_a_sharded_checkpoint_needs_all_its_shards(tmp_path) -> None:
    (tmp_path / 'iter_8.pth').mkdir()
    chosen, skipped = newest_readable([tmp_path / 'iter_8.pth'])
    assert chosen is None
    assert 'rank0.pth' in skipped[0].reason
    write(tmp_path / 'iter_8.pth/rank0.pth', 8)
    assert newest_readable([tmp_path / 'iter_8.pth'])[0] == tmp_path / 'iter_8.pth'
