"""What a data set holds, in a few words that differ from those of one with other images, labels or classes."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset

from mila_mm.engine.data.samples import datasets_in
from mila_mm.files import open_regular

_BLOCK, _BLOCKS = 2**20, 64  # of a larger file of annotations so many blocks are read, evenly spread
_NAMED, _SIZED = 4096, 64  # samples whose files' names and whose files' sizes are looked at, evenly spread as well
_FILES = ('img_path', 'seg_map_path', 'xml_path')
_DIGITS = 16
_SECONDS = 10.0  # for each part; only a file system that does not answer can take longer


def content_of(dataset: Any) -> dict[str, str]:
    """Describe the content of a data set, wherever it lies.

    Of annotation files of up to 64 MiB every byte counts, of larger ones 64 MiB of them; of images and label maps names
    and sizes, so that seconds are enough for any data set. Samples are taken as the data set loaded them, without the
    ``__len__`` and ``get_data_info`` of its class, which may cut images into tiles, draw at random or open files.

    Returns:
        Up to four of 'classes' (their names), 'annotations' (size and SHA-256 of the files), 'names' and 'sizes'
        (SHA-256 of those of images and label maps). A part is left out where the data set does not have it or fails
        when asked, where it takes too long, and where a file of it cannot be looked at, as those that lie elsewhere
        than on a disk.
    """
    found = {}
    for name, describe in (('classes', _classes), ('annotations', _annotations), ('names', _names), ('sizes', _sizes)):
        try:
            text = describe(dataset, time.monotonic() + _SECONDS)
        except Exception:  # noqa: BLE001 - any class of the user's: a training needs none of this
            continue
        if text is not None:
            found[name] = text
    return found


def _classes(dataset: Any, _: float) -> str | None:
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    return None if classes is None or isinstance(classes, str) else json.dumps([str(name) for name in classes])


def _annotations(dataset: Any, deadline: float) -> str | None:
    paths = [getattr(each, 'ann_file', None) for each in datasets_in(dataset) if isinstance(each, BaseDataset)]
    return '; '.join(_file(path, deadline) for path in paths if path) or None


def _file(path: str | Path, deadline: float) -> str:
    with open_regular(Path(path)) as file:
        size = os.fstat(file.fileno()).st_size
        content = hashlib.sha256()
        for number in range(_BLOCKS):
            _in_time(deadline)
            file.seek(max(number * _BLOCK, number * (size - _BLOCK) // (_BLOCKS - 1)))
            content.update(file.read(_BLOCK))
    return f'{size:,} bytes, {content.hexdigest()[:_DIGITS]}'


def _names(dataset: Any, deadline: float) -> str | None:
    names = [[[Path(path).name for path in paths] for paths in each] for each in _samples(dataset, _NAMED, deadline)]
    return _digest(names)


def _sizes(dataset: Any, deadline: float) -> str | None:
    sizes = [
        [[os.stat(path).st_size for path in paths] for paths in each] for each in _samples(dataset, _SIZED, deadline)
    ]
    return _digest(sizes)


def _samples(dataset: Any, most: int, deadline: float) -> Iterator[Iterator[list[str | Path]]]:
    """Yield the paths of the files of samples, of one data set after the other."""
    for each in datasets_in(dataset):
        if isinstance(each, BaseDataset):
            yield _paths(each, most, deadline)


def _paths(dataset: BaseDataset, most: int, deadline: float) -> Iterator[list[str | Path]]:
    if not dataset._fully_initialized:
        raise ValueError('has loaded nothing')  # asking would load it
    for index in _spread(BaseDataset.__len__(dataset), most):
        _in_time(deadline)
        info = BaseDataset.get_data_info(dataset, index)
        yield [info[key] for key in _FILES if isinstance(info.get(key), (str, Path))]


def _in_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError


def _spread(length: int, most: int) -> Iterator[int]:
    count = min(length, most)
    return (number * (length - 1) // max(count - 1, 1) for number in range(count))


def _digest(of_samples: list[list[list[Any]]]) -> str | None:
    """Return None where no sample has a file."""
    if not any(sample for each in of_samples for sample in each):
        return None
    return hashlib.sha256(json.dumps(of_samples).encode()).hexdigest()[:_DIGITS]
