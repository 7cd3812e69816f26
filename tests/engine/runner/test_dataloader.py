"""Faults of a loader's own arguments are not put to its data set."""

import pytest
from torch.utils.data import BatchSampler, Dataset

from mila_mm.engine.runner.runner import Runner
from mila_mm.errors import UserError


class Two(Dataset):
    """Two numbers."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return index


def test_a_batch_sampler_beside_drop_last() -> None:
    batches = dict(type=BatchSampler, drop_last=False)
    options = dict(dataset=Two(), sampler=dict(type='DefaultSampler'), batch_size=1, num_workers=0)
    assert len(Runner.build_dataloader(dict(options, batch_sampler=batches))) == 2
    with pytest.raises(UserError, match=r'^dataloader: batch_sampler option is mutually exclusive'):
        Runner.build_dataloader(dict(options, batch_sampler=batches, drop_last=True))
    with pytest.raises(UserError, match=r'^dataset: '):
        Runner.build_dataloader(dict(options, dataset=dict(type='NoSuchDataset')))
