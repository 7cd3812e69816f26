"""Pickles that run no code and still would take all memory, all time or the process: refused before they are read."""

import io
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from mila_mm import cli
from mila_mm.weights.errors import CheckpointError, UnsafeCheckpointError
from mila_mm.weights.exporting import export
from mila_mm.weights.file.reader import read_file
from mila_mm.weights.file.scan import Scan
from mila_mm.weights.load import is_finite, load_model

START = b'\x80\x02'


def named(module, name):
    return f'c{module}\n{name}\n'.encode()


def string(text):
    return b'X' + struct.pack('<I', len(text)) + text.encode()


def number(value):
    return b'\x8a\x08' + value.to_bytes(8, 'little', signed=True)


def doubled_key(levels):
    # a tuple of the tuple before, twice: its hash visits 2 ** levels values
    return START + b'}K\x01q\x00' + b'h\x00\x86q\x00' * levels + b'K\x01s.'


def hex_of_hex(levels):
    start = START + named('_codecs', 'encode') + b'q\x00' + string('aaaa') + string('latin1') + b'\x86Rq\x01'
    return start + string('hex') + b'q\x02' + b'h\x00h\x01h\x02\x86Rq\x01' * levels + b'.'


def copies(count):
    entries = b''.join(b'J' + struct.pack('<i', i) + b'N' for i in range(20_000))
    make = named('collections', 'OrderedDict') + b'q\x00h\x01\x85R'
    return START + b'](}q\x01(' + entries + b'u' + make + b'h\x00h\x01\x85R' * count + b'e.'


def filled_afterwards(count):
    # the list is empty when it is given to the calls, and full when they are made
    fetches = b'h\x00h\x01\x85' * count
    return START + b'](' + named('collections', 'Counter') + b'q\x00]q\x01' + fetches + b'h\x01K\x01ae.'


STORAGE = 'torch.storage'
BOMBS = {
    'storage made from a number': START + named(STORAGE, 'UntypedStorage') + number(1 << 45) + b'\x85R.',
    'storage made with new': START + named(STORAGE, 'UntypedStorage') + number(1 << 45) + b'\x85\x81.',
    'typed storage made from a number': START + named(STORAGE, 'TypedStorage') + number(1 << 45) + b'\x85R.',
    'bytes that double': hex_of_hex(60),
    'codec of another name': START + named('_codecs', 'encode') + string('a') + string('no_such') + b'\x86R.',
    'key that doubles': doubled_key(60),
    'key of two million tuples': START + b'}K\x01' + b'\x85' * 2_000_000 + b'K\x01s.',
    'copies of a large dict': copies(50_000),
    'list that grows after its use': filled_afterwards(10),
    'call of a list': START + b'])R.',
    'too few values': START + b'\x87.',
    'mark that was never set': START + b't.',
    'slot that was never filled': START + b'h\x05.',
    'no end': START + b']',
    'text that ends early': START + b'X\xff\xff\xff\xff.',
    'persistent id that is no storage': START + b'K\x01Q.',
    'attribute of a number': START + b'K\x01}b.',
    'protocol 5': pickle.dumps({'a': 1}, protocol=5),
}


def write(path, data):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        archive.writestr('x/data.pkl', data)
        archive.writestr('x/version', b'3\n')


@pytest.mark.parametrize('name', BOMBS)
def test_bomb_is_refused_at_once(name, tmp_path):
    write(tmp_path / 'bad.pth', BOMBS[name])
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        read_file(tmp_path / 'bad.pth')
    assert time.process_time() - start < 5
    assert str(tmp_path / 'bad.pth') in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_bombs_are_real():
    """torch alone: the key of many tuples ends the process, and what is small here shows that it grows."""
    code = (
        'import sys, torch\nfrom torch._weights_only_unpickler import load\n'
        "data = b'\\x80\\x02}K\\x01' + b'\\x85' * 2_000_000 + b'K\\x01s.'\nimport io\nload(io.BytesIO(data))"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, check=False)
    assert done.returncode < 0  # a signal
    from torch._weights_only_unpickler import load

    assert len(load(io.BytesIO(hex_of_hex(12)))) == 4 * 2**12
    assert load(io.BytesIO(BOMBS['storage made from a number'].replace(number(1 << 45), number(64)))).nbytes() == 64


@pytest.mark.parametrize('new_format', [True, False])
def test_scan_sees_what_torch_writes(tmp_path, new_format):
    """What checkpoints share legitimately (strings, small tuples, tied tensors, logs) stays far below the limits."""
    shared, tied = ('a', 'b') * 50, torch.ones(40, 50)
    content = {
        'state_dict': OrderedDict((f'layer.{i}.weight', tied if i % 2 else torch.full((i,), 2.0)) for i in range(300)),
        'optimizer': {'param_groups': [{'betas': (0.9, 0.999), 'classes': shared, 'params': [i]} for i in range(300)]},
        'log': {f'loss{i}': HistoryBuffer(list(range(500)), [1] * 500) for i in range(10)},
        'keys': {(1, ('a', 2.5)): None},
        'large': 10**40,
        'bytes': b'\x00\xff' * 500,
        'set': {1, 2},
        'half': torch.ones(3, dtype=torch.bfloat16),
        'unsigned': torch.ones(3, dtype=torch.uint16),
        'eight': torch.ones(3).to(torch.float8_e4m3fn),
        'parameter': torch.nn.Parameter(torch.ones(2)),
    }
    if not new_format:  # torch itself cannot read these there
        content.update(unsigned=torch.ones(3), eight=torch.ones(3))
    path = tmp_path / 'file.pth'
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    read = read_file(path)
    assert list(read['state_dict']) == list(content['state_dict'])
    assert read['keys'] == content['keys']
    assert read['large'] == content['large']
    assert read['bytes'] == content['bytes']
    assert read['unsigned'].dtype == content['unsigned'].dtype
    assert type(read['parameter']) is torch.Tensor
    if new_format:
        with zipfile.ZipFile(path) as archive:
            data = archive.read('file/data.pkl')
            scan = Scan(data).run()
            sizes = {
                name.rpartition('/')[2]: archive.getinfo(name).file_size
                for name in archive.namelist()
                if '/data/' in name
            }
        assert scan.storages == sizes
        assert scan.position == len(data)


def test_legacy_storage_declared_twice_counts_at_its_largest(tmp_path):
    """torch allocates at the first mention of a storage; a later, smaller one must not hide it."""
    tied = torch.arange(16.0)
    torch.save({'a': tied, 'b': tied[:2]}, tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    raw = (tmp_path / 'a.pth').read_bytes()
    assert raw.count(b'K\x10Ntq') == 2
    (tmp_path / 'a.pth').write_bytes(raw.replace(b'K\x10Ntq', number(10**12) + b'Ntq', 1))
    with pytest.raises(CheckpointError, match=r'declares 4,000,000,000,000 bytes'):
        read_file(tmp_path / 'a.pth')


def test_record_in_other_letters_is_not_overlooked(tmp_path):
    """torch finds records without regard to case: it would read the one that was not looked at."""
    evil = {'x/DATA.PKL': START + named('builtins', 'bytearray') + b'K\x05\x85R.', 'x/version': b'3\n'}
    for name, records in {'a': evil, 'b': {**evil, 'x/data.pkl': START + b'}.'}}.items():
        with zipfile.ZipFile(tmp_path / f'{name}.pth', 'w') as archive:
            for record, data in records.items():
                archive.writestr(record, data)
    assert torch.load(tmp_path / 'a.pth', weights_only=True) == bytearray(5)
    with pytest.raises(UnsafeCheckpointError, match='bytearray'):
        read_file(tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r'without a checkpoint'):
        read_file(tmp_path / 'b.pth')


def test_archive_behind_other_data_is_refused(tmp_path):
    torch.save({'a': torch.ones(2)}, tmp_path / 'a.pth')
    raw = (tmp_path / 'a.pth').read_bytes()
    (tmp_path / 'a.pth').write_bytes(b'PK\x03\x04' + b'\0' * 60 + raw)
    with pytest.raises(CheckpointError, match='behind other data'):
        read_file(tmp_path / 'a.pth')


def test_many_views_of_one_storage_are_refused(tmp_path):
    """A megabyte that would be written a thousand times by an export."""
    block = torch.ones(1 << 18)
    torch.save({'state_dict': {str(i): block.view(-1) for i in range(1000)}}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='exhaust memory'):
        export(tmp_path / 'a.pth', tmp_path / 'b.pth', naming='project')
    assert not (tmp_path / 'b.pth').exists()


def test_names_in_errors_cannot_steer_or_flood_the_terminal(tmp_path):
    write(tmp_path / 'a.pth', START + b'c\x1b[31mevil\x1b]0;t\x07\n' + b'x' * 5000 + b'\n.')
    with pytest.raises(UnsafeCheckpointError) as caught:
        read_file(tmp_path / 'a.pth')
    assert r'\x1b[31mevil' in str(caught.value)
    for text in ('\x1b', '\u202e'):
        for content in (
            {f'{text}{"x" * 5000}': 1},
            {'state_dict': {f'{text}{"x" * 5000}': 1}},
            {'state_dict': {f'{text}{"x" * 5000}': torch.ones(1)}},
        ):
            torch.save(content, tmp_path / 'b.pth')
            with pytest.raises(CheckpointError) as caught:
                load_model(torch.nn.Linear(1, 1), tmp_path / 'b.pth')
            assert str(caught.value).replace('\n', '').isprintable()
            assert len(str(caught.value)) < 900


def test_attributes_of_a_parameter_cannot_replace_its_methods(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.numel = parameter.is_floating_point = parameter.detach = 'evil'
    torch.save({'state_dict': {'weight': parameter}}, tmp_path / 'a.pth')
    read = read_file(tmp_path / 'a.pth')['state_dict']['weight']
    assert type(read) is torch.Tensor
    assert read.numel() == 2
    assert not read.requires_grad


@pytest.mark.parametrize(
    'metadata', [{'': {'version': 'x'}}, {'': [1]}, {5: {'version': 2}}, [], {'': {'version': {}}}]
)
def test_versions_of_modules_that_are_none_are_ignored(tmp_path, metadata):
    weights = OrderedDict(torch.nn.BatchNorm1d(3).state_dict())
    weights._metadata = metadata
    torch.save({'state_dict': weights}, tmp_path / 'a.pth')
    assert load_model(torch.nn.BatchNorm1d(3), tmp_path / 'a.pth').complete


@pytest.mark.parametrize('dtype', [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits(tmp_path, dtype):
    torch.save({'state_dict': {'weight': torch.ones(1, 1).to(dtype), 'bias': torch.ones(1)}}, tmp_path / 'a.pth')
    report = load_model(torch.nn.Linear(1, 1), tmp_path / 'a.pth')
    assert report.cast == [f'weight: {str(dtype)[6:]}']
    assert not is_finite(torch.tensor([float('nan')]).to(dtype))


def test_entries_that_are_no_tensors_do_not_break_the_tools(tmp_path, root, capsys):
    import importlib.util

    spec = importlib.util.spec_from_file_location('weights_tool_for_extras', root / 'tools' / 'weights.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    torch.save({'state_dict': {'a._extra_state': {'x': 1}, 'weight': torch.ones(2)}}, tmp_path / 'a.pth')
    assert cli.execute(tool.main, ['inspect', '--keys', str(tmp_path / 'a.pth')]) == 0
    assert (
        cli.execute(tool.main, ['export', '--names', 'project', str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth')]) == 0
    )
    assert list(torch.load(tmp_path / 'b.pth', weights_only=True)['state_dict']) == ['weight']
    assert 'Traceback' not in capsys.readouterr().err


def test_array_of_a_million_dimensions(tmp_path):
    array = np.ones(1)
    torch.save({'a': array}, tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.pth') as archive:
        data = archive.read('a/data.pkl')
    assert data.count(b'K\x01\x85') == 1
    write(tmp_path / 'a.pth', data.replace(b'K\x01\x85', b'(' + number(1 << 60) * 20_000 + b't'))
    start = time.process_time()
    with pytest.raises(CheckpointError, match='numpy array of shape'):
        read_file(tmp_path / 'a.pth')
    assert time.process_time() - start < 5
