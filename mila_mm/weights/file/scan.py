"""What a pickle would do, found out without doing any of it.

``torch.load(weights_only=True)`` runs no code of a file, but it does hash, copy and allocate what the file says:
a kilobyte of pickle can ask for terabytes, or for years. Here the same opcodes are walked with costs in place of
objects, before torch sees the file. Only the standard library.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pickle import decode_long
from typing import Any

# Python hashes tuples recursively in C, without a limit of its own.
_MAX_DEPTH = 100
# Units of work, about 100 bytes or 50 ns each, that any file may cost, and that each byte of its pickle may add.
_WORK, _WORK_PER_BYTE = 1 << 20, 4
_CHARACTERS_PER_UNIT = 64
_ITEM_SIZES = {
    'Double': 8,
    'Float': 4,
    'Half': 2,
    'BFloat16': 2,
    'Long': 8,
    'Int': 4,
    'Short': 2,
    'Char': 1,
    'Byte': 1,
    'Bool': 1,
    'ComplexDouble': 16,
    'ComplexFloat': 8,
    'Untyped': 1,
}
# Types that files name to say what a storage is; called with a number they would allocate as much.
_NEVER_CALLED = frozenset({'torch.storage.UntypedStorage', 'torch.storage.TypedStorage'})
_LONG_PUT, _PUT, _GET, _LONG_GET, _BYTE, _STOP = b'rqhjK.'
_GETS = frozenset((_GET, _LONG_GET))


class _Value:
    """Anything but a number, a string or None.

    Attributes:
        kind: ``'tuple'``, ``'list'``, ``'dict'``, ``'global'`` or ``'object'``.
        items: The values of a tuple; the name of a global.
        cost: Units of work to copy or to hash it.
        depth: How deeply tuples are nested in it.
        fetched: Whether it was used again after it was made.
    """

    __slots__ = ('cost', 'depth', 'fetched', 'items', 'kind')

    def __init__(self, kind: str, items: Any = (), cost: int = 1) -> None:
        self.kind, self.items, self.cost = kind, items, cost
        self.depth, self.fetched = 0, False


def _cost(value: Any) -> int:
    if isinstance(value, _Value):
        return value.cost
    return 1 + len(value) // _CHARACTERS_PER_UNIT if isinstance(value, str) else 1


class Scan:
    """One pickle, walked.

    Args:
        data: Bytes, or a mapped file.
        start: Where the pickle starts.

    Attributes:
        names: Globals that it names, as 'module.name'.
        storages: Key of a storage -> bytes that it declares.
        position: Behind what was read; after :meth:`run`, behind its end.
    """

    def __init__(self, data: Any, start: int = 0) -> None:
        self.data, self.start, self.position = data, start, start
        self.names: set[str] = set()
        self.storages: dict[Any, int] = {}
        self._memo: dict[int, Any] = {}
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._work = 0

    def run(self) -> Scan:
        """Walk to the end.

        Raises:
            ValueError: If it uses what torch.save never writes, or asks for far more than it holds.
            IndexError: If it is damaged or ends too early, like the errors below.
            KeyError: For a value that was never made.
            AttributeError: For an operation on the wrong kind of value.
            TypeError: The same.
            struct.error: At the end of the data.
        """
        data, size, at = self.data, len(self.data), self.position
        memo, get_long = self._memo, struct.Struct('<I').unpack_from
        while True:
            code = data[at]
            at += 1
            # the frequent ones here, as a call for each would take as long as torch takes to read the file
            if code == _LONG_PUT:
                (slot,) = get_long(data, at)
                if slot > size:
                    raise ValueError(f'memo slot {slot} in {size} bytes')
                memo[slot] = self._stack[-1]
                at += 4
            elif code in _GETS:
                (slot,) = (data[at],) if code == _GET else get_long(data, at)
                at += 1 if code == _GET else 4
                value = memo[slot]
                if isinstance(value, _Value):
                    value.fetched = True
                self._stack.append(value)
            elif code == _BYTE:
                self._stack.append(data[at])
                at += 1
            elif code == _PUT:
                memo[data[at]] = self._stack[-1]
                at += 1
            elif code == _STOP:
                self._stack.pop()
                self.position = at
                return self
            else:
                self.position = at
                step = _OPCODES.get(code)
                if step is None:
                    raise ValueError(f'opcode {code:#04x}, which torch.save does not write')
                step(self)
                at = self.position

    def _take(self, count: int) -> bytes:
        taken = self.data[self.position : self.position + count]
        if len(taken) < count:
            raise ValueError('the data ends inside the pickle')
        self.position += count
        return taken

    def _line(self) -> str:
        end = self.data.find(b'\n', self.position)
        if end < 0:
            raise ValueError('the data ends inside a name')
        line = self._take(end - self.position)
        self.position += 1
        return line.decode()

    def _pop(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError('fewer values than an operation needs')
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _charge(self, cost: int) -> None:
        self._work += cost
        if self._work > _WORK + _WORK_PER_BYTE * (self.position - self.start):
            raise ValueError('multiplies its contents; made to exhaust memory or time')

    def _tuple(self, items: list[Any]) -> None:
        value = _Value('tuple', items)
        for item in items:
            value.cost += _cost(item)
            if isinstance(item, _Value) and item.depth >= value.depth:
                value.depth = item.depth + 1
        if value.depth > _MAX_DEPTH:
            raise ValueError(f'tuples nested more than {_MAX_DEPTH} deep')
        self._stack.append(value)

    def _marked_tuple(self) -> None:
        self._tuple(self._pop_mark())

    def _number(self, layout: str) -> None:
        self._stack.append(struct.unpack(layout, self._take(struct.calcsize(layout)))[0])

    def _mark(self) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _protocol(self) -> None:
        protocol = self._take(1)[0]
        if protocol != 2:
            raise ValueError(f'pickle protocol {protocol}, expected 2, the default of torch.save; save it again so')

    def _global(self) -> None:
        value = _Value('global', f'{self._line()}.{self._line()}')
        self.names.add(value.items)
        self._stack.append(value)

    def _string(self) -> None:
        self._stack.append(str(self._take(int.from_bytes(self._take(4), 'little')), 'utf-8', 'surrogatepass'))

    def _bytes_string(self) -> None:
        self._stack.append(self._take(self._take(1)[0]).decode('latin-1'))

    def _long(self) -> None:
        self._stack.append(decode_long(self._take(self._take(1)[0])))

    def _grow(self, cost: int, kinds: tuple[str, ...]) -> None:
        target = self._stack[-1]
        if target.kind not in kinds:
            raise ValueError(f'adds to a {target.kind}')
        if target.fetched:
            raise ValueError('containers inside themselves, or filled after they were used')
        target.cost += cost

    def _append(self) -> None:
        self._grow(1 + _cost(self._stack.pop()), ('list',))

    def _extend(self) -> None:
        items = self._pop_mark()
        self._grow(len(items) + sum(map(_cost, items)), ('list',))

    def _set_items(self, items: list[Any]) -> None:
        keys = items[::2]
        self._charge(sum(key.cost for key in keys if isinstance(key, _Value)))
        self._grow(len(keys) + sum(map(_cost, items)), ('dict', 'object'))

    def _set_marked(self) -> None:
        self._set_items(self._pop_mark())

    def _set_one(self) -> None:
        self._set_items(self._pop(2))

    def _call(self) -> None:
        function, arguments = self._pop(2)
        if function.kind != 'global' or arguments.kind != 'tuple':
            raise ValueError('calls what has no name')
        if function.items in _NEVER_CALLED:
            raise ValueError(f'makes a {function.items} of its own')
        # other codecs than the one by which pickles carry bytes may multiply, or import
        if function.items == '_codecs.encode' and (len(arguments.items) != 2 or arguments.items[1] != 'latin1'):
            raise ValueError('encodes by another codec than latin1')
        self._charge(arguments.cost)
        self._stack.append(_Value('object', cost=arguments.cost))

    def _build(self) -> None:
        state = self._stack.pop()
        self._charge(_cost(state))
        self._grow(_cost(state), ('object',))

    def _storage(self) -> None:
        pid = self._stack.pop()
        if pid.kind != 'tuple' or len(pid.items) not in (5, 6) or pid.items[0] != 'storage':
            raise ValueError('a persistent id that is no storage')
        _, kind, key, _, count, *_ = pid.items
        if not isinstance(kind, _Value) or kind.kind != 'global' or not isinstance(key, (str, int)):
            raise ValueError('a storage without a type or a key')
        if type(count) is not int or count < 0:
            raise ValueError(f'a storage of {str(count)[:40]} elements')
        item = _ITEM_SIZES.get(kind.items.rpartition('.')[2].removesuffix('Storage'), 16)
        self.storages[key] = max(self.storages.get(key, 0), count * item)
        self._stack.append(_Value('object'))


def _pushes(kind: str) -> Callable[[Scan], None]:
    return lambda scan: scan._stack.append(_Value(kind))


def _pushes_constant(value: bool | None) -> Callable[[Scan], None]:
    return lambda scan: scan._stack.append(value)


def _pushes_number(layout: str) -> Callable[[Scan], None]:
    return lambda scan: scan._number(layout)


def _makes_tuple(count: int) -> Callable[[Scan], None]:
    return lambda scan: scan._tuple(scan._pop(count))


_OPCODES: dict[int, Callable[[Scan], None]] = {
    0x80: Scan._protocol,
    ord('('): Scan._mark,
    ord('t'): Scan._marked_tuple,
    ord('c'): Scan._global,
    ord('X'): Scan._string,
    ord('U'): Scan._bytes_string,
    0x8A: Scan._long,
    ord('a'): Scan._append,
    ord('e'): Scan._extend,
    ord('s'): Scan._set_one,
    ord('u'): Scan._set_marked,
    ord('R'): Scan._call,
    0x81: Scan._call,
    ord('b'): Scan._build,
    ord('Q'): Scan._storage,
    ord(')'): _pushes('tuple'),
    ord(']'): _pushes('list'),
    ord('}'): _pushes('dict'),
    0x8F: _pushes('object'),
    ord('N'): _pushes_constant(None),
    0x88: _pushes_constant(True),
    0x89: _pushes_constant(False),
    ord('M'): _pushes_number('<H'),
    ord('J'): _pushes_number('<i'),
    ord('G'): _pushes_number('>d'),
    0x85: _makes_tuple(1),
    0x86: _makes_tuple(2),
    0x87: _makes_tuple(3),
}
