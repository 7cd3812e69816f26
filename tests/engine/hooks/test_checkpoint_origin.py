"""Checkpoints that an earlier version or mmengine has written, and those in an object store, are rotated as well."""

from pathlib import Path

import pytest
import torch
from mmengine.fileio import FileClient
from mmengine.fileio.backends import BaseStorageBackend, register_backend

from mila_mm.engine.hooks.checkpoint import CheckpointHook

NAME = 'upernet_20261127_210348'


class Hub(dict):
    """As much of a message hub as the hook needs."""

    runtime_info = property(lambda self: self)

    def update_info(self, key: str, value: object) -> None:
        """Keep a value."""
        self[key] = value

    def get_info(self, key: str) -> object:
        """Return a value."""
        return self[key]


class Saving:
    """A runner that saves little."""

    def __init__(self, work_dir: Path) -> None:
        self.work_dir, self.message_hub, self.logger = str(work_dir), Hub(), self
        self.iter = self.epoch = 0
        self.hook, self._resume, self._load_from = None, False, None

    def info(self, message: str) -> None:
        """Log nothing."""

    def call_hook(self, name: str) -> None:
        """Call no hook."""

    def save_checkpoint(self, out_dir, filename, *args, **kwargs) -> None:
        """Save."""
        content = state(self.iter + 1, kwargs['meta'].get('run_id'), **dict(self.message_hub))
        self.hook.before_save_checkpoint(self, content)
        remote, _, place = str(out_dir).rpartition('://')
        path = REMOTE[0] / place / filename if remote else Path(out_dir) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, path)

    def resume(self, file: Path, **options) -> CheckpointHook:
        """Continue in a new process."""
        content = torch.load(file)
        self.hook = CheckpointHook(interval=1, by_epoch=False, **options)
        self._resume, self.message_hub = True, Hub()
        self.hook.after_load_checkpoint(self, content)
        self.iter = content['meta']['iter']
        self.message_hub.update(content['message_hub']['runtime_info'])
        self.hook.before_train(self)
        return self.hook

    def save(self, *steps: int) -> None:
        """Save at some steps."""
        for step in steps:
            self.iter = step - 1
            self.hook._save_checkpoint(self)


REMOTE: list[Path] = []


def state(iteration: int, run_id: str | None = None, name: str = NAME, seed: int = 3, **info) -> dict:
    meta = dict(iter=iteration, epoch=0, seed=seed, experiment_name=name)
    return dict(meta=meta | (dict(run_id=run_id) if run_id else {}), message_hub=dict(runtime_info=info))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob('*.pth')}


def test_those_without_an_id_go_as_those_with_one(tmp_path) -> None:
    for step in (2, 4, 6):
        torch.save(state(step, best_ckpt='best_s_iter_2.pth'), tmp_path / f'iter_{step}.pth')
    torch.save(state(2), tmp_path / 'best_s_iter_2.pth')
    kept = {'iter_1.pth': state(1, name='other_20261127_210348'), 'iter_3.pth': state(3, seed=4)}
    kept |= {'iter_5.pth': state(5, run_id='0' * 32), 'iter_8.pth': state(8)}  # of other runs, and of later
    for name, content in kept.items():
        torch.save(content, tmp_path / name)
    runner = Saving(tmp_path)
    options = dict(max_keep_ckpts=2, save_best='s', rule='greater')
    runner.resume(tmp_path / 'iter_6.pth', **options)
    assert names(tmp_path) >= {'iter_2.pth', 'iter_4.pth'}, 'more than two may have been wanted then'
    runner.hook.after_val_epoch(runner, {'s': 0.5})
    runner.save(10)
    assert names(tmp_path) == {*kept, 'iter_2.pth', 'iter_6.pth', 'iter_10.pth', 'best_s_iter_6.pth'}
    (tmp_path / 'iter_8.pth').unlink()
    del kept['iter_8.pth']
    runner.resume(tmp_path / 'iter_10.pth', **options)  # the next start knows them, too
    runner.save(11)
    assert names(tmp_path) == {*kept, 'iter_2.pth', 'iter_10.pth', 'iter_11.pth', 'best_s_iter_6.pth'}


@pytest.mark.parametrize('name', ['', None, 'exp', 5, '\x1b_20261127_210348', 'x' * 400 + '_20261127_210348'])
def test_a_name_that_tells_nothing_inherits_nothing(tmp_path, name) -> None:
    for step in (2, 4):
        torch.save(state(step, name=name), tmp_path / f'iter_{step}.pth')
    runner = Saving(tmp_path)
    runner.resume(tmp_path / 'iter_4.pth', max_keep_ckpts=1)
    runner.save(5, 6)
    assert names(tmp_path) == {'iter_2.pth', 'iter_4.pth', 'iter_6.pth'}


def test_an_origin_that_is_another_run_s_id_is_not_believed(tmp_path) -> None:
    torch.save(state(2, run_id='a' * 32), tmp_path / 'iter_2.pth')
    content = state(4, run_id='b' * 32)
    content['meta']['origin'] = 'a' * 32
    torch.save(content, tmp_path / 'iter_4.pth')
    runner = Saving(tmp_path)
    runner.resume(tmp_path / 'iter_4.pth', max_keep_ckpts=1)
    runner.save(5)
    assert names(tmp_path) == {'iter_2.pth', 'iter_5.pth'}


class Store(BaseStorageBackend):
    """An object store, in a folder."""

    def join_path(self, path: str, *parts: str) -> str:
        """Join an address."""
        return '/'.join((str(path).rstrip('/'), *parts))

    def get_text(self, path: str) -> str:
        """Read text."""
        return self.get(path).decode()

    def _place(self, path: object) -> Path:
        return REMOTE[0] / str(path).partition('://')[2]

    def get(self, path: str) -> bytes:
        """Read."""
        return self._place(path).read_bytes()

    def exists(self, path: str) -> bool:
        """Look."""
        return self._place(path).exists()

    isfile = exists

    def isdir(self, path: str) -> bool:
        """There are none."""
        return False

    def remove(self, path: str) -> None:
        """Remove."""
        self._place(path).unlink()


def test_the_best_checkpoint_in_an_object_store_goes_after_a_resume(tmp_path) -> None:
    REMOTE[:] = [tmp_path / 'store']
    register_backend('fakestore', Store, force=True, prefixes='fakestore')
    FileClient.register_backend('fakestore', Store, force=True, prefixes='fakestore')  # asked as well
    options = dict(out_dir='fakestore://bucket', save_best='s', rule='greater')
    runner = Saving(tmp_path / 'run')
    (tmp_path / 'run').mkdir()
    runner.hook = CheckpointHook(interval=1, by_epoch=False, **options)
    runner.hook.before_train(runner)
    runner.hook.after_val_epoch(runner, {'s': 0.1})
    runner.save(2)
    store = tmp_path / 'store/bucket/run'
    assert names(store) == {'iter_2.pth', 'best_s_iter_0.pth'}
    torch.save(state(0, run_id='0' * 32), store / 'best_s_iter_1.pth')  # of another run
    runner.resume(store / 'iter_2.pth', **options)
    runner.hook.after_val_epoch(runner, {'s': 0.5})
    assert names(store) == {'iter_2.pth', 'best_s_iter_1.pth', 'best_s_iter_2.pth'}
