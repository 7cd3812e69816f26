"""Batches taken up in the middle are those that would have come."""

import itertools
import pickle
import random

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import DataLoader, Dataset

from mila_mm.engine.runner.sampler import Drawn, ResumableBatchSampler, SeededFetch, seed_samples
from mila_mm.stopping import WorkerStart


class Noise(Dataset):
    """Images with augmentation from all three generators."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(1).item()])

    def get_data_info(self, index: int) -> dict:
        """Give the sizes that mmdet groups by."""
        return dict(width=1 + index % 3, height=2)


class Whole(Noise):
    """Reads a batch at a time."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


def loader(workers: int = 0, infinite: bool = False, grouped: bool = False, dataset=None, **options) -> DataLoader:
    dataset = dataset or Noise()
    sampler = InfiniteSampler(dataset, seed=5) if infinite else DefaultSampler(dataset, seed=5)
    inner = dict(type='mmdet.AspectRatioBatchSampler') if grouped else None
    batches = ResumableBatchSampler(sampler, 2, inner)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, worker_init_fn=WorkerStart(), **options)
    seed_samples(loader, 3)
    return loader


def epochs(loader: DataLoader, first: int, last: int, batch: int = 0) -> list[torch.Tensor]:
    seen = []
    for epoch in range(first, last):
        loader.batch_sampler.sampler.set_epoch(epoch)
        loader.batch_sampler.start_at(epoch, batch)
        seen.extend(loader)
        batch = 0
    return seen


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


@pytest.mark.parametrize('grouped', [False, True], ids=['plain', 'by aspect ratio'])
@pytest.mark.parametrize('workers', [0, 2])
def test_epochs_continue_in_the_middle(workers, grouped) -> None:
    straight = epochs(loader(grouped=grouped), 0, 3)
    per_epoch = len(loader(grouped=grouped))
    assert len(straight) == 3 * per_epoch
    options = dict(persistent_workers=True) if workers else {}
    for done in range(per_epoch):
        if done in (0, 1, per_epoch - 1) or not workers:
            rest = epochs(loader(workers, grouped=grouped, **options), 1, 3, done)
            assert same(rest, straight[per_epoch + done :]), done


def test_augmentation_differs_between_epochs_and_samples() -> None:
    seen = torch.cat(epochs(loader(), 0, 3))
    for column in range(1, 4):
        assert len(seen[:, column].unique()) == len(seen)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('infinite', [False, True], ids=['finite', 'infinite'])
def test_iterations_continue_anywhere(infinite, workers) -> None:
    def stream(done: int, count: int, workers: int = 0) -> list[torch.Tensor]:
        data = loader(workers, infinite)
        passes = data.batch_sampler.start_at(0, done)
        seen = []
        while len(seen) < count:
            seen.extend(itertools.islice(data, count - len(seen)))
            passes += 1
            data.batch_sampler.sampler.set_epoch(passes)
        return seen

    straight = stream(0, 16)
    for done in (1, 5, 6, 13):
        assert same(stream(done, 16 - done, workers), straight[done:]), done


def test_loading_leaves_the_generators_of_the_process_alone() -> None:
    data = iter(loader(generator=torch.Generator()))
    torch.manual_seed(1)
    next(data)
    drawn = random.random(), np.random.rand(), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn[2])
    before = random.getstate(), np.random.get_state()[1].copy()
    next(data)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_a_dataset_that_reads_batches_still_does() -> None:
    one, two = (epochs(loader(dataset=Whole()), 0, 1) for _ in range(2))
    assert same(one, two)
    assert not same(one, epochs(loader(), 0, 1))


def test_ranks_draw_differently() -> None:
    index = Drawn(4, (0, 0, 0))
    first, second = (SeededFetch(Noise(), 3, rank)([index])[0] for rank in (0, 1))
    assert first[0] == second[0]
    assert not torch.equal(first, second)


def test_an_index_travels_to_a_worker() -> None:
    index = pickle.loads(pickle.dumps(Drawn(7, (1, 2, 3))))
    assert (index, index.place) == (7, (1, 2, 3))


def test_a_sampler_without_batches_is_refused() -> None:
    sampler = ResumableBatchSampler(DefaultSampler(range(1), seed=0), 2, drop_last=True)
    with pytest.raises(ValueError, match='no batch'):
        sampler.start_at(0, 1)
