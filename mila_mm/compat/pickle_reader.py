"""The opcodes of a pickle, carried out where they make data and refused where they do anything else.

Python's own unpickler sets the state of whatever lies on its stack: of a class, for the whole process, or of an array,
from a pointer in the file. The one here is its slow twin from the standard library, which takes as long as a walk of
the opcodes beforehand would, and sees the values themselves. Only the standard library.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict, defaultdict
from typing import Any, ClassVar

from mila_mm.errors import UserError, printable

TRUST = 'MILA_MM_TRUST_PICKLES'
ADVICE = f'If you trust where it comes from, {TRUST}=1 reads it all the same.'
# Python hashes tuples recursively in C, and numpy frees arrays in arrays so, without a limit of their own.
_MAX_DEPTH = 100
# Values, or 64 bytes, that any file may have copied or hashed once more; each of its bytes adds one.
_WORK = 1 << 20
_BYTES_PER_UNIT = 64
_DICTS = (dict, OrderedDict, defaultdict)
_DAMAGED = (IndexError, KeyError, AttributeError, TypeError, ValueError, OverflowError, struct.error)


class UnsafePickleError(UserError):
    """A pickle that asks for more than data."""


def unfilled(what: str) -> UnsafePickleError:
    """Return the error for a size that nothing in the file fills."""
    return UnsafePickleError(
        f'this pickle is not read, as a size in it is wrong: it asks for {printable(what)}, of which it holds less, or '
        f'which no file of data holds; damaged? {ADVICE}'
    )


def _refused(what: str) -> UnsafePickleError:
    return UnsafePickleError(f'this pickle is not read, as it holds more than data: it {printable(what)}. {ADVICE}')


class OpcodeReader(pickle._Unpickler):  # type: ignore[misc]
    """An unpickler that fills containers, and sets the state of what :meth:`check_state` lets through.

    Args:
        file: Read from where it stands: a BytesIO to the end of the pickle, another file to its own.
        options: As of :class:`pickle.Unpickler`.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, **options: Any) -> None:
        source = file if type(file) is io.BytesIO else io.BytesIO(file.read())
        self._work_left = _WORK + source.getbuffer().nbytes
        self._nested: dict[int, tuple[int, int, Any]] = {}  # of what holds tuples: depth, values in it, and itself
        super().__init__(source, **options)

    def load(self) -> Any:
        """Read one pickle.

        Raises:
            UnsafePickleError: If it asks for more than data.
            pickle.UnpicklingError: If it is damaged.
            EOFError: If it ends too early.
        """
        try:
            return super().load()
        except _DAMAGED as error:
            if isinstance(error, UserError):
                raise
            raise pickle.UnpicklingError(f'damaged pickle: {type(error).__name__}: {error}') from error

    def check_call(self, function: Any, arguments: tuple[Any, ...]) -> None:
        """Refuse a call that :meth:`find_class` cannot judge by its name."""
        raise _refused('calls a function')

    def check_state(self, value: Any, state: Any) -> None:
        """Refuse a state that is none of the value's own."""
        raise _refused(f'sets the state of a {type(value).__name__}')

    def charge(self, units: int) -> None:
        """Count what is copied or hashed once more.

        Raises:
            UnsafePickleError: If it is far more than the file holds.
        """
        self._work_left -= units
        if self._work_left < 0:
            raise unfilled('its contents many times over')

    def note_nested(self, value: Any, items: Any, found: bool = False) -> None:
        """Note how deeply a value is nested, and how many values are in it.

        Args:
            found: Whether to note it if nothing nested is in it, too.

        Raises:
            UnsafePickleError: If it is too deep, or holds the same values too many times.
        """
        depth, count = 1, len(items)
        for item in items:
            below = self._nested.get(id(item))
            if below is not None or type(item) is tuple:
                found = True
                depth = max(depth, 1 + (below[0] if below else 1))
                count += below[1] if below else len(item)
        if depth > _MAX_DEPTH:
            raise unfilled(f'tuples or arrays nested more than {_MAX_DEPTH} deep')
        if count > self._work_left:
            raise unfilled('its contents many times over')
        if found:
            self._nested[id(value)] = depth, count, value

    def _charge_keys(self, keys: Any) -> None:
        for key in keys:
            if type(key) is tuple:
                self.charge(self._nested[id(key)][1] if id(key) in self._nested else len(key))

    def _charge_values(self, values: Any) -> None:
        for value in values:
            if isinstance(value, (list, tuple, *_DICTS, set, frozenset)):
                self.charge(len(value))
                if isinstance(value, (list, tuple)):
                    self._charge_keys(value)
            elif isinstance(value, (str, bytes, bytearray)):
                self.charge(len(value) // _BYTES_PER_UNIT)

    def _read_whole(self, size: int) -> bytes:
        data: bytes = self.read(size)
        if len(data) < size:
            raise pickle.UnpicklingError('the data end inside the pickle')
        return data

    def _build(self) -> None:
        value, state = self.stack[-2:]
        self.check_state(value, state)
        self._charge_values(state if isinstance(state, tuple) else (state,))
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)

    def _reduce(self) -> None:
        function, arguments = self.stack[-2:]
        if type(arguments) is not tuple:
            raise _refused('calls with no tuple of arguments')
        self._call(function, arguments)
        pickle._Unpickler.dispatch[pickle.REDUCE[0]](self)

    def _new(self) -> None:
        self._reduce_like(pickle.NEWOBJ, *self.stack[-2:])

    def _new_with_names(self) -> None:
        made, arguments, named = self.stack[-3:]
        if named:
            raise _refused('calls with named arguments')
        self._reduce_like(pickle.NEWOBJ_EX, made, arguments)

    def _reduce_like(self, code: bytes, made: Any, arguments: Any) -> None:
        if not isinstance(made, type) or type(arguments) is not tuple:
            raise _refused('makes an object of no class')
        self._call(made, arguments)
        pickle._Unpickler.dispatch[code[0]](self)

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self.check_call(function, arguments)
        self._charge_values(arguments)

    def _old_call(self) -> None:
        raise _refused('makes objects as no pickle of protocol 2 or later does')

    def _tuple(self, code: int) -> None:
        pickle._Unpickler.dispatch[code](self)
        made = self.stack[-1]
        self.note_nested(made, made)

    def _fill(self, code: int, kinds: tuple[type, ...], marked: bool) -> None:
        if marked:
            target, items = self.metastack[-1][-1], self.stack
        else:
            count = 2 if code == pickle.SETITEM[0] else 1
            target, items = self.stack[-1 - count], self.stack[-count:]
        if type(target) not in kinds:
            raise _refused(f'adds to a {type(target).__name__}')
        if kinds is not _LISTS:
            self._charge_keys(items if kinds is _SETS else items[::2])
        pickle._Unpickler.dispatch[code](self)

    def _frozenset(self) -> None:
        self._charge_keys(self.stack)
        pickle._Unpickler.dispatch[pickle.FROZENSET[0]](self)

    def _bytearray(self) -> None:
        (size,) = struct.unpack('<Q', self._read_whole(8))
        self.append(bytearray(self._read_whole(min(size, 1 << 62))))


_LISTS, _SETS = (list,), (set,)
_CHANGED = {
    pickle.BUILD: OpcodeReader._build,
    pickle.REDUCE: OpcodeReader._reduce,
    pickle.NEWOBJ: OpcodeReader._new,
    pickle.NEWOBJ_EX: OpcodeReader._new_with_names,
    pickle.OBJ: OpcodeReader._old_call,
    pickle.INST: OpcodeReader._old_call,
    pickle.FROZENSET: OpcodeReader._frozenset,
    pickle.BYTEARRAY8: OpcodeReader._bytearray,
    pickle.APPEND: lambda self: self._fill(pickle.APPEND[0], _LISTS, False),
    pickle.APPENDS: lambda self: self._fill(pickle.APPENDS[0], _LISTS, True),
    pickle.SETITEM: lambda self: self._fill(pickle.SETITEM[0], _DICTS, False),
    pickle.SETITEMS: lambda self: self._fill(pickle.SETITEMS[0], _DICTS, True),
    pickle.ADDITEMS: lambda self: self._fill(pickle.ADDITEMS[0], _SETS, True),
    pickle.TUPLE: lambda self: self._tuple(pickle.TUPLE[0]),
    pickle.TUPLE1: lambda self: self._tuple(pickle.TUPLE1[0]),
    pickle.TUPLE2: lambda self: self._tuple(pickle.TUPLE2[0]),
    pickle.TUPLE3: lambda self: self._tuple(pickle.TUPLE3[0]),
}
OpcodeReader.dispatch.update({code[0]: step for code, step in _CHANGED.items()})
