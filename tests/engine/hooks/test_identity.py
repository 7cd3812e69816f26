"""A run that goes on knows whose checkpoint it takes, and refuses settings that it was not begun with."""

import re
from pathlib import Path

import pytest
import torch
from small_run import BF16, COSINE, FP16, STEP, Count, run

from mila_mm.engine.runner.identity import read_record
from mila_mm.engine.runner.lease import leased
from mila_mm.errors import UserError


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """Folder of a run that was killed at half its time."""
    run(tmp_path / 'run', end=5)
    return tmp_path / 'run'


def test_resume_takes_its_own_run_s_checkpoint(tmp_path) -> None:
    """A finished run lies in the folder; one that was started anew there and stopped goes on from where it was."""
    run(tmp_path)
    run(tmp_path, end=5)
    assert {path.name for path in tmp_path.glob('*.pth')} >= {'iter_4.pth', 'iter_8.pth'}
    assert list(run(tmp_path, resume=True).seen) == [4, 5, 6, 7]


def test_a_run_that_has_saved_nothing_does_not_take_another_s(tmp_path, capfd) -> None:
    run(tmp_path)
    run(tmp_path, end=1)
    assert list(run(tmp_path, resume=True).seen) == list(range(8))
    assert 'has saved nothing yet, and starts anew' in capfd.readouterr().out


@pytest.mark.parametrize('end', [7, 5])
def test_a_roll_back_stays(tmp_path, end) -> None:
    """Also before the run that was rolled back has saved anything."""
    run(tmp_path)
    run(tmp_path, resume=True, load_from=str(tmp_path / 'iter_4.pth'), end=end)
    assert next(iter(run(tmp_path, resume=True).seen)) == end // 2 * 2


def test_a_roll_back_by_hand(tmp_path) -> None:
    run(tmp_path)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_4.pth'))
    assert next(iter(run(tmp_path, resume=True).seen)) == 4


def test_a_finished_run_is_not_validated_again(tmp_path) -> None:
    run(tmp_path)
    done = Count.done
    assert not run(tmp_path, resume=True).seen
    assert done == Count.done


@pytest.mark.parametrize(
    ('options', 'said', 'names'),
    [
        (dict(lr=0.5), 'learning rate 0.1, now 0.5', 'lr'),
        (dict(schedule=[STEP]), 'schedule', 'schedule'),
        (dict(schedule=[]), 'schedule', 'schedule'),
        (dict(schedule=[STEP, dict(COSINE, T_max=9)]), 'schedule', 'schedule'),
        (dict(batch=4), 'batch 2 (images a process), now 4', 'batch'),
        (dict(images=12), 'epochs of 4 iterations (8 images), now of 6 (12)', 'epoch_length'),
        (dict(momentum=0.5), 'optimizer', 'optimizer'),
        (dict(lr=0.5, batch=4), 'learning rate', 'lr,batch'),
        (dict(amp=BF16), 'precision fp32, now bf16', 'precision'),
        (dict(classes=('b', 'a')), 'data set (classes ["a", "b"], now ["b", "a"])', 'data'),
    ],
)
def test_other_settings_are_refused_unless_named(half, options, said, names) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        run(half, resume=True, **options)
    assert f'--resume-changed {names}' in str(caught.value) and str(caught.value).count('\n') == 1
    with pytest.raises(UserError):
        run(half, resume=True, changed=('world_size', 'accumulation'), **options)
    assert list(run(half, resume=True, changed=names.split(','), **options).seen) == [4, 5, 6, 7]


def test_another_optimizer_cannot_go_on(half) -> None:
    with pytest.raises(UserError, match='holds the state of SGD, which AdamW cannot go on from'):
        run(half, resume=True, optimizer='AdamW', changed=('optimizer',))


@pytest.mark.parametrize(
    'options', [dict(lr=0.5), dict(schedule=[STEP]), dict(schedule=[dict(STEP, gamma=0.3), COSINE])]
)
def test_the_rates_are_those_of_a_run_with_the_new_settings(half, tmp_path, options) -> None:
    expected = run(tmp_path / 'other', **options).seen
    got = run(half, resume=True, changed=('lr', 'schedule'), **options)
    assert got.seen == pytest.approx({step: rate for step, rate in expected.items() if step >= 4})
    again = run(half, resume=True, load_from=str(half / 'iter_6.pth'), **options)  # now they are this run's
    assert again.seen == pytest.approx({step: rate for step, rate in expected.items() if step >= 6})


def test_another_momentum_is_taken(half) -> None:
    resumed = run(half, resume=True, momentum=0.5, changed=('optimizer',))
    assert resumed.runner.optim_wrapper.get_momentum()['momentum'] == [0.5]


def test_another_loss_scale_is_taken(tmp_path) -> None:
    """A checkpoint holds a scaler's settings as well, which would stand in place of the config's."""
    run(tmp_path, end=5, amp=dict(FP16, loss_scale=64.0))
    other = dict(FP16, loss_scale=dict(init_scale=32.0))
    with pytest.raises(UserError, match=r'precision fp16, loss_scale 64\.0, now fp16, loss_scale .*32\.0'):
        run(tmp_path, resume=True, amp=other)
    with pytest.raises(UserError, match=r'loss_scale 64\.0, now bf16\n.*--resume-changed precision'):
        run(tmp_path, resume=True, amp=BF16)
    resumed = run(tmp_path, resume=True, amp=other, changed=('precision',))
    assert resumed.runner.optim_wrapper.loss_scaler.get_scale() == 32.0
    resumed = run(tmp_path, resume=True, load_from=str(tmp_path / 'iter_6.pth'), changed=('precision',))
    assert list(resumed.seen) == [6, 7], 'from fp16 to fp32'


def test_without_the_schedules_states_nothing_starts_over_in_silence(half, tmp_path) -> None:
    path = half / 'iter_4.pth'
    content = torch.load(path, weights_only=False)
    del content['param_schedulers']
    torch.save(content, path)
    with pytest.raises(UserError, match='the states of 0 schedulers, while the config has 2'):
        run(half, resume=True)
    expected = run(tmp_path / 'straight').seen
    assert run(half, resume=True, changed=('schedule',)).seen == pytest.approx({k: expected[k] for k in range(4, 8)})


def test_epochs_of_another_length(tmp_path) -> None:
    """Whole epochs count: two of three are to do, of two iterations now."""
    run(tmp_path, kind='epoch', length=3, end=6)
    with pytest.raises(UserError, match='batch'):
        run(tmp_path, kind='epoch', length=3, batch=4, resume=True)
    seen = run(tmp_path, kind='epoch', length=3, batch=4, resume=True, changed=('batch',)).seen
    expected = run(tmp_path / 'other', kind='epoch', length=3, batch=4).seen
    assert seen == pytest.approx({step: expected[step] for step in range(2, 6)})


def test_a_longer_run_is_explained(half, capfd) -> None:
    assert list(run(half, resume=True, length=10).seen) == [4, 5, 6, 7, 8, 9]
    assert 'was to last 8 iterations, now 10 iterations' in capfd.readouterr().out


@pytest.mark.parametrize('said', [None, 'x', {'id': 3}, {'world_size': 'many'}])
def test_what_an_earlier_version_wrote_goes_on(half, capfd, said) -> None:
    path = half / 'iter_4.pth'
    content = torch.load(path, weights_only=False)
    content['meta']['run'] = said
    torch.save(content, path)
    (half / 'run.json').unlink()
    assert list(run(half, resume=True, lr=0.7).seen) == [4, 5, 6, 7]
    assert capfd.readouterr().out.count('does not say with which batch') == 1
    assert read_record(half).finished == 8


def test_a_stop_checkpoint_of_another_run_stays(tmp_path) -> None:
    run(tmp_path, end=4)
    (tmp_path / 'iter_2.pth').rename(tmp_path / 'stop_iter_2.pth')
    other = run(tmp_path, end=5)
    assert (tmp_path / 'stop_iter_2.pth').exists()
    (tmp_path / 'iter_4.pth').rename(tmp_path / 'stop_iter_4.pth')
    (tmp_path / 'last_checkpoint').write_text('stop_iter_4.pth')
    assert other.seen and list(run(tmp_path, resume=True).seen) == [4, 5, 6, 7]
    assert not (tmp_path / 'stop_iter_4.pth').exists() and (tmp_path / 'stop_iter_2.pth').exists()


def test_a_folder_in_use_is_left_as_it_is(half) -> None:
    with leased(half):
        before = sorted(half.rglob('*'))
        with pytest.raises(UserError, match='is in use by another run'):
            run(half, resume=True)
        assert sorted(half.rglob('*')) == before
    assert list(run(half, resume=True).seen) == [4, 5, 6, 7]
