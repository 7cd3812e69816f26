"""Predictions, proposals and other data in a pickle, read without running what else may stand in it.

mmengine reads ``.pkl`` files with :mod:`pickle`, and through it every tool of mmdet and mmseg that takes predictions.
Here such a file may name what data are made of (numbers, containers, arrays, tensors, samples of OpenMMLab) and nothing
else. :func:`install` puts this in mmengine's place as soon as mmengine is imported.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
from types import ModuleType
from typing import Any, BinaryIO

from mila_mm.compat.import_hook import when_imported
from mila_mm.errors import UserError, printable, printable_path

TRUST = 'MILA_MM_TRUST_PICKLES'

_DATA = frozenset(
    {
        *(f'{module}.{name}' for module in ('builtins', '__builtin__') for name in ('complex', 'set', 'frozenset')),
        *(f'collections.{name}' for name in ('OrderedDict', 'defaultdict')),
        *(f'numpy.{name}' for name in ('ndarray', 'dtype')),
        *(
            f'numpy.{core}.{name}'
            for core in ('core', '_core')
            for name in ('multiarray._reconstruct', 'multiarray.scalar', 'numeric._frombuffer')
        ),
        *(f'torch._utils.{name}' for name in ('_rebuild_tensor_v2', '_rebuild_parameter')),
        *(f'torch.{name}' for name in ('Size', 'device')),
    }
)
# Classes of data and nothing else, whose instances take their state as it is.
_LIBRARIES = ('mmengine.structures', 'mmdet.structures', 'mmseg.structures', 'mmpretrain.structures')


class UnsafePickleError(UserError):
    """A pickle that asks for more than data."""


class DataUnpickler(pickle.Unpickler):
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
            own = isinstance(found, type) and found.__module__.startswith(_LIBRARIES)
            if own or type(found).__name__ == 'dtype':
                return found
        raise UnsafePickleError(
            f'this pickle is not read, as it holds more than data: it asks for {printable(full)}. '
            f'If you trust where it comes from, {TRUST}=1 reads it all the same.'
        )


def load(file: BinaryIO, **options: Any) -> Any:
    """Read a pickle as :func:`pickle.load` does, if it holds data and nothing else.

    Raises:
        UnsafePickleError: If it asks for anything else, and ``MILA_MM_TRUST_PICKLES`` is not set.
    """
    if os.environ.get(TRUST) == '1':
        return pickle.load(file, **options)
    return DataUnpickler(file, **options).load()


def loads(data: bytes, **options: Any) -> Any:
    """Read a pickle as :func:`pickle.loads` does; see :func:`load`."""
    return load(io.BytesIO(data), **options)


def _encode(text: str, *_: str) -> bytes:
    """Make the bytes that pickles of protocol 2 hold as text, in latin1 always."""
    return text.encode('latin1')


def _storage(data: bytes) -> Any:
    """Make a tensor's storage, which torch would unpickle once more, without limits."""
    import torch

    return torch.load(io.BytesIO(data), weights_only=True)


def _empty(*_: Any) -> bytes:
    """Make the one bytes object that protocol 2 has a name for."""
    return b''


_REPLACED = {
    '_codecs.encode': _encode,
    'builtins.bytes': _empty,
    '__builtin__.bytes': _empty,
    'torch.storage._load_from_bytes': _storage,
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


def install() -> None:
    """Patch mmengine as soon as it is imported."""
    when_imported('mmengine.fileio.handlers.pickle_handler', _take_data_only)
    when_imported('mmengine.fileio.io', _name_the_file)
