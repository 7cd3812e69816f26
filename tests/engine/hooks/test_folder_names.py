"""One folder, however it is spelled: a run finds what it has saved there, and no second one writes there."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from small_run import run

from mila_mm.engine.runner.lease import LEASE, leased
from mila_mm.errors import UserError

SPELLINGS = ['./{}', './/{}//', 'there/../{}', './{}/.', 'link/', 'absolute']


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spelled(spelling: str, name: str) -> str:
    if spelling.startswith('link'):
        Path(name).mkdir(exist_ok=True)
        Path('link').symlink_to(name, target_is_directory=True)
    return os.path.abspath(name) if spelling == 'absolute' else spelling.format(name)


def saved(folder: str | Path = '.') -> set[str]:
    return {path.name for path in Path(folder).glob('*.pth')}


def train(work_dir: str, iters: int, **options: Any) -> list[int]:
    """Train, keeping the two newest checkpoints; return the iterations that were done."""
    checkpoint = dict(max_keep_ckpts=2, **options.pop('checkpoint', {}))
    return list(run(work_dir, length=iters, checkpoint=checkpoint, **options).seen)


@pytest.mark.parametrize('spelling', SPELLINGS)
def test_a_work_folder(here, spelling) -> None:
    train('run', 4)
    name = spelled(spelling, 'run')
    assert train(name, 6, resume=True) == [4, 5]
    assert saved('run') == {'iter_4.pth', 'iter_6.pth'}
    assert train('run', 8, resume=True) == [6, 7]
    with leased(name), pytest.raises(UserError, match='is in use by another run'):
        train('run', 8, resume=True)


@pytest.mark.parametrize('spelling', SPELLINGS)
def test_a_folder_for_checkpoints(here, spelling) -> None:
    """Of two runs with folders of one name the second would write where the first does."""
    train('a/run', 4, checkpoint=dict(out_dir='out'))
    options = dict(resume=True, checkpoint=dict(out_dir=spelled(spelling, 'out')))
    assert train('a/run', 6, **options) == [4, 5]
    assert saved('out/run') == {'iter_4.pth', 'iter_6.pth'} and not saved('a/run')
    with leased('out/run'), pytest.raises(UserError, match='is in use by another run'):
        train('b/run', 2, **options)
    assert not Path('b/run').exists() or not list(Path('b/run').rglob('*.pth'))
    assert train('a/run', 8, resume=True, checkpoint=dict(out_dir='out')) == [6, 7]


NAMED: list[tuple[bytes | Callable[[Path], Any], int]] = [
    (b'', 4),
    (b'iter_2.pth\r\n', 2),
    (b'\r\n', 4),
    (b'run', 4),
    (b'.', 4),
    (b'/', 4),
    (b'/etc/passwd', 4),
    (b'../elsewhere/iter_2.pth', 2),  # the name counts: the folder may have been moved
    (b'../elsewhere/other.pth', 4),
    (Path.mkdir, 4),
    (os.mkfifo, 4),
]


@pytest.mark.parametrize(('content', 'begins'), NAMED, ids=lambda value: getattr(value, '__name__', repr(value)))
def test_what_last_checkpoint_may_say(here, content, begins) -> None:
    """Of the run's own checkpoints it chooses one; all else that it says leads nowhere."""
    train('run', 4)
    train('elsewhere', 2)
    Path('elsewhere/iter_2.pth').rename('elsewhere/other.pth')
    last = Path('run/last_checkpoint')
    last.unlink()
    last.write_bytes(content) if isinstance(content, bytes) else content(last)
    if content is not Path.mkdir:
        assert next(iter(train('run', 6, resume=True))) == begins
    else:
        with pytest.raises(UserError, match='last_checkpoint'):  # cannot be replaced by a file
            train('run', 6, resume=True)
        last.rmdir()
        assert next(iter(train('run', 6, resume=True))) == begins
    assert saved('elsewhere') == {'other.pth'}


def test_two_that_start_at_the_same_moment(here) -> None:
    """One trains, and the other has changed nothing."""
    ends, begun = [], threading.Barrier(2)

    def start() -> None:
        begun.wait()
        try:
            with leased('run'):
                ends.append(train_inside())
        except UserError as error:
            ends.append(str(error))

    def train_inside() -> str:
        Path('run/iter_1.pth').write_text('x')
        threading.Event().wait(0.3)
        return 'trained'

    both = [threading.Thread(target=start) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert sorted(end == 'trained' for end in ends) == [False, True], ends
    assert 'is in use by another run' in ''.join(ends) and not Path('run', LEASE).exists()


class ReadOnly(Hook):
    """From an iteration on files can be opened for reading only, as on a disk with errors that the system remounts."""

    priority = 'LOWEST'

    def __init__(self, patch: pytest.MonkeyPatch, begin: int) -> None:
        self.patch, self.begin = patch, begin

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter != self.begin:
            return
        inner = os.open

        def refuse(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return inner(path, flags, *args, **kwargs)

        self.patch.setattr(os, 'open', refuse)


def test_a_disk_that_can_only_be_read_from_any_more(here, monkeypatch) -> None:
    words = r'iter_6\.pth cannot be written .*: Read-only file system\n.*--resume'
    with monkeypatch.context() as patch, pytest.raises(UserError, match=words):
        train('run', 8, hooks=[ReadOnly(patch, 5)])
    assert saved('run') == {'iter_2.pth', 'iter_4.pth'}
    assert torch.load('run/iter_4.pth', weights_only=False)['meta']['iter'] == 4
    assert train('run', 8, resume=True) == [4, 5, 6, 7]
