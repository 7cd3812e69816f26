"""Checkpoints that several processes write together: a folder with a file of each, read back without running any of it.

    iter_8.pth/
        state.pth         all but the tensors of model and optimizer, as in a checkpoint that is one file
        shards.json       which piece of which tensor lies where
        __0_0.distcp ...  the pieces, as torch.distributed.checkpoint writes them
        .metadata         the same index for torch's own tools; a pickle, which is never read here

Tensors are named ``model.NAME`` and ``optimizer.NUMBER.KEY``, numbered as :meth:`torch.optim.Optimizer.state_dict`
numbers parameters. Any number of processes can read what any other number has written.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mila_mm.errors import printable
from mila_mm.files import read_small, write_whole
from mila_mm.weights.errors import CheckpointError
from mila_mm.weights.file import container
from mila_mm.weights.file.reader import only_our_globals, read_file

STATE, INDEX = 'state.pth', 'shards.json'
MODEL, OPTIMIZER = 'model.', 'optimizer.'
_MAX_INDEX = 256 << 20
_FILE = re.compile(r'__\d{1,6}_\d{1,6}\.distcp')
_DTYPES = {
    str(value).removeprefix('torch.'): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and (value.is_floating_point or value in (torch.int64, torch.int32, torch.bool))
}


def is_sharded(path: str | Path) -> bool:
    """Tell whether a path is a folder that several processes have written together."""
    return (Path(path) / INDEX).is_file()


class ShardWriter(dcp.FileSystemWriter):
    """torch's writer, which adds the index that is safe to read. Files are on the disk when it returns."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True)
        self._folder = folder

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Write the index once all processes have written; called on one of them."""
        super().finish(metadata, results)
        places = {(each.index.fqn, each.index.offset): each.storage_data for one in results for each in one}
        tensors = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata), f'{name} is no tensor'
            chunks = []
            for chunk in tensor.chunks:
                place = places[name, chunk.offsets]
                chunks.append([list(chunk.offsets), list(chunk.sizes), place.relative_path, place.offset, place.length])
            dtype = str(tensor.properties.dtype).removeprefix('torch.')
            tensors[name] = dict(dtype=dtype, size=list(tensor.size), chunks=chunks)
        files = {place.relative_path for place in places.values()}
        body = dict(tensors=tensors, files={name: (self._folder / name).stat().st_size for name in sorted(files)})
        write_whole(self._folder / INDEX, json.dumps(dict(body=body, sha256=_digest(body))))


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class ShardReader(dcp.FileSystemReader):
    """torch's reader on an index that was checked, which compares the checksums of what it reads.

    Raises:
        CheckpointError: If the folder is damaged, or says of itself what cannot be.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._folder = Path(folder)
        self.index = _read_index(self._folder)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the index as torch lays it out."""
        tensors: dict[str, Any] = {}
        places = {}
        for name, tensor in self.index.items():
            properties = TensorProperties(dtype=_DTYPES[tensor['dtype']])
            chunks = []
            for offsets, sizes, file, at, length in tensor['chunks']:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                key = MetadataIndex(name, torch.Size(offsets), len(chunks) - 1)
                places[key] = _StorageInfo(file, at, length)
            tensors[name] = TensorStorageMetadata(properties, torch.Size(tensor['size']), chunks)
        return Metadata(state_dict_metadata=tensors, storage_data=places)

    def read_data(self, plan: Any, planner: Any) -> Any:
        """Read pieces; only tensors are unpickled."""
        wanted = {self.storage_data[item.storage_index].relative_path for item in plan.items}
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            _check_piece(self._folder / place.relative_path, place.offset, place.length)
        try:
            with only_our_globals():
                return super().read_data(plan, planner)
        except container.PICKLE_ERRORS as error:
            names = ', '.join(sorted(wanted))
            raise CheckpointError(f'{self._folder}: {names} cannot be read ({printable(str(error))})') from error

    def check_whole(self) -> None:
        """Compare the checksums of all pieces."""
        for tensor in self.index.values():
            for _, _, file, at, length in tensor['chunks']:
                _check_piece(self._folder / file, at, length)

    def sizes(self) -> dict[str, torch.Size]:
        """Shapes of all tensors by name."""
        return {name: torch.Size(tensor['size']) for name, tensor in self.index.items()}

    def empty(self, name: str) -> Tensor:
        """Make a tensor of the shape and dtype of one in the folder, to read it into."""
        return torch.empty(self.index[name]['size'], dtype=_DTYPES[self.index[name]['dtype']])


def _read_index(folder: Path) -> dict[str, Any]:
    place = folder / INDEX
    try:
        content = json.loads(read_small(place, _MAX_INDEX))
        body = content['body']
        if content['sha256'] != _digest(body):
            raise ValueError('its checksum is wrong')
        _check_files(folder, body['files'])
        for name, tensor in body['tensors'].items():
            _check_tensor(name, tensor, body['files'])
    except OSError as error:
        raise CheckpointError(f'{place}: cannot be read ({error.strerror})') from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f'{place}: no index of a checkpoint ({printable(str(error))}); damaged?') from error
    return body['tensors']


def _check_files(folder: Path, files: Mapping[str, Any]) -> None:
    for name, size in files.items():
        if not _FILE.fullmatch(name) or type(size) is not int:
            raise ValueError(f'{printable(name)} is no name of a shard')
        path = folder / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f'{path}: not there, or not of {size:,} bytes')


def _check_tensor(name: str, tensor: Mapping[str, Any], files: Mapping[str, int]) -> None:
    """Check that pieces lie inside their files, fill the tensor, and are as large as what they claim to hold."""
    size, dtype = tensor['size'], _DTYPES[tensor['dtype']]
    if not name.startswith((MODEL, OPTIMIZER)) or not all(type(n) is int and n >= 0 for n in size):
        raise ValueError(f'{printable(name)} is no tensor of a model or an optimizer')
    covered = 0
    for offsets, sizes, file, at, length in tensor['chunks']:
        numbers = [*offsets, *sizes, at, length]
        if not all(type(number) is int and number >= 0 for number in numbers) or not len(size) == len(sizes) == len(
            offsets
        ):
            raise ValueError(f'{printable(name)} has a piece without a place')
        if any(offset + part > whole for offset, part, whole in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f'{printable(name)} has a piece outside of itself')
        if at + length > files[file] or prod(sizes) * dtype.itemsize > length:
            raise ValueError(f'{printable(name)} has a piece outside of its file')
        covered += prod(sizes)
    if covered != prod(size):
        raise ValueError(f'{printable(name)} is not covered by its pieces')


def _check_piece(path: Path, at: int, length: int) -> None:
    """Compare the checksums of one piece, which is an archive as torch.save writes them."""
    try:
        with path.open('rb') as file:
            file.seek(at)
            piece = io.BytesIO(file.read(length))
        with zipfile.ZipFile(piece) as archive:
            records = archive.infolist()
            if any(each.compress_type != zipfile.ZIP_STORED for each in records):
                raise CheckpointError(f'{path}: a piece is compressed, which torch.save never does; damaged?')
            damaged = archive.testzip()
    except OSError as error:
        raise CheckpointError(f'{path}: cannot be read ({error.strerror})') from error
    except container.DAMAGED_ZIP as error:
        raise CheckpointError(f'{path}: damaged ({printable(str(error))})') from error
    if damaged is not None:
        raise CheckpointError(f'{path}: damaged: the checksum of its record {printable(damaged)} is wrong')


def read_state(folder: str | Path, *, mmap: bool = False) -> Any:
    """Read all but the tensors of model and optimizer."""
    return read_file(Path(folder) / STATE, mmap=mmap)


def load_into(folder: str | Path, tensors: dict[str, Tensor], *, alone: bool = False) -> None:
    """Fill tensors, whole ones and such that lie in pieces, from what they are called in the folder.

    Args:
        tensors: Of the shapes there. In a distributed job every process calls alike.
        alone: Whether only this process reads. Defaults to False.

    Raises:
        CheckpointError: If the folder is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', message='torch.distributed is disabled', category=UserWarning)
            dcp.load(tensors, storage_reader=ShardReader(folder), no_dist=alone)
    except dcp.api.CheckpointException as error:
        # what happened in each process comes wrapped
        causes = [cause for cause, _ in error.failures.values()]
        raise next((each for each in causes if isinstance(each, CheckpointError)), error) from error


def read_whole(folder: str | Path, *, optimizer: bool = True) -> dict[str, Any]:
    """Read a folder as if one file had been written.

    Args:
        optimizer: Whether to read the optimizer's state as well. Defaults to True.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: If the folder is damaged.
    """
    content = read_state(folder)
    reader = ShardReader(folder)
    tensors = {name: reader.empty(name) for name in reader.index if optimizer or name.startswith(MODEL)}
    load_into(folder, tensors, alone=True)
    weights = ((name.removeprefix(MODEL), value) for name, value in tensors.items() if name.startswith(MODEL))
    content['state_dict'] = OrderedDict(weights)
    if optimizer and isinstance(content.get('optimizer'), dict):
        kept, state = content['optimizer'].get('state') or {}, numbered(tensors)
        merged = {number: {**kept.get(number, {}), **state.get(number, {})} for number in {**kept, **state}}
        content['optimizer'] = {**content['optimizer'], 'state': merged}
    else:
        content.pop('optimizer', None)
    return content


def read_path(path: str | Path, map_location: Any = 'cpu', *, mmap: bool = False) -> Any:
    """Read a checkpoint, a file as :func:`mila_mm.weights.file.reader.read_file` does, or a folder whole."""
    return read_whole(path) if is_sharded(path) else read_file(path, map_location, mmap=mmap)


def numbered(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Sort tensors named ``optimizer.NUMBER.KEY`` into the state of an optimizer."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(OPTIMIZER):
            number, _, key = name.removeprefix(OPTIMIZER).partition('.')
            state.setdefault(int(number), {})[key] = value
    return dict(sorted(state.items()))
