"""Resuming: bitwise as if the run had never stopped, and nothing of the file is run or deleted."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from torch.utils.data import Dataset

from mila_mm.engine import Runner
from mila_mm.engine.random_state import capture_random_state, restore_random_state
from mila_mm.errors import UserError
from mila_mm.weights import CheckpointError

COUNTER = itertools.count()


class Noisy(BaseModel):
    """Draws from all three generators in every step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        out = self.drop(self.norm(self.linear(torch.stack(list(inputs)))))
        return {'loss': out.square().mean()} if mode == 'loss' else list(out)


class Draws(Dataset):
    @property
    def metainfo(self):
        return dict(classes=('a', 'b'), palette=[(1, 2, 3)], weights=np.ones(2))

    def __len__(self):
        return 6

    def __getitem__(self, index):
        noise = random.random() + float(np.random.rand())
        return dict(inputs=torch.full((4,), index + noise), data_samples=index)


class Mean(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.extend(float(sample.mean()) for sample in data_samples)

    def compute_metrics(self, results):
        return {'mean': sum(results) / len(results)}


def runner(folder, *, until, by_epoch=True, hook=True, model=None, **options):
    by = dict(by_epoch=by_epoch)
    loop = (
        dict(type='EpochBasedTrainLoop', max_epochs=until, val_interval=1)
        if by_epoch
        else dict(type='IterBasedTrainLoop', max_iters=until, val_interval=2)
    )
    loader = dict(batch_size=2, num_workers=0, dataset=Draws(), collate_fn=dict(type='pseudo_collate'))
    sampler = dict(type='DefaultSampler', shuffle=True) if by_epoch else dict(type='InfiniteSampler', shuffle=True)
    cfg = Config(
        dict(
            train_cfg=loop,
            val_cfg=dict(),
            val_evaluator=dict(type=Mean),
            default_scope='mmengine',
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.05)),
            param_scheduler=[dict(type='CosineAnnealingLR', T_max=8, end=100, **by)],
            default_hooks=dict(
                checkpoint=dict(
                    type='CheckpointHook', interval=2, save_best='mean', rule='greater', max_keep_ckpts=2, **by
                ),
                logger=dict(type='LoggerHook', interval=1),
            ),
            custom_hooks=[dict(type='mila_mm.ResumeStateHook')] if hook else [],
            randomness=dict(seed=3),
            experiment_name=f'resume-{next(COUNTER)}',
            log_level='ERROR',
            **options,
        )
    )
    return Runner(
        model=model or Noisy(),
        work_dir=str(folder),
        cfg=cfg,
        train_dataloader=dict(sampler=sampler, **loader),
        val_dataloader=dict(sampler=dict(type='DefaultSampler', shuffle=False), **loader),
        **{key: cfg.get(key) for key in cfg if key not in ('work_dir',)},
    )


def state(run):
    return {
        **run.model.state_dict(),
        **{
            f'adam {i} {name}': value
            for i, entry in run.optim_wrapper.state_dict()['state'].items()
            for name, value in entry.items()
        },
    }


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(params=[True, False], ids=['by epoch', 'by iteration'])
def by_epoch(request):
    return request.param


def checkpoint_of(folder, by_epoch):
    return folder / ('epoch_2.pth' if by_epoch else 'iter_2.pth')


def test_resumed_run_equals_an_uninterrupted_one(tmp_path, by_epoch):
    straight = runner(tmp_path / 'straight', until=4, by_epoch=by_epoch)
    straight.train()
    first = runner(tmp_path / 'stopped', until=2, by_epoch=by_epoch)
    first.train()
    assert not same(state(straight), state(first))
    torch.manual_seed(99)
    second = runner(tmp_path / 'stopped', until=4, by_epoch=by_epoch, resume=True)
    second.train()
    assert (second.epoch, second.iter) == (straight.epoch, straight.iter)
    assert same(state(straight), state(second))
    assert straight.param_schedulers[0].state_dict() == second.param_schedulers[0].state_dict()
    ours, theirs = second.message_hub.log_scalars, straight.message_hub.log_scalars
    assert type(ours['train/loss']) is HistoryBuffer
    np.testing.assert_array_equal(ours['train/loss'].data[0], theirs['train/loss'].data[0])
    assert second.message_hub.get_info('best_score') == straight.message_hub.get_info('best_score')


def test_without_the_hook_the_run_would_differ(tmp_path):
    """The state of the generators is what makes the test above pass."""
    straight = runner(tmp_path / 'straight', until=4, hook=False)
    straight.train()
    runner(tmp_path / 'stopped', until=2, hook=False).train()
    second = runner(tmp_path / 'stopped', until=4, hook=False, resume=True)
    second.train()
    assert not same(state(straight), state(second))


@pytest.fixture
def stopped(tmp_path):
    """Work folder of a run that stopped after two epochs."""
    runner(tmp_path / 'stopped', until=2).train()
    return tmp_path / 'stopped'


def rewrite(folder, change):
    path = checkpoint_of(folder, True)
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def resume(folder, **options):
    run = runner(folder, until=3, resume=True, **options)
    run.train()
    return run


def test_config_inside_a_checkpoint_is_not_executed(stopped, tmp_path):
    """mmengine's Runner.resume runs ``meta['config']`` of mmdet-2 era files as Python."""
    canary = tmp_path / 'canary'
    rewrite(stopped, lambda content: content['meta'].update(config=f'open({str(canary)!r}, "w").close()\na = 1\n'))
    assert resume(stopped).iter == 9
    assert not canary.exists()


def test_code_in_a_resumed_checkpoint_is_refused(stopped, tmp_path):
    class Evil:
        def __reduce__(self):
            return (eval, (f'open({str(tmp_path / "canary")!r}, "w").close()',))

    rewrite(stopped, lambda content: content['message_hub']['runtime_info'].update(x=Evil()))
    with pytest.raises(CheckpointError, match=r'epoch_2\.pth: names builtins\.eval'):
        resume(stopped)
    assert not (tmp_path / 'canary').exists()


def test_foreign_files_are_not_deleted(stopped, tmp_path):
    mine = tmp_path / 'precious'
    mine.mkdir()
    (mine / 'thesis.tex').write_text('x')

    def change(content):
        content['message_hub']['runtime_info'].update(
            best_ckpt=str(mine), best_score=-1e9, keep_ckpt_ids=['../../precious', 1, 2, 3]
        )
        content['message_hub']['resumed_keys'].update(best_ckpt=True, best_score=True, keep_ckpt_ids=True)

    rewrite(stopped, change)
    resume(stopped)
    assert (mine / 'thesis.tex').exists()


def test_file_without_the_state_of_a_run_is_refused(stopped):
    rewrite(stopped, lambda content: content.pop('optimizer'))
    with pytest.raises(UserError, match='no optimizer state'):
        resume(stopped)


def test_weights_alone_are_not_resumed(stopped):
    rewrite(stopped, lambda content: [content.pop(key) for key in ('message_hub', 'meta')])
    with pytest.raises(UserError, match='no state of a training run'):
        resume(stopped)


def test_random_state_is_plain_data_and_comes_back(tmp_path):
    torch.save(capture_random_state(), tmp_path / 'state.pth')
    drawn = random.random(), np.random.rand(), torch.rand(3)
    kept = torch.load(tmp_path / 'state.pth', weights_only=True)
    restore_random_state(kept)
    again = random.random(), np.random.rand(), torch.rand(3)
    assert drawn[:2] == again[:2]
    assert torch.equal(drawn[2], again[2])
    others = []
    for rank in (1, 2, 1):
        restore_random_state(kept, rank)
        others.append((random.random(), np.random.rand(), float(torch.rand(1))))
    assert others[0] == others[2] != others[1]
    assert others[0][0] != drawn[0]


@pytest.mark.parametrize('state', [{}, {'python': 3}, {'python': (3, (1, 2), None), 'numpy': (), 'torch': None}])
def test_broken_random_state_is_named(state):
    with pytest.raises(CheckpointError, match='random_state'):
        restore_random_state(state)


def test_safe_files_of_any_kind_as_load_from(tmp_path):
    from safetensors.torch import save_file

    weights = Noisy().state_dict()
    save_file(weights, tmp_path / 'a.safetensors')
    run = runner(tmp_path / 'work', until=1, load_from=str(tmp_path / 'a.safetensors'))
    run.load_or_resume()
    assert all(torch.equal(run.model.state_dict()[name], value) for name, value in weights.items())
    assert Path(run.work_dir) == tmp_path / 'work'


LIES = {
    'iteration': lambda content: content['meta'].update(iter=float('inf')),
    'seed': lambda content: content['meta'].update(seed=-5),
    'schedulers': lambda content: content['param_schedulers'][0].update(last_step='x'),
    'no schedulers': lambda content: content.update(param_schedulers=[3]),
    'optimizer': lambda content: content['optimizer']['state'][0].update(exp_avg=torch.ones(7)),
    'no optimizer': lambda content: content.update(optimizer=[]),
    'message hub': lambda content: content.update(message_hub=5),
    'random state': lambda content: content['random_state'].update(numpy=('MT19937', torch.ones(2), 10**9, 0, 0.0)),
    'position': lambda content: content.update(position=dict(batches=-1, length=3)),
}


@pytest.mark.parametrize('lie', LIES)
def test_state_of_the_wrong_kind_is_refused(stopped, lie):
    rewrite(stopped, LIES[lie])
    with pytest.raises(UserError) as caught:
        resume(stopped, load_from=str(checkpoint_of(stopped, True)))
    assert len(str(caught.value)) < 400


def test_what_a_scheduler_has_not_is_dropped(stopped):
    rewrite(stopped, lambda content: content['param_schedulers'][0].update(step='no method', new=1))
    run = resume(stopped)
    assert run.iter == 9 and not hasattr(run.param_schedulers[0], 'new')


def test_names_in_the_message_hub_do_not_reach_the_log(stopped, capsys):
    def change(content):
        hub = content['message_hub']
        hub['log_scalars']['train/\x1b[2J\nforged'] = HistoryBuffer([1.0], [1])
        hub['resumed_keys'].update({'\x1b]0;title\x07': True})

    rewrite(stopped, change)
    resume(stopped)
    logs = [path.read_text() for path in stopped.rglob('*.log')] + [*capsys.readouterr()]
    assert not any('\x1b' in log or 'forged' in log for log in logs)
