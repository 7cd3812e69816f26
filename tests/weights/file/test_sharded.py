"""Folders of shards: read as they were written, or refused; nothing of them runs."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mila_mm.weights import read_checkpoint
from mila_mm.weights.errors import CheckpointError
from mila_mm.weights.file.sharded import (
    INDEX,
    STATE,
    ShardReader,
    ShardWriter,
    _digest,
    is_sharded,
    load_into,
    read_state,
    read_whole,
)

TENSORS = {
    'model.a.weight': torch.arange(12.0).reshape(3, 4),
    'model.count': torch.tensor(7),
    'optimizer.0.exp_avg': torch.full((3, 4), 0.5),
    'optimizer.0.step': torch.tensor(3.0),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What one process writes alone."""
    place = tmp_path / 'iter_8.pth'
    place.mkdir()
    groups = [dict(params=[0], lr=0.1)]
    torch.save(
        dict(meta=dict(iter=8, epoch=0), message_hub={}, optimizer=dict(state={}, param_groups=groups)), place / STATE
    )
    dcp.save(dict(TENSORS), storage_writer=ShardWriter(place), no_dist=True)
    return place


def change_index(folder: Path, change: Any, sign: bool = True) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content['body'])
    if sign:  # as a stranger would
        content['sha256'] = _digest(content['body'])
    (folder / INDEX).write_text(json.dumps(content))


def refused(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        reader = ShardReader(folder)
        reader.check_whole()
        read_whole(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    return str(caught.value)


def test_it_is_read_as_it_was_written(folder) -> None:
    assert is_sharded(folder)
    ShardReader(folder).check_whole()
    content = read_whole(folder)
    assert list(content['state_dict']) == ['a.weight', 'count']
    assert torch.equal(content['state_dict']['a.weight'], TENSORS['model.a.weight'])
    assert torch.equal(content['state_dict']['count'], TENSORS['model.count'])
    assert torch.equal(content['optimizer']['state'][0]['exp_avg'], TENSORS['optimizer.0.exp_avg'])
    assert content['optimizer']['param_groups'] == [dict(params=[0], lr=0.1)] and content['meta']['iter'] == 8
    assert 'optimizer' not in read_whole(folder, optimizer=False)
    assert read_state(folder)['meta']['iter'] == 8
    assert torch.equal(read_checkpoint(folder)['state_dict']['count'], torch.tensor(7))


def test_torchs_own_tools_read_it(folder, tmp_path) -> None:
    dcp_to_torch_save(folder, tmp_path / 'whole.pth')
    assert torch.load(tmp_path / 'whole.pth').keys() == TENSORS.keys()


class Canary:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.place,)


def test_the_pickle_of_the_index_is_not_read(folder, tmp_path) -> None:
    (folder / '.metadata').write_bytes(pickle.dumps(Canary(tmp_path / 'ran')))
    assert read_whole(folder)['state_dict']
    assert not (tmp_path / 'ran').exists()


def test_code_in_a_piece_does_not_run(folder, tmp_path) -> None:
    torch.save(Canary(tmp_path / 'ran'), tmp_path / 'piece')
    piece = (tmp_path / 'piece').read_bytes()
    (folder / '__0_0.distcp').write_bytes(piece)

    def point(body: dict) -> None:
        body['files']['__0_0.distcp'] = len(piece)
        body['tensors'] = {
            'model.count': dict(dtype='int64', size=[], chunks=[[[], [], '__0_0.distcp', 0, len(piece)]])
        }

    change_index(folder, point)
    refused(folder)
    assert not (tmp_path / 'ran').exists()


def set_chunk(place: int, value: Any) -> Any:
    def change(body: dict) -> None:
        body['tensors']['model.a.weight']['chunks'][0][place] = value

    return change


def set_tensor(key: str, value: Any) -> Any:
    return lambda body: body['tensors']['model.a.weight'].update({key: value})


LIES = {
    'outside': set_chunk(2, '../../etc/passwd'),
    'absolute': set_chunk(2, '/etc/passwd'),
    'behind the end': set_chunk(3, 10**9),
    'before the start': set_chunk(3, -1),
    'longer than the file': set_chunk(4, 10**12),
    'too short': set_chunk(4, 3),
    'no number': set_chunk(3, '7'),
    'not inside the tensor': set_chunk(0, [2, 0]),
    'another rank': set_chunk(1, [3]),
    'larger': set_tensor('size', [10**9, 10**9]),
    'negative': set_tensor('size', [-3, -4]),
    'not covered': set_tensor('chunks', []),
    'no dtype': set_tensor('dtype', 'object'),
    'no list': set_tensor('chunks', 7),
    'a name': lambda body: body['tensors'].update({'\x1b[2J': body['tensors'].pop('model.count')}),
    'a file': lambda body: body['files'].update({'../x': 3}),
    'a size': lambda body: body['files'].update({'__0_0.distcp': True}),
    'no tensors': lambda body: body.pop('tensors'),
}


@pytest.mark.parametrize('lie', LIES)
def test_an_index_that_lies_is_refused(folder, lie) -> None:
    change_index(folder, LIES[lie])
    refused(folder)


def test_an_index_that_was_damaged_is_refused(folder) -> None:
    change_index(folder, set_chunk(0, [0, 0]), sign=True)
    change_index(folder, lambda body: body['tensors']['model.a.weight'].update(dtype='float64'), sign=False)
    assert 'checksum' in refused(folder)
    for content in (b'', b'[]', b'{"body": 3, "sha256": 4}', b'[' * 99999, b'\xff'):
        (folder / INDEX).write_bytes(content)
        refused(folder)


@pytest.mark.parametrize('how', ['gone', 'cut', 'longer', 'a link', 'noise'])
def test_a_shard_that_is_not_what_it_was(folder, tmp_path, how) -> None:
    shard = folder / '__0_0.distcp'
    content = shard.read_bytes()
    if how == 'a link':
        shard.rename(tmp_path / 'elsewhere')
        shard.symlink_to(tmp_path / 'elsewhere')
    elif how == 'gone':
        shard.unlink()
    else:
        shard.write_bytes({'cut': content[:-9], 'longer': content + b'x', 'noise': os.urandom(len(content))}[how])
    refused(folder)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_bit_changes_a_tensor(folder, data) -> None:
    name = data.draw(st.sampled_from([INDEX, '__0_0.distcp']))
    before = (folder / name).read_bytes()
    content = bytearray(before)
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    try:
        tensors = {key: torch.zeros_like(value) for key, value in TENSORS.items()}
        load_into(folder, tensors, alone=True)
    except CheckpointError:
        pass
    else:
        assert all(torch.equal(tensors[key], value) for key, value in TENSORS.items())
    finally:
        (folder / name).write_bytes(before)
