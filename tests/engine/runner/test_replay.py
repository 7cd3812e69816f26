"""Schedules that are taken up with other settings stand where a run with these settings would."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, ReduceOnPlateauLR
from torch import nn

from mila_mm.engine.runner.replay import Fresh, saved_schedulers, schedulers
from mila_mm.errors import UserError

EPOCH = 4  # iterations
pytestmark = pytest.mark.filterwarnings('ignore:Detected call of')


def a_runner(lr=0.1, milestones=(1, 3), momentum=0.9):
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        [dict(params=[model.weight]), dict(params=[model.bias], lr=2 * lr)], lr=lr, momentum=momentum
    )
    wrapper = OptimWrapper(optimizer)
    every = [
        LinearLR(wrapper, start_factor=0.1, begin=0, end=6, by_epoch=False),
        MultiStepLR(wrapper, milestones=list(milestones), gamma=0.1, by_epoch=True),
        CosineAnnealingLR(wrapper, T_max=10, begin=6, end=16, by_epoch=False),
    ]
    return SimpleNamespace(
        optim_wrapper=wrapper, param_schedulers=every, train_dataloader=range(EPOCH), iter=0, epoch=0
    )


def train(runner, iterations):
    """Step as mmengine's hook does: each iteration, and at the end of each epoch."""
    for _ in range(iterations):
        runner.optim_wrapper.optimizer.step()
        runner.iter += 1
        for each in runner.param_schedulers:
            if not each.by_epoch:
                each.step()
        if runner.iter % EPOCH == 0:
            runner.epoch += 1
            for each in runner.param_schedulers:
                if each.by_epoch:
                    each.step()


def rates(runner):
    return [group['lr'] for group in runner.optim_wrapper.param_groups]


@pytest.mark.parametrize('done', [0, 1, EPOCH - 1, EPOCH, EPOCH + 1, 2 * EPOCH, 3 * EPOCH + 2])
def test_rates_are_those_of_a_run_that_had_the_settings_all_along(done):
    expected = a_runner(lr=0.05, milestones=(2,))
    train(expected, done)
    runner = a_runner(lr=0.05, milestones=(2,))
    fresh = Fresh(runner)
    other = a_runner(lr=0.1)
    train(other, done)
    # what a checkpoint of other settings fills in
    for group, saved in zip(runner.optim_wrapper.param_groups, other.optim_wrapper.param_groups, strict=True):
        group.update({key: value for key, value in saved.items() if key != 'params'})
    for each, saved in zip(runner.param_schedulers, other.param_schedulers, strict=True):
        each.load_state_dict(saved.state_dict())
    runner.iter, runner.epoch = done, done // EPOCH
    fresh.replay(runner)
    for _ in range(6):  # and from there on
        assert rates(runner) == pytest.approx(rates(expected), rel=1e-12)
        train(runner, 1)
        train(expected, 1)


def test_options_are_put_back_and_rates_are_not():
    runner = a_runner(momentum=0.5)
    fresh = Fresh(runner)
    for group in runner.optim_wrapper.param_groups:
        group.update(momentum=0.9, lr=7.0, initial_lr=8.0)
    fresh.restore_options(runner)
    for group in runner.optim_wrapper.param_groups:
        assert (group['momentum'], group['lr'], group['initial_lr']) == (0.5, 7.0, 8.0)


def test_a_schedule_that_follows_from_results_is_refused():
    runner = a_runner()
    runner.param_schedulers.append(ReduceOnPlateauLR(runner.optim_wrapper, monitor='loss'))
    with pytest.raises(UserError, match='follows from validation results'):
        Fresh(runner).replay(runner)


def test_schedulers_are_counted_in_all_forms():
    one, two = object(), object()
    assert schedulers(SimpleNamespace(param_schedulers=None)) == []
    assert schedulers(SimpleNamespace(param_schedulers=dict(a=[one], b=[two, one]))) == [one, two, one]
    assert saved_schedulers({}) == saved_schedulers(dict(param_schedulers=3)) == 0
    assert saved_schedulers(dict(param_schedulers=[{}, {}])) == 2
    assert saved_schedulers(dict(param_schedulers=dict(a=[{}], b=[{}, {}], c=5))) == 3
