"""What a data set holds, in a few words that differ from those of one with other images, labels or classes."""

import hashlib
import json
import os
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


def content_of(dataset: Any) -> dict[str, str]:
    """Describe the content of a data set, wherever it lies.

    Of annotation files of up to 64 MiB every byte counts, of larger ones 64 MiB of them; of images and label maps names
    and sizes, so that seconds are enough for any data set.

    Returns:
        Up to three of 'classes' (their names), 'annotations' (size and SHA-256 of the files) and 'files' (SHA-256 of
        names and sizes); what a data set does not have, or keeps elsewhere than on a disk, is left out.
    """
    found = {}
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if classes is not None and not isinstance(classes, str):
        found['classes'] = json.dumps([str(name) for name in classes])
    inner = [each for each in datasets_in(dataset) if isinstance(each, BaseDataset)]
    annotations = [text for each in inner for text in _annotations(each.ann_file)]
    if annotations:
        found['annotations'] = '; '.join(annotations)
    if inner:
        found['files'] = _digest(json.dumps([list(_samples(each)) for each in inner]).encode())
    return found


def _annotations(path: Any) -> Iterator[str]:
    if not isinstance(path, (str, Path)) or not path:
        return
    try:
        with open_regular(Path(path)) as file:
            size = os.fstat(file.fileno()).st_size
            content = hashlib.sha256()
            for number in range(_BLOCKS):
                file.seek(max(number * _BLOCK, number * (size - _BLOCK) // (_BLOCKS - 1)))
                content.update(file.read(_BLOCK))
    except OSError:
        return  # an address, or a folder: its files count
    yield f'{size:,} bytes, {content.hexdigest()[:_DIGITS]}'


def _samples(dataset: BaseDataset) -> Iterator[list[Any]]:
    """Yield names and sizes of the files of samples."""
    length = len(dataset)
    sized = set(_spread(length, _SIZED))
    for index in sorted({*_spread(length, _NAMED), *sized}):
        info = dataset.get_data_info(index)
        paths = [info[key] for key in _FILES if isinstance(info.get(key), (str, Path))]
        yield [Path(path).name for path in paths] + ([_size(path) for path in paths] if index in sized else [])


def _spread(length: int, most: int) -> Iterator[int]:
    count = min(length, most)
    return (number * (length - 1) // max(count - 1, 1) for number in range(count))


def _size(path: str | Path) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None  # not on a disk, or missing, which whoever opens it says


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGITS]
