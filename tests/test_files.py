import errno
import os
import stat
from pathlib import Path

import pytest

from mila_mm.files import UNFINISHED, move_into_place, open_regular, read_small, replacing, sync_folder, write_whole


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize('content', [b'', b'new', 'Länge\n'], ids=['empty', 'bytes', 'text'])
def test_a_file_is_replaced(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / 'a.json'
    path.write_bytes(b'old and longer')
    write_whole(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert entries(tmp_path) == {'a.json'}


def test_the_old_content_stands_until_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / 'a'
    path.write_bytes(b'old')
    with replacing(path) as draft:
        draft.write_bytes(b'new')
        assert path.read_bytes() == b'old'
        assert draft.parent == path.parent
        assert draft.name.startswith('.')
        assert draft.name.endswith(UNFINISHED)
    assert path.read_bytes() == b'new'


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'full'), KeyboardInterrupt(), ValueError('bad')], ids=repr)
def test_what_goes_wrong_leaves_the_old_content_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / 'a'
    path.write_bytes(b'old')
    with pytest.raises(type(error)), replacing(path) as draft:
        draft.write_bytes(b'ne')
        raise error
    assert path.read_bytes() == b'old'
    assert entries(tmp_path) == {'a'}


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch) -> None:
    done = []
    replace = os.replace
    monkeypatch.setattr(os, 'fsync', lambda descriptor: done.append(stat.S_ISDIR(os.fstat(descriptor).st_mode)))
    monkeypatch.setattr(os, 'replace', lambda old, new: (done.append('rename'), replace(old, new)))
    write_whole(tmp_path / 'a', b'x')
    assert done == [False, 'rename', True]


def test_a_file_system_that_refuses_to_sync_folders_will_do(tmp_path: Path, no_folder_sync: list[int]) -> None:
    write_whole(tmp_path / 'a', b'x')
    move_into_place(tmp_path / 'a', tmp_path / 'b')
    assert len(no_folder_sync) == 2
    assert (tmp_path / 'b').read_bytes() == b'x'
    for descriptor in no_folder_sync:
        with pytest.raises(OSError, match='Bad file descriptor'):
            os.fstat(descriptor)


def test_a_folder_that_may_not_be_opened_will_do(tmp_path: Path) -> None:
    sync_folder(tmp_path / 'absent')


def test_files_that_cannot_be_synced_are_an_error(tmp_path: Path, monkeypatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, 'the disk is broken')

    monkeypatch.setattr(os, 'fsync', broken)
    (tmp_path / 'a').write_bytes(b'old')
    with pytest.raises(OSError, match='broken'):
        write_whole(tmp_path / 'a', b'new')
    assert (tmp_path / 'a').read_bytes() == b'old'
    assert entries(tmp_path) == {'a'}


@pytest.mark.parametrize('kind', ['pipe', 'device', 'folder', 'link to nothing'])
def test_what_is_no_file_is_not_read(tmp_path, kind) -> None:
    path = tmp_path / 'x'
    make = {
        'pipe': os.mkfifo,
        'device': lambda path: path.symlink_to('/dev/zero'),
        'folder': Path.mkdir,
        'link to nothing': lambda path: path.symlink_to(tmp_path / 'nothing'),
    }
    make[kind](path)
    with pytest.raises(OSError):
        open_regular(path)


def test_a_small_file_is_small(tmp_path) -> None:
    (tmp_path / 'x').write_bytes(b'12345')
    assert read_small(tmp_path / 'x', 5) == b'12345'
    with pytest.raises(OSError, match='more than 4 bytes'):
        read_small(tmp_path / 'x', 4)


def test_a_link_in_the_place_of_a_draft_is_not_followed(tmp_path) -> None:
    victim = tmp_path / 'victim'
    victim.write_text('kept')
    names = []
    with replacing(tmp_path / 'a') as draft:
        names.append(draft)
    names[0].symlink_to(victim)
    write_whole(tmp_path / 'a', 'new')
    assert (victim.read_text(), (tmp_path / 'a').read_text()) == ('kept', 'new')
