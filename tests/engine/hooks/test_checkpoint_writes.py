"""A checkpoint is written whole or not at all, also by mmengine."""

import errno
import os
from pathlib import Path

import pytest
import torch
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.fileio.backends import register_backend
from mmengine.runner import save_checkpoint

from mila_mm.engine.hooks import checkpoint as checkpointing
from mila_mm.engine.hooks.checkpoint import (
    AtomicLocalBackend,
    register_atomic_backend,
    remove_unfinished,
    write_atomically,
)
from mila_mm.errors import UserError


@pytest.fixture
def atomic():
    """mmengine writes through the atomic backend."""
    register_atomic_backend()
    yield
    register_backend('local', LocalBackend, force=True, prefixes='')


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_writes_into_new_folders_and_over_old_files(tmp_path) -> None:
    path = tmp_path / 'a/b.pth'
    for content in (b'one', b'two'):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert names(path.parent) == {'b.pth'}


def failing(code: int):
    def fill(file, content: bytes) -> None:
        file.write(content[: len(content) // 2])
        file.flush()
        raise OSError(code, os.strerror(code))

    return fill


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, code) -> None:
    path = tmp_path / 'epoch_1.pth'
    path.write_bytes(b'old')
    monkeypatch.setattr(checkpointing, '_fill', failing(code))
    with pytest.raises(UserError, match=rf'epoch_1\.pth cannot be written .*: {os.strerror(code)}\n.*--resume'):
        write_atomically(path, b'new content')
    assert path.read_bytes() == b'old'
    assert names(tmp_path) == {'epoch_1.pth'}


def test_an_interrupt_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch) -> None:
    path = tmp_path / 'epoch_1.pth'
    path.write_bytes(b'old')

    def interrupted(file, content: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpointing, '_fill', interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b'new')
    assert path.read_bytes() == b'old'
    assert names(tmp_path) == {'epoch_1.pth'}


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch) -> None:
    done = []
    monkeypatch.setattr(os, 'fsync', lambda descriptor: done.append('fsync'))
    replace = os.replace
    monkeypatch.setattr(os, 'replace', lambda old, new: (done.append('rename'), replace(old, new)))
    write_atomically(tmp_path / 'a', b'x')
    assert done == ['fsync', 'rename', 'fsync']


def test_mmengine_writes_through_it(tmp_path, atomic, monkeypatch) -> None:
    assert type(get_file_backend(str(tmp_path / 'a.pth'))) is AtomicLocalBackend
    path = tmp_path / 'a.pth'
    save_checkpoint({'a': torch.ones(2)}, str(path))
    assert torch.equal(torch.load(path)['a'], torch.ones(2))
    monkeypatch.setattr(checkpointing, '_fill', failing(errno.ENOSPC))
    with pytest.raises(UserError, match='No space left'):
        save_checkpoint({'a': torch.zeros(2)}, str(path))
    assert torch.equal(torch.load(path)['a'], torch.ones(2))


def test_only_what_is_unfinished_is_removed(tmp_path) -> None:
    (tmp_path / 'sharded.pth').mkdir()
    gone = ['.epoch_2.pth.77.unfinished', '.last_checkpoint.7.unfinished', 'sharded.pth/.rank0.pth.7.unfinished']
    # another run whose folder lies in this one's is writing
    kept = ['epoch_1.pth', '.hidden', 'notes.unfinished', 'other/.epoch_1.pth.8.unfinished']
    (tmp_path / 'other').mkdir()
    for name in gone + kept:
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    assert not any((tmp_path / name).exists() for name in gone)
    assert all((tmp_path / name).exists() for name in kept)
