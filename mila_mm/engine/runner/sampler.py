"""Batches that can be taken up in the middle, whatever loads them.

A run continues exactly where the data that it goes on with is the data that it would have seen. Two things decide
on that: which images come next, and which random numbers their augmentation draws. Workers
draw from generators of their own that no checkpoint sees, so each sample gets its random numbers from where it
stands in the run: they are the same after a restart and for any number of workers.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from torch.utils.data import BatchSampler, DataLoader, Sampler

from mila_mm.registry import DATA_SAMPLERS


class Drawn(int):
    """An index into a dataset that knows where in the run it was drawn.

    Attributes:
        place: Pass over the data, batch in the pass, sample in the batch.
    """

    place: tuple[int, int, int]

    def __new__(cls, index: int, place: tuple[int, int, int]) -> 'Drawn':
        """Make an index."""
        drawn = super().__new__(cls, index)
        drawn.place = place
        return drawn

    def __reduce__(self) -> tuple:
        return Drawn, (int(self), self.place)


@DATA_SAMPLERS.register_module()
class ResumableBatchSampler(Sampler[list[int]]):
    """A batch sampler that can start in the middle and numbers what it draws.

    Args:
        batch_size: Samples per batch.
        batch_sampler: Config of the batch sampler that makes the batches. Defaults to None, batches in the order of
            ``sampler``.
        drop_last: Whether to leave out a last batch that is smaller; only without ``batch_sampler``. Defaults to
            False.
    """

    def __init__(
        self,
        sampler: Sampler,
        batch_size: int,
        batch_sampler: dict[str, Any] | None = None,
        drop_last: bool = False,
    ) -> None:
        if batch_sampler is None:
            self.batches: Any = BatchSampler(sampler, batch_size, drop_last)
        else:
            default_args = dict(sampler=sampler, batch_size=batch_size)
            self.batches = MMENGINE_DATA_SAMPLERS.build(batch_sampler, default_args=default_args)
        self.sampler = sampler  # mmengine's hook for the seed of an epoch looks for it here
        self.batch_size = batch_size
        self._passes = 0
        self._behind = 0
        self._stream: Iterator[list[int]] | None = None

    def start_at(self, passes: int, batches: int) -> int:
        """Let the next iteration begin after a number of batches, which are drawn but not loaded.

        Args:
            passes: Passes over the data that are done.
            batches: Batches after them that are done; may be more than one pass has.

        Returns:
            The passes that are done in the end.

        Raises:
            ValueError: If there are no batches at all.
        """
        self._stream = iter(self.batches)
        behind = 0
        for _ in range(batches):
            if next(self._stream, None) is None:
                passes += 1
                if hasattr(self.sampler, 'set_epoch'):
                    self.sampler.set_epoch(passes)
                self._stream = iter(self.batches)
                behind = 0
                if next(self._stream, None) is None:
                    raise ValueError('the sampler gives no batch')
            behind += 1
        self._passes, self._behind = passes, behind
        return passes

    def __iter__(self) -> Iterator[list[int]]:
        stream = iter(self.batches) if self._stream is None else self._stream
        passes, behind = self._passes, self._behind
        self._passes, self._behind, self._stream = passes + 1, 0, None
        for number, batch in enumerate(stream, start=behind):
            yield [Drawn(index, (passes, number, slot)) for slot, index in enumerate(batch)]

    def __len__(self) -> int:
        return len(self.batches)


class SeededFetch:
    """Reads samples, each with random numbers of its own.

    torch's fetcher calls it as the dataset's ``__getitems__``. The generators are left as they were found: the model
    draws from the same ones where the process loads its data itself.
    """

    def __init__(self, dataset: Any, seed: int, rank: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.rank = rank

    def __call__(self, indices: Sequence[int]) -> list[Any]:
        """Read samples.

        Args:
            indices: Indices, :class:`Drawn` ones where a :class:`ResumableBatchSampler` gave them.
        """
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        whole: Callable | None = getattr(type(self.dataset), '__getitems__', None)
        try:
            if whole is not None:
                self._seed(indices[0])
                return whole(self.dataset, indices)
            return [self._read(index) for index in indices]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])

    def _read(self, index: int) -> Any:
        self._seed(index)
        return self.dataset[int(index)]

    def _seed(self, index: int) -> None:
        if not isinstance(index, Drawn):
            return
        words = np.random.SeedSequence([self.seed, self.rank, *index.place]).generate_state(6).tolist()
        random.seed(words[0] << 32 | words[1])
        np.random.seed(words[2:4])
        # not torch.manual_seed, which would seed the GPU's generator as well
        torch.default_generator.manual_seed(words[4] << 31 | words[5] >> 1)


def seed_samples(loader: DataLoader, seed: int) -> None:
    """Give each sample of a dataloader random numbers that follow from its place in the run.

    Args:
        loader: A dataloader; nothing happens without a :class:`ResumableBatchSampler` in it.
        seed: Seed of the run, the same on all ranks.
    """
    if isinstance(loader.batch_sampler, ResumableBatchSampler):
        loader.dataset.__getitems__ = SeededFetch(loader.dataset, seed, get_rank())
