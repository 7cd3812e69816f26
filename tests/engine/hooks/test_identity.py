"""A run that goes on knows whose checkpoint it takes, and refuses settings that it was not begun with."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from torch import Tensor, nn

from mila_mm.engine.config.prepare import make_safe
from mila_mm.engine.runner.identity import read_record
from mila_mm.engine.runner.lease import leased
from mila_mm.engine.runner.runner import Runner
from mila_mm.errors import UserError

COUNTER = itertools.count()
STEP, COSINE = dict(type='StepLR', step_size=2, gamma=0.5), dict(type='CosineAnnealingLR', T_max=8, eta_min=1e-3)


BF16 = dict(type='mila_mm.AmpOptimWrapper', dtype='bf16')
FP16 = dict(type='mila_mm.AmpOptimWrapper', dtype='fp16')


class Numbers(torch.utils.data.Dataset):
    """Eight numbers or so."""

    def __init__(self, length: int, classes: tuple = ()) -> None:
        self.length, self.metainfo = length, dict(classes=classes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(inputs=torch.tensor([float(index)]))


class Line(BaseModel):
    """A model of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, inputs: Tensor, mode: str = 'tensor') -> Any:
        """Compute."""
        out = self.layer(torch.stack(list(inputs)) / 8)
        return dict(loss=out.square().mean()) if mode == 'loss' else list(out)


class Count(BaseMetric):
    """Counts validations."""

    done = 0

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Take a batch."""
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Count."""
        Count.done += 1
        return dict(score=0.0)


class Rates(Hook):
    """Notes the learning rate of each iteration, and may end the run."""

    def __init__(self, end: int | None) -> None:
        self.end, self.seen = end, {}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Note, or end."""
        if runner.iter == self.end:
            raise InterruptedError
        self.seen[runner.iter] = runner.optim_wrapper.get_lr()['lr'][0]


def run(folder: Path, *, kind: str = 'iter', end: int | None = None, changed: tuple = (), **options: Any) -> Rates:
    """Train for eight iterations, four to an epoch, saving after every second one or every epoch."""
    by_epoch = kind == 'epoch'
    settings = dict(batch=2, images=8, lr=0.1, optimizer='SGD', schedule=[STEP, COSINE], momentum=0.9, length=None)
    settings |= dict(amp={}, classes=('a', 'b'))
    settings.update(options)
    loop = dict(by_epoch=by_epoch, val_interval=1 if by_epoch else 4)
    loop['max_epochs' if by_epoch else 'max_iters'] = settings['length'] or (2 if by_epoch else 8)
    momentum = dict(momentum=settings['momentum']) if settings['optimizer'] == 'SGD' else {}
    schedule = [dict(each, by_epoch=False) for each in settings['schedule']]
    loader = dict(batch_size=settings['batch'], num_workers=0, collate_fn=dict(type='pseudo_collate'))
    cfg = Config(
        dict(
            train_cfg=loop,
            val_cfg=dict(),
            val_evaluator=dict(type=Count),
            default_scope='mmengine',
            optim_wrapper=dict(
                optimizer=dict(type=settings['optimizer'], lr=settings['lr'], **momentum), **settings['amp']
            ),
            param_scheduler=schedule or None,
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', interval=1 if by_epoch else 2, by_epoch=by_epoch)
            ),
            custom_hooks=[dict(type='mila_mm.RunIdentityHook', changed=list(changed))],
            randomness=dict(seed=3),
            train_dataloader=dict(sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler')),
            experiment_name=f'identity-{next(COUNTER)}',
            log_level='WARNING',
        )
    )
    make_safe(cfg)
    train = dict(cfg.pop('train_dataloader'), dataset=Numbers(settings['images'], settings['classes']), **loader)
    runner = Runner(
        model=Line(),
        work_dir=str(folder),
        cfg=cfg,
        train_dataloader=train,
        val_dataloader=dict(loader, dataset=Numbers(2), sampler=dict(type='DefaultSampler', shuffle=False)),
        resume=options.get('resume', False),
        load_from=options.get('load_from'),
        **cfg,
    )
    rates = Rates(end)
    runner.register_hook(rates)
    try:
        runner.train()
    except InterruptedError:
        assert end is not None
    rates.runner = runner
    return rates


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
