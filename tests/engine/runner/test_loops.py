"""The loops: where they begin, and after which steps a validation is due."""

from types import SimpleNamespace

import pytest
from mmengine.dataset import InfiniteSampler
from mmengine.runner import loops
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from mila_mm.engine.runner.loops import EpochBasedTrainLoop, IterBasedTrainLoop, _SkippingIterator
from mila_mm.engine.runner.sampler import ResumableBatchSampler


class Runner:
    """What a loop asks of a runner; notes the batches and hooks."""

    def __init__(self, validates=True):
        self.val_loop = object() if validates else None
        self.model = SimpleNamespace(train=lambda: None)
        self.seen = []

    def call_hook(self, name, batch_idx=None, data_batch=None, **_):
        if name == 'before_train_iter':
            self.seen.append((batch_idx, data_batch))
        elif name.endswith('epoch'):
            self.seen.append(name)


def loader(resumable=True):
    sampler = SequentialSampler(range(10))
    batches = ResumableBatchSampler(sampler, 2) if resumable else BatchSampler(sampler, 2, False)
    return DataLoader(range(10), batch_sampler=batches, collate_fn=lambda batch: [int(x) for x in batch])


@pytest.fixture
def train_step(monkeypatch):
    """No model: a step does nothing but call its hooks."""

    def run_iter(self, idx, data_batch):
        self.runner.call_hook('before_train_iter', batch_idx=idx, data_batch=data_batch)
        self._iter += 1

    from mmengine.runner import EpochBasedTrainLoop as Parent

    monkeypatch.setattr(Parent, 'run_iter', run_iter)


def test_an_epoch_that_was_begun_is_finished(train_step):
    loop = EpochBasedTrainLoop(Runner(), loader(), max_epochs=2)
    loop.batches_done = 3
    loop.run_epoch()
    assert loop.runner.seen == ['before_train_epoch', (3, [6, 7]), (4, [8, 9]), 'after_train_epoch']
    assert (loop.epoch, loop.iter, loop.batches_done) == (1, 2, 0)
    loop.runner.seen.clear()
    loop.run_epoch()
    assert [entry[0] for entry in loop.runner.seen[1:-1]] == [0, 1, 2, 3, 4]


def test_what_follows_an_epoch_whose_steps_are_done(train_step):
    loop = EpochBasedTrainLoop(Runner(), loader(), max_epochs=2)
    loop.batches_done = 5
    loop.run_epoch()
    assert loop.runner.seen == ['before_train_epoch', 'after_train_epoch']
    assert (loop.epoch, loop.iter) == (1, 0)


def due_epochs(**options):
    loop = EpochBasedTrainLoop(Runner(), loader(), **options)
    found = []
    for epoch in range(loop.max_epochs + 1):
        loop._epoch, loop.batches_done = epoch, 0
        if loop.validation_is_due():
            found.append(epoch)
        loop.batches_done = 1
        assert not loop.validation_is_due()
    return found


def test_validations_of_epochs():
    assert due_epochs(max_epochs=5) == [1, 2, 3, 4, 5]
    assert due_epochs(max_epochs=5, val_interval=2) == [2, 4, 5]
    assert due_epochs(max_epochs=5, val_begin=3) == [3, 4, 5]
    assert due_epochs(max_epochs=8, val_interval=4, dynamic_intervals=[(5, 1)]) == [4, 5, 6, 7, 8]


def due_iterations(**options):
    loop = IterBasedTrainLoop(Runner(), loader(), **options)
    found = []
    for iteration in range(loop.max_iters + 1):
        loop._iter = iteration
        if loop.validation_is_due():
            found.append(iteration)
    return found


def test_validations_of_iterations():
    assert due_iterations(max_iters=7, val_interval=3) == [3, 6, 7]
    assert due_iterations(max_iters=7, val_interval=3, val_begin=4) == [6, 7]
    assert due_iterations(max_iters=6, val_interval=2) == [2, 4, 6]


@pytest.mark.parametrize('kind', [EpochBasedTrainLoop, IterBasedTrainLoop])
def test_without_a_validation_none_is_due(kind):
    options = dict(max_epochs=3) if kind is EpochBasedTrainLoop else dict(max_iters=3)
    loop = kind(Runner(validates=False), loader(), **options)
    loop._epoch = loop._iter = 3
    assert not loop.validation_is_due()


def test_a_loop_that_is_built_draws_nothing_and_its_run_goes_on_for_ever():
    data = list(range(8))
    batches = ResumableBatchSampler(InfiniteSampler(data, seed=0), batch_size=8)
    shuffled = DataLoader(data, batch_sampler=batches, num_workers=1, persistent_workers=True)
    built = loops._InfiniteDataloaderIterator(shuffled)
    assert isinstance(built, _SkippingIterator)
    iterator = _SkippingIterator(shuffled)
    assert [sorted(next(iterator).tolist()) for _ in range(5)] == [data] * 5
    shuffled._iterator._shutdown_workers()
