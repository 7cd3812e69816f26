"""Files that are cut off, damaged or foreign, or ask for more than they hold: each is named with its cause."""

import json
import os
import shutil
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from mila_mm.weights.errors import CheckpointError, UnsafeCheckpointError
from mila_mm.weights.file.reader import read_file


def save(content, path, **kwargs):
    torch.save(content, path, **kwargs)


def weights():
    return OrderedDict(a=torch.arange(4.0), b=torch.ones(2, 3))


def rewrite(path, change):
    """Change the pickle inside a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            new = change(data) if name.endswith('data.pkl') else data
            assert new != data or not name.endswith('data.pkl')
            archive.writestr(name, new)


def damaged_files():
    """Yield name, writer(path, canary), and words that the error must hold."""
    for percent in (1, 25, 50, 75, 99):
        yield f'zip truncated at {percent} %', lambda p, c, n=percent: truncated(p, n), 'truncated or damaged'
        yield (
            f'legacy truncated at {percent} %',
            lambda p, c, n=percent: truncated(p, n, _use_new_zipfile_serialization=False),
            'truncated',
        )
        yield f'safetensors truncated at {percent} %', lambda p, c, n=percent: truncated_safetensors(p, n), ''
    yield 'zero length', lambda p, c: p.write_bytes(b''), '0 bytes'
    yield 'one byte', lambda p, c: p.write_bytes(b'P'), ''
    yield 'web page', lambda p, c: p.write_text('<!doctype html><html>404</html>'), 'web page'
    yield 'answer in JSON', lambda p, c: p.write_text('{"error": "rate limit"}'), 'JSON'
    yield (
        'Git LFS pointer',
        lambda p, c: p.write_text('version https://git-lfs.github.com/spec/v1\noid'),
        'git lfs pull',
    )
    yield 'gzip', lambda p, c: p.write_bytes(b'\x1f\x8b\x08' + b'\0' * 50), 'gzip'
    yield 'noise', lambda p, c: p.write_bytes(np.random.default_rng(0).bytes(5000)), 'no known checkpoint format'
    yield 'folder', lambda p, c: p.mkdir(), 'folder'
    yield 'zip without a checkpoint', lambda p, c: zipped(p, {'readme.txt': b'hello'}), 'no data.pkl'
    yield 'zip around a checkpoint', lambda p, c: zipped(p, {'net.pth': b'\x80\x02}.'}), 'unzip'
    yield 'TorchScript', lambda p, c: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), p), 'TorchScript'
    yield (
        'zip bomb beside the data',
        lambda p, c: zipped(p, {'x/data.pkl': b'\x80\x02}.', 'x/data/0': b'\0' * 10_000_000}, zipfile.ZIP_DEFLATED),
        'zip bomb',
    )
    yield 'zip bomb', lambda p, c: zipped(p, {'x/data.pkl': b'\0' * 10_000_000}, zipfile.ZIP_DEFLATED), 'zip bomb'
    yield 'zip that declares 4 TB', declares_terabytes, ''
    yield 'record that is larger than the file', lying_directory, 'declares'
    yield 'storage that is larger than its record', larger_storage, 'does not match'
    yield 'legacy storage of 4 TB', lambda p, c: larger_legacy_storage(p, 10**12), 'declares'
    yield 'legacy storage of a negative size', lambda p, c: larger_legacy_storage(p, -5), ''
    yield 'tensor expanded to 4 TB', lambda p, c: save({'a': torch.zeros(1).expand(10**12)}, p), 'exhaust memory'
    yield 'tensor without values', lambda p, c: save({'a': torch.zeros(5, device='meta')}, p), ''
    yield 'sparse tensor', lambda p, c: save({'a': torch.eye(3).to_sparse()}, p), 'sparse'
    yield 'list inside itself', cyclic, 'inside themselves'
    yield 'nested 200 deep', lambda p, c: save(nested(200), p), 'deep'
    yield 'huge safetensors header', lambda p, c: p.write_bytes(struct.pack('<Q', 1 << 60) + b'{"a":1}'), 'header'
    yield 'safetensors header that is no JSON', lambda p, c: p.write_bytes(struct.pack('<Q', 20) + b'{' * 40), 'header'
    yield 'safetensors that declares more', safetensors_lie, 'need'
    yield 'pickle bytes flipped', flipped, ''
    yield 'memo slot of 2 G', memo_bomb, ''
    for flag in (0x1, 0x20, 0x40):
        yield f'zip record with flag {flag:#x}', lambda p, c, f=flag: flagged(p, f), 'encrypted or patched'
    for end in ('Infinity', '1e999', '4.0', 'true', 'NaN'):
        yield f'safetensors that end at {end}', lambda p, c, e=end: offsets(p, e), 'header is damaged'
    yield 'path that doubles', path_bomb, 'multiplies its contents'


def truncated(path, percent, **kwargs):
    save({'model': {str(i): torch.randn(100) for i in range(50)}}, path, **kwargs)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * percent // 100])


def truncated_safetensors(path, percent):
    from safetensors.torch import save_file

    save_file({str(i): torch.randn(100) for i in range(50)}, path)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) * percent // 100])


def zipped(path, records, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', method) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def central_directory(path):
    raw = bytearray(path.read_bytes())
    return raw, raw.index(b'PK\x01\x02')


def declares_terabytes(path, canary):
    save(weights(), path)
    raw, at = central_directory(path)
    raw[at + 10 : at + 12] = struct.pack('<H', 8)  # deflated
    raw[at + 24 : at + 28] = struct.pack('<I', 0xFFFFFFF0)
    path.write_bytes(bytes(raw))


def lying_directory(path, canary):
    save(weights(), path)
    raw, at = central_directory(path)
    raw[at + 20 : at + 28] = struct.pack('<II', 0x7FFFFFFF, 0x7FFFFFFF)
    path.write_bytes(bytes(raw))


def larger_storage(path, canary):
    save({'a': torch.arange(16.0)}, path)
    rewrite(path, lambda data: data.replace(b'K\x10tq', b'\x8a\x06' + (10**12).to_bytes(6, 'little') + b'tq', 1))


def larger_legacy_storage(path, count):
    save({'a': torch.arange(16.0)}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    assert raw.count(b'K\x10Ntq') == 1
    path.write_bytes(raw.replace(b'K\x10Ntq', b'\x8a\x07' + count.to_bytes(7, 'little', signed=True) + b'Ntq'))


def cyclic(path, canary):
    loop = []
    loop.append(loop)
    save({'a': loop}, path)


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def safetensors_lie(path, canary):
    header = json.dumps({'a': {'dtype': 'F32', 'shape': [10**9], 'data_offsets': [0, 4 * 10**9]}}).encode()
    path.write_bytes(struct.pack('<Q', len(header)) + header + b'\0' * 16)


def flipped(path, canary):
    save({'a': torch.arange(16.0)}, path)
    rewrite(path, lambda data: data[:40] + bytes(255 - b for b in data[40:60]) + data[60:])


def flagged(path, flag):
    save(weights(), path)
    raw = bytearray(path.read_bytes())
    at = raw.index(b'PK\x01\x02')
    raw[at + 8] |= flag
    path.write_bytes(raw)


def offsets(path, end):
    header = ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,' + end + ']}}').encode()
    path.write_bytes(struct.pack('<Q', len(header)) + header + b'\0' * 4)


def path_bomb(path, canary):
    # PosixPath(a, a) from memo slot 1, 40 times: a path of 2**40 letters
    turns = b'h\x00h\x01h\x01\x86Rq\x01' * 40
    start = b'\x80\x02cpathlib\nPosixPath\nq\x00U\x08aaaaaaaaq\x01'
    zipped(path, {'x/data.pkl': start + turns + b'}.', 'x/version': b'3\n'})


def memo_bomb(path, canary):
    save({'a': torch.arange(16.0)}, path, _use_new_zipfile_serialization=False)
    raw = path.read_bytes()
    assert b'q\x00' in raw
    at = raw.rindex(b'}q\x00')
    path.write_bytes(raw[:at] + b'}r' + struct.pack('<I', 0x7FFFFFFF) + raw[at + 3 :])


DAMAGED = list(damaged_files())
BAD = [pytest.param(write, words, id=name) for name, write, words in DAMAGED]


@pytest.mark.parametrize('cover', ['torch\nfloat', 'collections\nOrderedDict', 'torch\nX' + 'x' * 150])
def test_string_cannot_hide_a_global(cover, tmp_path):
    """bytearray is on torch's own list: only the screen stands between a number in the file and an allocation."""
    text = b'c' + cover.encode()
    body = b'\x80\x02}U' + bytes([len(text)]) + text + b'cbuiltins\nbytearray\nM\xe8\x03\x85Rs.'
    zipped(tmp_path / 'a.pth', {'a/data.pkl': body, 'a/version': b'3\n'})
    assert torch.load(tmp_path / 'a.pth', weights_only=True)[text.decode()] == bytearray(1000)
    with pytest.raises(UnsafeCheckpointError, match=r'builtins\.bytearray'):
        read_file(tmp_path / 'a.pth')


def test_there_are_enough_bad_files():
    assert len(DAMAGED) >= 35


@pytest.mark.parametrize(('write', 'words'), BAD)
def test_bad_file(write, words, refused):
    refused(write, words)


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / 'file.pth'
    save(weights(), path)
    real = os.open

    def refuse(name, *args, **kwargs):
        if Path(name) == path:
            raise PermissionError(13, 'Permission denied')
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, 'open', refuse)
    with pytest.raises(CheckpointError, match='Permission denied'):
        read_file(path)


def test_nothing_is_left_in_memory_by_a_bomb(tmp_path):
    """Refused before allocation: the peak of this process does not move by what is declared."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for count in (10**12, 10**10):
        larger_legacy_storage(tmp_path / 'bomb.pth', count)
        with pytest.raises(CheckpointError, match='declares'):
            read_file(tmp_path / 'bomb.pth')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    shutil.rmtree(tmp_path)
