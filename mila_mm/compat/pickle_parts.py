"""The arrays, numbers and tensors of a pickle, made from what the file holds of them and no larger."""

from __future__ import annotations

import io
import math
import re
import sys
from typing import Any

from mila_mm.compat.pickle_reader import ADVICE, OpcodeReader, UnsafePickleError, unfilled
from mila_mm.errors import printable

# Numbers, text, times and objects, as numpy writes them: no fields, no arrays in them, no void.
_PLAIN = re.compile(r'[<>|=]?(?:[biufcSUmM][0-9]{0,10}|O[48]?|\?)')
# An expanded tensor repeats what it holds; up to here anyone may.
_MAX_REPEATED = 1 << 20
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class Array:
    """Stands for ``numpy.ndarray``, which would make an array of any size from a number."""

    def __new__(cls, *_: Any, **__: Any) -> Any:  # noqa: D102
        raise unfilled('an array without content')


def array(kind: Any, shape: Any, code: Any) -> Any:
    """Make the empty array that numpy's pickles begin with; the rest comes as its state."""
    import numpy as np

    if kind is not Array or shape != (0,) or code not in (b'b', 'b'):
        raise unfilled(f'an array of shape {shape}')
    return np.ndarray((0,), 'b')


def dtype(text: Any, align: Any = False, copy: Any = True) -> Any:
    """Make a plain dtype, always a new one: its state is set, and numpy's own ones are there for all."""
    import numpy as np

    text = text.decode('latin1') if isinstance(text, bytes) else text
    if not isinstance(text, str) or not _PLAIN.fullmatch(text):
        raise unfilled(f'the numpy type {text!r}')
    try:
        return np.dtype(text, False, True)
    except (TypeError, ValueError):
        raise unfilled(f'the numpy type {text!r}') from None


def check_dtype_state(kind: Any, state: Any) -> None:
    """Refuse a state other than the one that numpy writes for the same plain type."""
    import numpy as np

    if type(state) is not tuple or len(state) not in (8, 9) or state[1] not in ('<', '>', '|', b'<', b'>', b'|'):
        raise unfilled('a numpy type of an unknown state')
    order = state[1].decode() if isinstance(state[1], bytes) else state[1]
    unit = ''
    if len(state) == 9 and state[8] is not None:
        times = state[8]
        if kind.kind not in 'mM' or type(times) is not tuple or len(times) != 2 or times[0] not in ({}, None):
            raise unfilled('a numpy type with metadata')
        name, *counts = times[1] if type(times[1]) is tuple and times[1] else ('',)
        name = name.decode('latin1') if isinstance(name, bytes) else name
        if len(counts) < 2 or type(counts[0]) is not int or not isinstance(name, str) or not name.isalpha():
            raise unfilled('a time of an unknown unit')
        unit = '' if name == 'generic' else f'[{counts[0]}{name}]'
    try:
        length = {'O': '', 'U': kind.itemsize // 4}.get(kind.kind, kind.itemsize)
        like = np.dtype(f'{kind.kind}{length}{unit}').newbyteorder(order)
    except (TypeError, ValueError):
        raise unfilled('a numpy type of an unknown state') from None
    own = like.__reduce__()[2]
    sizes = type(state[0]) is int and state[0] in (3, 4) and order == own[1] and state[2:8] == own[2:8]
    times_alike = len(own) < 9 or (len(state) == 9 and tuple(state[8][1][1:]) == own[8][1][1:])
    if not sizes or not times_alike or any(type(n) is not int for n in state[5:8]):
        raise unfilled('a numpy type of a state that is not its own')


def _whole(shape: Any) -> bool:
    return type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape)


def _check_plain(kind: Any) -> None:
    import numpy as np

    if not isinstance(kind, np.dtype) or kind.kind not in 'biufcSUmMO' or kind.names or kind.subdtype:
        raise unfilled('an array of an unknown type')


def check_array_state(value: Any, state: Any, reader: OpcodeReader) -> None:
    """Refuse a state whose content does not fill the shape, or is none of the type."""
    if value.dtype.char != 'b' or value.shape != (0,) or not value.flags.owndata:
        raise unfilled('an array filled twice')
    if type(state) is not tuple or len(state) != 5 or state[0] != 1 or not _whole(state[1]):
        raise unfilled('an array of an unknown state')
    _, shape, kind, order, content = state
    _check_plain(kind)
    count = math.prod(shape)
    if not isinstance(order, (bool, int)):
        raise unfilled('an array of an unknown order')
    if kind.kind != 'O':
        if not isinstance(content, (bytes, str)) or len(content) != count * kind.itemsize or not kind.itemsize:
            raise unfilled(f'an array of shape {shape}')
        return
    if type(content) is not list or len(content) != count:
        raise unfilled(f'an array of {count} objects')
    if any(_is_empty_bytes(item) for item in content):
        raise unfilled('an array inside itself, or one of bytes and no length, in an array of objects')
    reader.note_nested(value, content, found=True)


def _is_empty_bytes(item: Any) -> bool:
    import numpy as np

    return isinstance(item, np.ndarray) and item.dtype.char == 'b' and item.shape == (0,)


def frombuffer(data: Any, kind: Any, shape: Any, order: Any, axes: Any = None) -> Any:
    """Make an array as pickles of protocol 5 hold them."""
    import numpy as np

    _check_plain(kind)
    filled = isinstance(data, (bytes, bytearray)) and _whole(shape) and kind.kind != 'O' and kind.itemsize
    if not filled or len(data) != math.prod(shape) * kind.itemsize or order not in ('C', 'F', 'K'):
        raise unfilled(f'an array of shape {shape}')
    if not data:
        return np.empty(shape, kind)
    made = np.frombuffer(data, kind)
    if order == 'K' and axes is not None:
        return made.reshape(shape, order='C').transpose(axes)
    return made.reshape(shape, order='F' if order == 'F' else 'C')


def scalar(kind: Any, data: Any = b'') -> Any:
    """Make a number of numpy's from its bytes, which old pickles hold as text."""
    import numpy as np

    data = data.encode('latin1') if isinstance(data, str) else data
    _check_plain(kind)
    if kind.kind == 'O' or not isinstance(data, bytes) or len(data) != kind.itemsize:
        raise unfilled('a number of numpy')
    return np.frombuffer(data, kind)[0] if data else kind.type()


def tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
    """Make a tensor from its storage, which torch would enlarge to whatever the sizes say."""
    import torch

    whole = _whole(size) and _whole(stride) and type(offset) is int and offset >= 0
    if not (isinstance(storage, torch.storage.TypedStorage) and whole):
        raise unfilled('a tensor')
    held, last = storage._size(), offset + sum((n - 1) * step for n, step in zip(size, stride, strict=False))
    if len(size) != len(stride) or (0 not in size and last >= held) or offset > held:
        raise unfilled(f'a tensor of shape {size}')
    if math.prod(size) > max(held, _MAX_REPEATED):
        raise unfilled(f'a tensor of shape {size} over {held} numbers')
    return torch._utils._rebuild_tensor_v2(storage, offset, size, stride, *rest)


class _StorageReader(OpcodeReader):
    """Reads what torch writes about one storage: it names its type and refers to it, and calls nothing."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the name of a storage's class, which is looked up later.

        Raises:
            UnsafePickleError: If it is the name of anything else.
        """
        if module != 'torch' or not name.isalnum() or not name.endswith('Storage'):
            raise UnsafePickleError(
                f'this pickle is not read, as it holds more than data: it asks for {printable(f"{module}.{name}")} '
                f'in the place of a storage. {ADVICE}'
            )
        return name

    def persistent_load(self, pid: Any) -> Any:
        return pid


def storage(data: Any) -> Any:
    """Make a tensor's storage from its own small file, which torch would unpickle once more, without limits."""
    import torch

    if not isinstance(data, bytes):
        raise unfilled('a storage')
    file = io.BytesIO(data)
    magic, protocol, _, about, keys = (_StorageReader(file).load() for _ in range(5))
    if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL or type(about) is not tuple or len(about) != 6:
        raise unfilled('a storage of another form than torch writes')
    word, name, key, location, count, view = about
    kind = getattr(getattr(torch, name, None), '_dtype', None) if isinstance(name, str) else None
    if word != 'storage' or not isinstance(kind, torch.dtype) or view is not None or keys != [key]:
        raise unfilled('a storage of another form than torch writes')
    held, content = file.read(8), memoryview(data)[file.tell() :]
    if type(count) is not int or len(content) != count * kind.itemsize or held != count.to_bytes(8, sys.byteorder):
        raise unfilled(f'a storage of {count!r} elements')
    raw = torch.frombuffer(bytearray(content), dtype=torch.uint8) if count else torch.empty(0, dtype=torch.uint8)
    placed = torch.serialization.default_restore_location(raw.untyped_storage(), location)
    return torch.storage.TypedStorage(wrap_storage=placed, dtype=kind, _internal=True)
