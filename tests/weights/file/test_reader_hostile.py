"""Files that would execute code: none does, each is named with its cause, by the tools too."""

import argparse
import builtins
import io
import os
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import load_state_dict

from mila_mm.weights.errors import CheckpointError, UnsafeCheckpointError
from mila_mm.weights.file.reader import read_file


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


def shell(canary):
    return Call(os.system, f'touch {canary}')


def evaluate(canary):
    return Call(eval, f"open({str(canary)!r}, 'w').close()")


def execute(canary):
    return Call(exec, f"open({str(canary)!r}, 'w').close()")


def import_and_write(canary):
    return Call(getattr(pickle, 'loads'), pickle.dumps(evaluate(canary)))  # noqa: B009 - by name, as an attacker would


def open_file(canary):
    return Call(open, str(canary), 'w')


def dunder_import(canary):
    return Call(builtins.__import__, 'antigravity')


def save(content, path, **kwargs):
    torch.save(content, path, **kwargs)


def weights():
    return OrderedDict(a=torch.arange(4.0), b=torch.ones(2, 3))


POSITIONS = {
    'at the top': lambda evil: evil,
    'as a weight': lambda evil: {'model': OrderedDict(weights(), c=evil)},
    'as a key': lambda evil: {'model': weights(), (1, evil): 2},
    'in the optimizer': lambda evil: {'state_dict': weights(), 'optimizer': {'state': {0: {'exp_avg': [evil]}}}},
    'in the meta data': lambda evil: {'state_dict': weights(), 'meta': {'hook_msgs': (evil, 1)}},
    'in a namespace': lambda evil: {'model': weights(), 'args': argparse.Namespace(lr=evil)},
    'as the state of an object': lambda evil: {'model': weights(), 'x': Call(OrderedDict, state={'attribute': evil})},
    'in the arguments of a call': lambda evil: {'model': weights(), 'x': Call(OrderedDict, [('a', evil)])},
}
PAYLOADS = [shell, evaluate, execute, import_and_write, open_file, dunder_import]


def hostile_files():
    """Yield name, writer(path, canary), and words that the error must hold."""
    for position, place in POSITIONS.items():
        yield f'os.system {position}', lambda p, c, f=place: save(f(shell(c)), p), 'posix.system'
    for payload in PAYLOADS[1:]:
        yield (
            f'{payload.__name__} as a weight',
            lambda p, c, f=payload: save(POSITIONS['as a weight'](f(c)), p),
            'no file of weights needs',
        )
    for position in ('at the top', 'as a weight', 'in the optimizer'):
        yield (
            f'legacy os.system {position}',
            lambda p, c, f=POSITIONS[position]: save(f(shell(c)), p, _use_new_zipfile_serialization=False),
            'posix.system',
        )
    yield 'bare pickle', lambda p, c: p.write_bytes(pickle.dumps({'model': evaluate(c)}, protocol=2)), 'bare pickle'
    yield 'bare pickle of protocol 5', lambda p, c: p.write_bytes(pickle.dumps(shell(c), protocol=5)), 'bare pickle'
    yield (
        'pickle of protocol 4 in a zip',
        lambda p, c: save(POSITIONS['as a weight'](shell(c)), p, pickle_protocol=4),
        '',
    )
    yield (
        'getattr beyond HistoryBuffer',
        lambda p, c: save({'model': weights(), 'x': Call(getattr, 'a', 'upper')}, p),
        'only statistics of a HistoryBuffer',
    )
    yield (
        'getattr chain to the globals of a module',
        lambda p, c: save({'x': Call(getattr, Call(getattr, HistoryBuffer, 'mean'), '__globals__')}, p),
        'only statistics',
    )
    yield 'subclass of a tensor', lambda p, c: save({'model': torch.zeros(2).as_subclass(Odd)}, p), 'no file of weights'
    yield 'bytearray made from a number', lambda p, c: save({'a': Call(bytearray, 10**12)}, p), 'bytearray'
    yield 'tensor made from a number', lambda p, c: save({'a': Call(torch.FloatTensor, 10**12)}, p), 'FloatTensor'
    yield 'code in the version record of the legacy format', legacy_with_evil_magic, ''
    yield 'numpy array of objects', lambda p, c: save({'a': np.array([evaluate(c)], dtype=object)}, p), ''
    yield 'numpy array with a huge shape', numpy_bomb, 'numpy'
    yield (
        'history buffer with a call in it',
        lambda p, c: save({'h': evil_history(evaluate(c))}, p),
        'no file of weights',
    )
    yield 'function of the history', lambda p, c: save({'h': Call(HistoryBuffer.register_statistics, print)}, p), ''
    yield 'tar', tar_file, 'tar'


def tar_file(path, canary):
    with tarfile.open(path, 'w') as archive:
        info = tarfile.TarInfo('pickle')
        data = pickle.dumps(shell(canary), protocol=2)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))


class Odd(torch.Tensor):
    """A class that only its author has."""


def evil_history(evil):
    history = HistoryBuffer([1], [1])
    history.__dict__['_log_history'] = [evil]
    return history


def legacy_with_evil_magic(path, canary):
    save(weights(), path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    at = raw.index(b'.') + 1  # behind the magic number comes the version
    path.write_bytes(raw[:at] + pickle.dumps(shell(canary), protocol=2) + raw[at:])


def numpy_bomb(path, canary):
    save({'a': np.arange(3.0)}, path)
    rewrite(path, lambda data: data.replace(b'K\x03\x85', b'\x8a\x06' + (10**12).to_bytes(6, 'little') + b'\x85', 1))


def rewrite(path, change):
    """Change the pickle inside a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            new = change(data) if name.endswith('data.pkl') else data
            assert new != data or not name.endswith('data.pkl')
            archive.writestr(name, new)


HOSTILE = list(hostile_files())
BAD = [pytest.param(write, words, id=name) for name, write, words in HOSTILE]


def test_there_are_enough_bad_files():
    assert len(HOSTILE) >= 25


@pytest.mark.parametrize(('write', 'words'), BAD)
def test_bad_file(write, words, refused):
    refused(write, words)


@pytest.mark.parametrize('payload', PAYLOADS[:-1], ids=lambda f: f.__name__)
def test_these_payloads_do_execute_where_nothing_stops_them(payload, tmp_path, canary):
    """The canary would sing: otherwise the tests above show nothing."""
    path = tmp_path / 'bad.pth'
    save({'model': payload(canary)}, path)
    torch.load(path, weights_only=False)
    assert canary.exists()


def test_onedl_mmengine_alone_would_execute(tmp_path, canary):
    """The gap that the loaders close is real in the installed version: ask an unpatched copy."""
    from mmengine.runner import checkpoint as patched

    source = Path(patched.__file__).read_text(encoding='utf-8').partition('class _IncompatibleKeys')[0]
    upstream = {'__name__': 'a_copy'}
    exec(compile(source, patched.__file__, 'exec'), upstream)
    path = tmp_path / 'bad.pth'
    save({'model': shell(canary)}, path)
    upstream['_safe_torch_load'](str(path), map_location='cpu')
    assert canary.exists()


def test_what_others_allow_is_not_allowed_here(tmp_path, canary):
    path = tmp_path / 'bad.pth'
    save({'x': Call(getattr, 'a', 'upper')}, path)
    with torch.serialization.safe_globals([getattr, eval]):
        before = set(torch.serialization.get_safe_globals())
        with pytest.raises(CheckpointError):
            read_file(path)
        save({'model': evaluate(canary)}, path)
        with pytest.raises(UnsafeCheckpointError):
            read_file(path)
        assert set(torch.serialization.get_safe_globals()) == before
    assert not canary.exists()


def test_environment_cannot_turn_it_off(tmp_path, canary, monkeypatch):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    save({'model': shell(canary)}, tmp_path / 'bad.pth')
    with pytest.raises(UnsafeCheckpointError):
        read_file(tmp_path / 'bad.pth')
    assert not canary.exists()


def test_history_cannot_replace_statistics_of_the_class(tmp_path):
    history = HistoryBuffer([1.0, 3.0], [1, 1])
    history._statistics_methods = {'mean': HistoryBuffer.max}
    save({'h': history}, tmp_path / 'file.pth')
    assert read_file(tmp_path / 'file.pth')['h'].statistics('mean') == 2.0
    assert HistoryBuffer._statistics_methods['mean'] is HistoryBuffer.mean


def test_attributes_of_a_state_dict_cannot_replace_its_methods(tmp_path):
    tensors = weights()
    tensors.__dict__['keys'] = 'evil'
    tensors._metadata = OrderedDict({'': {'version': 1}})
    torch.save({'state_dict': tensors}, tmp_path / 'file.pth')
    read = read_file(tmp_path / 'file.pth')['state_dict']
    assert list(read.keys()) == ['a', 'b']
    assert read._metadata == {'': {'version': 1}}
    load_state_dict(torch.nn.Module(), read)
