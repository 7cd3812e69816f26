"""Which checkpoints stay: old ones go last, and only those of the run itself."""

from pathlib import Path

import pytest
import torch

from mila_mm.engine.hooks.checkpoint import CheckpointHook
from mila_mm.errors import UserError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Hub(dict):
    """As much of a message hub as the hook needs."""

    @property
    def runtime_info(self) -> dict:
        """Return all of it."""
        return self

    def update_info(self, key: str, value: object) -> None:
        """Keep a value."""
        self[key] = value

    def get_info(self, key: str) -> object:
        """Return a value."""
        return self[key]


class Recorder:
    """A runner that writes down what was there whenever it saved."""

    def __init__(self, folder: Path) -> None:
        self.work_dir = str(folder)
        self.folder = folder
        self.message_hub = Hub()
        self.iter = self.epoch = 0
        self.seen: list[set[str]] = []
        self.logger = self
        self.fail = False
        self.hooks: list[CheckpointHook] = []
        self._resume, self._load_from = False, None

    def info(self, message: str) -> None:
        """Log nothing."""

    def call_hook(self, name: str) -> None:
        """Call no hook."""

    def save_checkpoint(self, out_dir, filename, *args, **kwargs) -> None:
        """Save, or fail."""
        self.seen.append({name for name in names(self.folder) if name.endswith('.pth')})
        if self.fail:
            raise UserError('no room')
        content = dict(
            meta=dict(kwargs['meta'], iter=self.iter + 1), message_hub=dict(runtime_info=dict(self.message_hub))
        )
        for hook in self.hooks:
            hook.before_save_checkpoint(self, content)
        torch.save(content, Path(out_dir) / filename)


@pytest.fixture
def recorder(tmp_path) -> Recorder:
    return Recorder(tmp_path)


def hook_of(recorder: Recorder, **options) -> CheckpointHook:
    hook = CheckpointHook(interval=1, by_epoch=False, **options)
    recorder.hooks = [hook]
    hook.before_train(recorder)
    return hook


def resumed(recorder: Recorder, file: Path, change=None, **options) -> CheckpointHook:
    """Let a new process continue from a checkpoint, in which a stranger may have changed something."""
    content = torch.load(file)
    if change is not None:
        change(content)
    hook = CheckpointHook(interval=1, by_epoch=False, **options)
    recorder._resume, recorder.hooks, recorder.message_hub = True, [hook], Hub()
    hook.after_load_checkpoint(recorder, content)
    recorder.iter = content['meta']['iter']
    recorder.message_hub.update(content['message_hub']['runtime_info'])
    hook.before_train(recorder)
    return hook


def checkpoints(folder: Path) -> set[str]:
    return {name for name in names(folder) if name.endswith('.pth')}


def save(hook: CheckpointHook, recorder: Recorder, step: int) -> None:
    recorder.iter = step - 1
    hook._save_checkpoint(recorder)


def test_an_old_checkpoint_goes_after_the_new_one_has_come(tmp_path, recorder) -> None:
    hook = hook_of(recorder, max_keep_ckpts=1)
    for step in (1, 2, 3):
        save(hook, recorder, step)
        assert {name for name in names(tmp_path) if name.endswith('.pth')} == {f'iter_{step}.pth'}
    assert recorder.seen == [set(), {'iter_1.pth'}, {'iter_2.pth'}]
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_3.pth')


def test_a_run_killed_before_it_could_remove_the_old_one_removes_it_later(tmp_path, recorder) -> None:
    hook = hook_of(recorder, max_keep_ckpts=2)
    for step in (1, 2):
        save(hook, recorder, step)
    hook._remove_surplus = lambda: None
    save(hook, recorder, 3)
    assert (tmp_path / 'iter_1.pth').exists()
    hook = resumed(recorder, tmp_path / 'iter_3.pth', max_keep_ckpts=2)
    assert checkpoints(tmp_path) == {'iter_2.pth', 'iter_3.pth'}
    save(hook, recorder, 4)
    assert checkpoints(tmp_path) == {'iter_3.pth', 'iter_4.pth'}


LISTS = {
    'surplus': lambda content: content.update(surplus_ckpt_id=1),
    'kept, of paths': lambda content: content['message_hub']['runtime_info'].update(keep_ckpt_ids=['../x', '/etc', 1]),
    'kept': lambda content: content['message_hub']['runtime_info'].update(keep_ckpt_ids=[1, 2, 3, -4, True, 10**30]),
    'best': lambda content: content['message_hub']['runtime_info'].update(best_ckpt='iter_1.pth'),
    'named': lambda content: content.update(named_best={'best_ckpt': 'best_other.pth', 3: 4}),
    'no list': lambda content: content['message_hub']['runtime_info'].update(keep_ckpt_ids='123', best_ckpt=7),
}


@pytest.mark.parametrize('lie', LISTS)
def test_what_a_strangers_checkpoint_lists_stays(tmp_path, recorder, lie) -> None:
    """Also where the stranger names files of this very folder: they are not of his run."""
    mine = hook_of(recorder)
    for step in (1, 2, 3):
        save(mine, recorder, step)
    torch.save(torch.load(tmp_path / 'iter_3.pth'), tmp_path / 'best_other.pth')
    content = torch.load(tmp_path / 'iter_3.pth')
    content['meta'].update(run_id='0' * 32, iter=9)
    torch.save(content, tmp_path / 'stranger.pth')
    before = checkpoints(tmp_path)
    hook = resumed(recorder, tmp_path / 'stranger.pth', LISTS[lie], max_keep_ckpts=1, save_best='s', rule='greater')
    hook.after_val_epoch(recorder, {'s': 0.5})
    for step in (10, 11):
        save(hook, recorder, step)
    assert checkpoints(tmp_path) == before | {'iter_11.pth', 'best_s_iter_9.pth'}


@pytest.mark.parametrize('run_id', [None, '', '../..', 'f' * 31, 'F' * 32, 5, ['f' * 32], '\x1b' * 32])
def test_an_id_that_is_none_inherits_nothing(tmp_path, recorder, run_id) -> None:
    mine = hook_of(recorder)
    for step in (1, 2):
        save(mine, recorder, step)
    hook = resumed(recorder, tmp_path / 'iter_2.pth', lambda c: c['meta'].update(run_id=run_id), max_keep_ckpts=1)
    save(hook, recorder, 3)
    assert checkpoints(tmp_path) == {'iter_1.pth', 'iter_2.pth', 'iter_3.pth'}
    content = torch.load(tmp_path / 'iter_3.pth')
    assert len(content['meta']['run_id']) == 32 and content['meta']['run_id'] != mine._run_id


def test_checkpoints_of_another_run_in_the_folder_and_later_ones_stay(tmp_path, recorder) -> None:
    other = hook_of(recorder)
    save(other, recorder, 1)
    mine = hook_of(recorder)
    for step in (2, 3, 4):
        save(mine, recorder, step)
    hook = resumed(recorder, tmp_path / 'iter_3.pth', max_keep_ckpts=1)
    assert checkpoints(tmp_path) == {'iter_1.pth', 'iter_3.pth', 'iter_4.pth'}
    save(hook, recorder, 4)
    assert checkpoints(tmp_path) == {'iter_1.pth', 'iter_4.pth'}


@pytest.mark.parametrize('spelling', ['{}', '{}/', './{}', '{}/../out', '{}//'])
def test_the_best_checkpoint_goes_after_a_resume_too(tmp_path, monkeypatch, recorder, spelling) -> None:
    """Also where checkpoints lie in a folder of their own, and where that was moved."""
    monkeypatch.chdir(tmp_path)
    out = dict(out_dir=spelling.format('out'), save_best='score', rule='greater')
    recorder.work_dir = str(tmp_path / 'work')
    folder = tmp_path / 'out/work'
    folder.mkdir(parents=True)
    recorder.folder = folder
    hook = hook_of(recorder, **out)
    hook.after_val_epoch(recorder, {'score': 0.1})
    save(hook, recorder, 2)

    def moved(content) -> None:
        info = content['message_hub']['runtime_info']
        assert Path(info['best_ckpt']).samefile(folder / 'best_score_iter_0.pth')
        info['best_ckpt'] = '/where/it/was/best_score_iter_0.pth'

    hook = resumed(recorder, folder / 'iter_2.pth', moved, **out)
    hook.after_val_epoch(recorder, {'score': 0.3})
    assert checkpoints(folder) == {'iter_2.pth', 'best_score_iter_2.pth'}


def test_the_best_checkpoints_by_several_scores(tmp_path, recorder) -> None:
    options = dict(save_best=['a', 'b'], rule='greater')
    hook = hook_of(recorder, **options)
    hook.after_val_epoch(recorder, {'a': 0.1, 'b': 0.2})
    save(hook, recorder, 2)
    hook = resumed(recorder, tmp_path / 'iter_2.pth', **options)
    hook.after_val_epoch(recorder, {'a': 0.3, 'b': 0.1})
    assert checkpoints(tmp_path) == {'iter_2.pth', 'best_a_iter_2.pth', 'best_b_iter_0.pth'}


def test_a_score_is_known_without_its_prefix(tmp_path, recorder) -> None:
    hook = hook_of(recorder, save_best='bbox_mAP', rule='greater')
    hook.after_val_epoch(recorder, {'own/segm_mAP': 0.9, 'coco/bbox_mAP': 0.2})
    save(hook, recorder, 2)
    hook.after_val_epoch(recorder, {'own/segm_mAP': 0.9, 'coco/bbox_mAP': 0.1})
    assert checkpoints(tmp_path) == {'iter_2.pth', 'best_bbox_mAP_iter_0.pth'}
    with pytest.raises(UserError, match="gives no 'bbox_mAP'; it gives coco/bbox_mAP, own/bbox_mAP"):
        hook.after_val_epoch(recorder, {'own/bbox_mAP': 0.9, 'coco/bbox_mAP': 0.2})


def test_a_best_checkpoint_of_another_place_or_run_stays(tmp_path, recorder) -> None:
    hook = hook_of(recorder, save_best='score', rule='greater')
    save(hook, recorder, 1)
    content = torch.load(tmp_path / 'iter_1.pth')
    (tmp_path / 'other').mkdir()
    elsewhere = [tmp_path / 'other/best_score_iter_0.pth', tmp_path.parent / f'best_{tmp_path.name}.pth']
    for path in elsewhere:
        torch.save(content, path)  # of this very run
    torch.save(dict(meta=dict(run_id='1' * 32)), tmp_path / 'best_of_another.pth')
    elsewhere.append(tmp_path / 'best_of_another.pth')
    for path in elsewhere:

        def named(content, path=path) -> None:
            content['message_hub']['runtime_info'].update(best_ckpt=str(path), best_score=-1.0)

        hook = resumed(recorder, tmp_path / 'iter_1.pth', named, save_best='score', rule='greater')
        hook.after_val_epoch(recorder, {'score': 0.5})
    assert all(path.exists() for path in elsewhere)


def test_a_failed_save_removes_nothing(tmp_path, recorder) -> None:
    hook = hook_of(recorder, max_keep_ckpts=1)
    save(hook, recorder, 1)
    recorder.fail = True
    with pytest.raises(UserError):
        save(hook, recorder, 2)
    assert (tmp_path / 'iter_1.pth').exists()
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_1.pth')


def test_the_best_checkpoint_goes_after_a_better_one_has_come(tmp_path, recorder) -> None:
    hook = hook_of(recorder, save_best='score', rule='greater')
    for step, score in ((1, 0.1), (2, 0.3), (3, 0.2)):
        recorder.iter = step
        hook.after_val_epoch(recorder, {'score': score})
    assert recorder.seen == [set(), {'best_score_iter_1.pth'}]
    assert {name for name in names(tmp_path) if name.endswith('.pth')} == {'best_score_iter_2.pth'}
    recorder.fail, recorder.iter = True, 4
    with pytest.raises(UserError):
        hook.after_val_epoch(recorder, {'score': 0.9})
    assert (tmp_path / 'best_score_iter_2.pth').exists()


def test_what_a_stop_saved_goes_with_the_next_regular_checkpoint(tmp_path, recorder) -> None:
    hook = hook_of(recorder)
    save(hook, recorder, 2)
    assert hook.save_stopped(recorder, dict(epoch=0, iter=2)) == str(tmp_path / 'iter_2.pth'), 'nothing new to save'
    assert hook.save_stopped(recorder, dict(epoch=0, iter=3)) == str(tmp_path / 'stop_iter_3.pth')
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'stop_iter_3.pth')
    (tmp_path / 'stop_iter_9.pth').touch()
    save(hook, recorder, 4)
    left = {name for name in names(tmp_path) if name.endswith('.pth')}
    assert left == {'iter_2.pth', 'iter_4.pth', 'stop_iter_9.pth'}, 'one of a later iteration is not ours to remove'


@pytest.mark.parametrize('spelling', ['./ckpts', 'ckpts//', './/ckpts', 'x/.././ckpts/', 'link'])
def test_what_a_stop_saved_stays_however_the_folder_is_written(tmp_path, recorder, monkeypatch, spelling) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'x').mkdir()
    (tmp_path / 'ckpts').mkdir()
    (tmp_path / 'link').symlink_to('ckpts')
    recorder.folder = tmp_path / 'ckpts' / tmp_path.name
    recorder.folder.mkdir()
    hook = hook_of(recorder, out_dir=spelling, save_best='score', rule='greater')
    assert Path(hook.save_stopped(recorder, dict(epoch=0, iter=3))).exists()
    assert names(recorder.folder) == {'stop_iter_3.pth'}
    recorder.iter = 4
    hook.best_ckpt_path = f'{tmp_path}/x/../ckpts/{tmp_path.name}/best_score_iter_4.pth'  # as a resumed run names it
    Path(hook.best_ckpt_path).touch()
    hook.after_val_epoch(recorder, {'score': 0.1})
    assert 'best_score_iter_4.pth' in names(recorder.folder)
