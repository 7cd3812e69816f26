"""Samples of a data set as it has loaded them, whatever a class of the user's makes of them."""

from __future__ import annotations

from typing import Any

from mmengine.dataset import BaseDataset

from mila_mm.engine.data.kinds import LIBRARIES


def length_of(dataset: Any) -> int:
    """Return the number of samples that a data set has loaded, see :func:`info_of`."""
    return BaseDataset.__len__(dataset) if counts_otherwise(dataset) else len(dataset)


def info_of(dataset: Any, index: int) -> dict[str, Any]:
    """Return a sample as a data set has loaded it.

    A class of the user's may cut images into tiles or draw them at random, in ``__len__`` and ``get_data_info`` of its
    own, and may not be ready to be asked: of such a one it is what its files say.
    """
    loaded: dict[str, Any]
    loaded = BaseDataset.get_data_info(dataset, index) if counts_otherwise(dataset) else dataset.get_data_info(index)
    return loaded


def counts_otherwise(dataset: Any) -> bool:
    """Tell whether a class of the user's has a length, or samples, of its own."""
    if not isinstance(dataset, BaseDataset):
        return False
    kinds = type(dataset).__mro__
    owners = [next(kind for kind in kinds if name in vars(kind)) for name in ('__len__', 'get_data_info')]
    return any(owner.__module__.partition('.')[0] not in LIBRARIES for owner in owners)
