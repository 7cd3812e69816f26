"""Inert stand-ins for the harmless classes that training scripts leave in checkpoints.

A pickle names classes; the stand-ins answer to those names, so that the real ones are neither
imported nor run. Each keeps data only. :func:`plain` turns them into plain containers (and numpy
arrays, and mmengine's ``HistoryBuffer`` made afresh from its numbers) once a file has been read.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

_MAX_DEPTH = 100
_MAX_PATH = 4096
_MAX_DIMS = 32  # of numpy
_SHOWN = 80
_HISTORY_METHODS = frozenset({'min', 'max', 'mean', 'current'})
_ARRAY_KINDS = re.compile(r'[biufcSU]\d+|\?')


class _Holder:
    """Keeps the state that a pickle gives to an object, whatever it is."""

    state: Any = None

    def __new__(cls, *args: Any, **_: Any) -> _Holder:
        """Take any arguments and drop them."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Keep the state as data."""
        object.__setattr__(self, 'state', state)

    def plain(self, convert: Callable[[Any], Any]) -> Any:
        """Return the state as plain data."""
        return convert(self.state)


class Namespace(_Holder):
    """``argparse.Namespace`` and ``types.SimpleNamespace``: becomes a dict."""

    def plain(self, convert: Callable[[Any], Any]) -> Any:
        """Return the attributes as a dict."""
        return convert(self.state) if self.state else {}


class ConfigFile(_Holder):
    """``Config`` of mmengine and mmcv: becomes the dict of its entries."""

    def plain(self, convert: Callable[[Any], Any]) -> Any:
        """Return the entries as a dict."""
        state = self.state
        if isinstance(state, dict):
            state = (state.get('_cfg_dict', {}),)
        return convert(state[0]) if isinstance(state, tuple) and state else {}


class MessageHub(_Holder):
    """``MessageHub`` of early mmengine files: becomes what ``state_dict()`` returns today."""

    def plain(self, convert: Callable[[Any], Any]) -> Any:
        """Return scalars, information and keys in today's layout."""
        state = self.state if isinstance(self.state, dict) else {}
        return {name: convert(state.get(f'_{name}', {})) for name in ('log_scalars', 'runtime_info', 'resumed_keys')}


class HistoryBuffer(_Holder):
    """``HistoryBuffer``: becomes a fresh one with the same numbers, and nothing else from the file."""

    def plain(self, convert: Callable[[Any], Any]) -> Any:
        """Return mmengine's class, built from numbers."""
        from mmengine.logging import HistoryBuffer as Real

        state = convert(self.state) if isinstance(self.state, dict) else {}
        log, count = (np.asarray(state.get(name, ())) for name in ('_log_history', '_count_history'))
        limit = state.get('max_length', 1_000_000)
        if log.shape != count.shape or log.ndim != 1 or log.dtype.kind not in 'biuf' or not isinstance(limit, int):
            raise UnpicklingError('a HistoryBuffer whose histories are not two rows of numbers of one length')
        return Real(log, count, max(limit, 1))


class _Mapping:
    """A class of dicts: making one makes an ``OrderedDict``, the only kind that takes items and a state."""

    def __new__(cls, *args: Any) -> Any:
        """Return a plain mapping of what is given; a factory of defaults is dropped."""
        return OrderedDict(args[0]) if args and isinstance(args[0], dict) else OrderedDict()


class _Text:
    """A class of strings or paths: making one makes a string."""

    def __new__(cls, *args: Any) -> Any:
        """Return the parts joined as a path joins them."""
        # a path joined with itself again and again would double with each turn; one part alone cannot grow
        if not all(isinstance(arg, str) for arg in args) or (
            len(args) > 1 and sum(len(arg) + 1 for arg in args) > _MAX_PATH
        ):
            raise UnpicklingError(f'a path of more than {_MAX_PATH} characters, or not made of strings')
        return re.sub('/+', '/', '/'.join(args))


class Named:
    """A function or type that a file mentions and nobody may call."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f'<{self.name}, not imported>'


def history_method(owner: Any, name: Any) -> Named:
    """Stand in for ``getattr``, with which ``HistoryBuffer`` files name their own statistics.

    Args:
        owner: Must be the stand-in of ``HistoryBuffer``.
        name: Must be one of its statistics.

    Returns:
        A name that nobody can call.

    Raises:
        UnpicklingError: For any other use.
    """
    if owner is not HistoryBuffer or name not in _HISTORY_METHODS:
        raise UnpicklingError(f'getattr({owner!r}, {name!r}): only statistics of a HistoryBuffer may be named')
    return Named(f'HistoryBuffer.{name}')


class Dtype(_Holder):
    """``numpy.dtype`` of numbers and strings; the real one is made when its bytes are looked at."""

    code: str

    def __new__(cls, code: Any = '', *_: Any) -> Dtype:
        """Keep the code after checking it."""
        if not isinstance(code, str) or not _ARRAY_KINDS.fullmatch(code):
            raise UnpicklingError(f'a numpy dtype {code!r}; expected numbers or fixed-length strings')
        self = object.__new__(cls)
        self.code = code
        return self

    def real(self) -> np.dtype:
        """Return the dtype with the byte order of the file."""
        order = self.state[1] if isinstance(self.state, tuple) and len(self.state) > 1 else '='
        return np.dtype(('>' if order == '>' else '<') + self.code) if self.code != '?' else np.dtype('bool')

    def plain(self, convert: Callable[[Any], Any]) -> Any:
        """Return the real dtype."""
        return self.real()


class Array(_Holder):
    """``numpy.ndarray``: made from its bytes, whose number its shape must match."""

    def plain(self, convert: Callable[[Any], Any]) -> Any:
        """Return the array."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            raise UnpicklingError('a numpy array without contents')
        _, shape, dtype, fortran, raw = self.state
        values = _from_bytes(dtype, raw)
        if not isinstance(shape, tuple) or len(shape) > _MAX_DIMS or not all(type(n) is int and n >= 0 for n in shape):
            raise UnpicklingError(f'a numpy array of shape {str(shape)[:_SHOWN]}')
        count = 1
        for n in shape:
            count *= n
        if count != values.size:
            raise UnpicklingError(f'a numpy array of shape {shape} with {values.size} elements')
        return values.reshape(shape, order='F' if fortran else 'C')


def _from_bytes(dtype: Any, raw: Any) -> np.ndarray:
    if not isinstance(dtype, Dtype) or not isinstance(raw, bytes):
        raise UnpicklingError('a numpy value that is not made of numbers')
    real = dtype.real()
    if real.itemsize == 0 or len(raw) % real.itemsize:
        raise UnpicklingError(f'a numpy value of {len(raw)} bytes for dtype {real}')
    return np.frombuffer(bytearray(raw), dtype=real)


def new_array(*_: Any) -> Array:
    """Stand in for ``numpy.core.multiarray._reconstruct``.

    Returns:
        An array that is still to get its contents; no memory is taken for the shape that the file asks for.
    """
    return Array()


def scalar(dtype: Any, raw: Any) -> Any:
    """Stand in for ``numpy.core.multiarray.scalar``.

    Returns:
        The numpy scalar.

    Raises:
        UnpicklingError: If the bytes are not one value.
    """
    values = _from_bytes(dtype, raw)
    if values.size != 1:
        raise UnpicklingError(f'a numpy scalar of {values.size} values')
    return values[0]


def _names(stand_in: Any, *paths: str) -> dict[str, Any]:
    return dict.fromkeys(paths, stand_in)


# The full name in a file -> what answers to it.
STAND_INS: dict[str, Any] = {
    **_names(Namespace, 'argparse.Namespace', 'types.SimpleNamespace'),
    **_names(
        _Mapping,
        'yacs.config.CfgNode',
        'fvcore.common.config.CfgNode',
        'detectron2.config.config.CfgNode',
        'iopath.common.config.CfgNode',
        'addict.addict.Dict',
        'addict.Dict',
        'mmcv.utils.config.ConfigDict',
        'mmengine.config.config.ConfigDict',
        'collections.defaultdict',
        'easydict.EasyDict',
    ),
    **_names(ConfigFile, 'mmcv.utils.config.Config', 'mmengine.config.config.Config'),
    **_names(
        _Text,
        'pathlib.PosixPath',
        'pathlib.WindowsPath',
        'pathlib.PurePosixPath',
        'pathlib.PureWindowsPath',
        'pathlib.Path',
        'pathlib._local.PosixPath',
        'pathlib._local.WindowsPath',
        'torch.torch_version.TorchVersion',
    ),
    'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
    'mmengine.logging.message_hub.MessageHub': MessageHub,
    'builtins.getattr': history_method,
    'numpy.dtype': Dtype,
    'numpy.ndarray': Array,
    **_names(new_array, 'numpy.core.multiarray._reconstruct', 'numpy._core.multiarray._reconstruct'),
    **_names(scalar, 'numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar'),
    **{f'builtins.{name}': Named(f'builtins.{name}') for name in ('int', 'float', 'str', 'bool', 'list', 'dict')},
}
# torch's unpickler sets the state of allowed classes only, and asks for the classes of what was made.
REGISTRATIONS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (stand_in, name) for name, stand_in in STAND_INS.items()
]


def plain(value: Any) -> Any:
    """Turn what was read into plain containers, tensors, numbers, strings and numpy arrays.

    Args:
        value: What an unpickler made of a file.

    Returns:
        The same data without stand-ins. Shared objects stay shared.

    Raises:
        UnpicklingError: If it is nested too deeply, contains itself, or a stand-in holds nonsense.
    """
    return _Plain().convert(value)


class _Plain:
    """One conversion, which remembers what it has done."""

    def __init__(self) -> None:
        self.done: dict[int, Any] = {}
        self.open: set[int] = set()
        self.kept: list[Any] = []  # ids stay valid while their objects live

    def convert(self, value: Any) -> Any:
        """Convert one value and all that it holds.

        Raises:
            UnpicklingError: If it is nested too deeply, or contains itself.
        """
        if isinstance(value, (str, int, float, bytes, complex, type(None), Named)) or type(value) is torch.Tensor:
            return value
        if isinstance(value, torch.Tensor):
            return torch.Tensor.detach(value)  # of a parameter, whose attributes the file may have replaced
        key = id(value)
        if key in self.done:
            return self.done[key]
        if key in self.open or len(self.open) > _MAX_DEPTH:
            raise UnpicklingError(f'containers nested more than {_MAX_DEPTH} deep, or inside themselves')
        self.open.add(key)
        result = self._convert(value)
        self.open.discard(key)
        self.kept.append(value)
        self.done[key] = result
        return result

    def _convert(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, _Holder):
            return value.plain(self.convert)
        if kind is OrderedDict:
            result: Any = OrderedDict((self.convert(k), self.convert(v)) for k, v in value.items())
            # of the attributes that a file may set only this one means something: versions of torch's modules
            metadata = value.__dict__.get('_metadata')
            if isinstance(metadata, dict):
                result._metadata = OrderedDict(
                    (name, {'version': entry['version']})
                    for name, entry in metadata.items()
                    if isinstance(name, str) and isinstance(entry, dict) and type(entry.get('version')) is int
                )
            return result
        if kind in (dict, Counter):
            return kind({self.convert(k): self.convert(v) for k, v in value.items()})
        if kind in (list, tuple, set):
            return kind(self.convert(item) for item in value)
        return value
