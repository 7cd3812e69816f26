"""Predictions, proposals and other data in a pickle, read without running what else may stand in it.

mmengine reads ``.pkl`` files with :mod:`pickle`, and through it every tool of mmdet and mmseg that takes predictions.
Here such a file may name what data are made of (numbers, containers, arrays, tensors, samples of OpenMMLab) and nothing
else, and no array, tensor or mask in it may be larger than what the file holds of it. :func:`install` puts this in the
place of mmengine's reader, and of those of the few data sets that unpickle by themselves, as soon as they are imported.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import sys
from collections import OrderedDict
from numbers import Integral
from types import ModuleType, SimpleNamespace
from typing import Any, BinaryIO

from mila_mm.compat import pickle_parts as parts
from mila_mm.compat.import_hook import when_imported
from mila_mm.compat.pickle_reader import ADVICE, TRUST, OpcodeReader, UnsafePickleError, unfilled
from mila_mm.errors import printable, printable_path

_MAX_PIXELS = 2**30

_DATA = frozenset(
    {
        *(f'{module}.{name}' for module in ('builtins', '__builtin__') for name in ('complex', 'set', 'frozenset')),
        *(f'collections.{name}' for name in ('OrderedDict', 'defaultdict')),
        'torch._utils._rebuild_parameter',
        *(f'torch.{name}' for name in ('Size', 'device')),
    }
)
# Classes of data and nothing else, whose instances take their state as it is.
_LIBRARIES = ('mmengine.structures', 'mmdet.structures', 'mmseg.structures', 'mmpretrain.structures')


class DataUnpickler(OpcodeReader):
    """An unpickler that makes data and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name in the file stands for.

        Raises:
            UnsafePickleError: If it is not a part of data.
        """
        full = f'{module}.{name}'
        if full in _REPLACED:
            return _REPLACED[full]
        if '.' not in name and full in _DATA:
            return super().find_class(module, name)
        if '.' not in name and (module == 'torch' or full.startswith(_LIBRARIES)):
            found = super().find_class(module, name)
            if _is_own(found) or type(found).__name__ == 'dtype':
                return found
        raise UnsafePickleError(
            f'this pickle is not read, as it holds more than data: it asks for {printable(full)}. {ADVICE}'
        )

    def check_call(self, function: Any, arguments: tuple[Any, ...]) -> None:
        """Refuse what :meth:`find_class` did not return, and arguments for a sample, which pickles hold as state."""
        if not callable(function) or (_is_own(function) and arguments):
            raise UnsafePickleError(
                f'this pickle is not read, as it holds more than data: it calls {printable(repr(function))}. {ADVICE}'
            )

    def check_state(self, value: Any, state: Any) -> None:
        """Refuse a state that is not a dict of a sample, or what numpy writes for its arrays and types."""
        if _is_own(type(value)) or type(value) is OrderedDict:
            if type(state) is not dict:
                raise unfilled(f'a {type(value).__name__} of an unknown state')
            return
        numpy = sys.modules.get('numpy')
        if numpy is not None and isinstance(value, numpy.dtype):
            parts.check_dtype_state(value, state)
        elif numpy is not None and type(value) is numpy.ndarray:
            parts.check_array_state(value, state, self)
        else:
            super().check_state(value, state)


def _is_own(kind: Any) -> bool:
    return isinstance(kind, type) and kind.__module__.startswith(_LIBRARIES)


def load(file: BinaryIO, **options: Any) -> Any:
    """Read a pickle as :func:`pickle.load` does, if it holds data and nothing else.

    Raises:
        UnsafePickleError: If it asks for anything else, or for more than it holds, and ``MILA_MM_TRUST_PICKLES`` is
            not set.
    """
    if os.environ.get(TRUST) == '1':
        return pickle.load(file, **options)
    content = DataUnpickler(file, **options).load()
    check_masks(content)
    return content


def loads(data: bytes, **options: Any) -> Any:
    """Read a pickle as :func:`pickle.loads` does; see :func:`load`."""
    return load(io.BytesIO(data), **options)


def load_array(file: BinaryIO) -> Any:
    """Read an array as ``numpy.load(file, allow_pickle=True)`` does, with the objects in it as :func:`load` reads them.

    Raises:
        UnsafePickleError: As :func:`load` does.
    """
    import numpy as np

    magic = np.lib.format.MAGIC_PREFIX
    start = file.read(len(magic))
    file.seek(0)
    if start != magic:
        return load(file)
    old = np.lib.format.read_magic(file) == (1, 0)
    shape, _, kind = (np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0)(file)
    if kind.hasobject:
        return load(file).reshape(shape)
    file.seek(0)
    return np.load(file, allow_pickle=False)


def check_masks(content: Any) -> None:
    """Check the sizes of run-length encoded masks, at which pycocotools takes memory without looking.

    Args:
        content: Data of containers and samples, however nested.

    Raises:
        UnsafePickleError: If a mask's ``size`` is not two whole numbers, of 2**30 pixels at most (OpenCV reads no
            larger image), or its ``counts`` are no runs.
    """
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if value.keys() >= {'size', 'counts'}:
                _check_mask(value)
                continue
            held = [*value.values(), *getattr(value, '__dict__', {}).values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            held = list(value)
        elif _is_own(type(value)):
            held = list(vars(value).values())
        elif getattr(getattr(value, 'dtype', None), 'hasobject', False):
            held = value.ravel().tolist()
        else:
            continue
        if id(value) not in seen:
            seen.add(id(value))
            waiting.extend(held)


def _check_mask(mask: dict[str, Any]) -> None:
    size, counts = mask['size'], mask['counts']
    whole = isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(n, Integral) and n >= 0 for n in size)
    if not whole or size[0] * size[1] > _MAX_PIXELS:
        raise unfilled(f'a mask of size {size!r}')
    if not isinstance(counts, (bytes, str)) and not (
        isinstance(counts, list) and all(isinstance(n, Integral) and n >= 0 for n in counts)
    ):
        raise unfilled(f'a mask with {type(counts).__name__} for counts')


def _encode(text: str, *_: str) -> bytes:
    """Make the bytes that pickles of protocol 2 hold as text, in latin1 always."""
    return text.encode('latin1')


def _empty(*_: Any) -> bytes:
    """Make the one bytes object that protocol 2 has a name for."""
    return b''


_REPLACED = {
    '_codecs.encode': _encode,
    'builtins.bytes': _empty,
    '__builtin__.bytes': _empty,
    'torch.storage._load_from_bytes': parts.storage,
    'torch._utils._rebuild_tensor_v2': parts.tensor,
    'numpy.ndarray': parts.Array,
    'numpy.dtype': parts.dtype,
    **{f'numpy.{core}.multiarray._reconstruct': parts.array for core in ('core', '_core')},
    **{f'numpy.{core}.multiarray.scalar': parts.scalar for core in ('core', '_core')},
    **{f'numpy.{core}.numeric._frombuffer': parts.frombuffer for core in ('core', '_core')},
}


def _take_data_only(module: ModuleType) -> None:
    """Replace how ``mmengine.load`` and its like read ``.pkl`` files."""

    def load_from_fileobj(self: Any, file: BinaryIO, **kwargs: Any) -> Any:
        return load(file, **kwargs)

    module.PickleHandler.load_from_fileobj = load_from_fileobj


def _name_the_file(module: ModuleType) -> None:
    """Have ``mmengine.load`` say which file it is that is not read."""
    read = module.load

    @functools.wraps(read)
    def load_named(file: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return read(file, *args, **kwargs)
        except UnsafePickleError as error:
            raise UnsafePickleError(f'{printable_path(file)}: {error}') from error

    module.load = load_named
    for name in ('mmengine.fileio', 'mmengine'):  # they have the function already where they were imported first
        package = sys.modules.get(name)
        if package is not None and getattr(package, 'load', None) is read:
            setattr(package, 'load', load_named)  # noqa: B010  not an attribute that types know


def _unpickle_data_only(module: ModuleType) -> None:
    """Replace :mod:`pickle` in a module that reads data with it."""
    module.pickle = SimpleNamespace(load=load, loads=loads)


def _read_hierarchy(module: ModuleType) -> None:
    """Replace how Open Images' challenge set reads the matrix of its classes, with pickled objects allowed."""

    def _get_relation_matrix(self: Any, hierarchy_file: str) -> Any:
        with module.get_local_path(hierarchy_file, backend_args=self.backend_args) as path, open(path, 'rb') as file:
            try:
                return load_array(file)[1:, 1:]
            except UnsafePickleError as error:
                raise UnsafePickleError(f'{printable_path(hierarchy_file)}: {error}') from error

    module.OpenImagesChallengeDataset._get_relation_matrix = _get_relation_matrix


def install() -> None:
    """Patch mmengine, and what else reads pickles of data, as soon as they are imported."""
    when_imported('mmengine.fileio.handlers.pickle_handler', _take_data_only)
    when_imported('mmengine.fileio.io', _name_the_file)
    when_imported('mmseg.utils.io', _unpickle_data_only)
    when_imported('mmpretrain.datasets.cifar', _unpickle_data_only)
    when_imported('mmdet.datasets.openimages', _read_hierarchy)
