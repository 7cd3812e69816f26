"""Reading a checkpoint without running any of it.

``torch.load(weights_only=True)`` does the reading. Around it: the file's declared sizes are checked
before anything is allocated, the globals that its pickle names are compared with a list that is
shorter than torch's own, and the harmless classes of training scripts get inert stand-ins for the
time of the call. Nothing here ever sets ``weights_only=False``.
"""

from __future__ import annotations

import io
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mila_mm.weights import container
from mila_mm.weights.errors import CheckpointError, UnsafeCheckpointError
from mila_mm.weights.standins import REGISTRATIONS, STAND_INS, plain

# What torch's own list would let pass and no checkpoint of weights needs (subclasses, constructors
# that allocate by a number in the file, sparse and quantised tensors) is left out.
_TORCH_NAMES = frozenset({
    'collections.OrderedDict', 'collections.Counter', 'torch.Size', 'torch.device', 'torch.nn.parameter.Parameter',
    'torch._utils._rebuild_tensor', 'torch._utils._rebuild_tensor_v2', 'torch._utils._rebuild_tensor_v3',
    'torch._utils._rebuild_parameter', 'torch._utils._rebuild_parameter_with_state',
    'torch.storage.UntypedStorage', 'torch.storage.TypedStorage',
    '_codecs.encode', '__builtin__.set', 'builtins.set', 'builtins.complex',
})
_DTYPES = frozenset(f'torch.{name}' for name, value in vars(torch).items()
                    if isinstance(value, torch.dtype) and not name.startswith(('q', 'bits')))
_STORAGE = re.compile(r'torch(\.cuda)?\.[A-Z][A-Za-z0-9]*Storage')
# pickles of protocol 2 spell Python 3's builtins so
_OLD_MODULES = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}
# torch's unpickler knows globals only as opcode c, module, newline, name, newline. A lookahead, because matches
# overlap: a string in the file may begin what looks like a global and swallow the start of a real one.
_GLOBAL_LIKE = re.compile(rb'(?=c([^\n\x00-\x1f]{1,200})\n([^\n\x00-\x1f]{1,200})\n)')
_SHOWN = 5
# Bytes that tensors may claim beyond what is stored, where the file itself is not larger
_EXPANSION = 16 << 20
_ITEM_SIZES = {'Double': 8, 'Float': 4, 'Half': 2, 'BFloat16': 2, 'Long': 8, 'Int': 4, 'Short': 2, 'Char': 1, 'Byte': 1,
               'Bool': 1, 'ComplexDouble': 16, 'ComplexFloat': 8}
_lock = threading.RLock()


@contextmanager
def _only_our_globals() -> Iterator[None]:
    """Let torch's unpickler know our stand-ins and nothing that other code has allowed in this process."""
    serialization = torch.serialization
    with _lock:
        before = serialization.get_safe_globals()
        serialization.clear_safe_globals()
        try:
            serialization.add_safe_globals(REGISTRATIONS)
            yield
        finally:
            serialization.clear_safe_globals()
            serialization.add_safe_globals(before)


def read_file(
    path: str | Path, map_location: str | torch.device | Callable | dict | None = 'cpu', *, mmap: bool = False
) -> Any:
    """Read a checkpoint of any format that torch or safetensors writes.

    Args:
        path: The file.
        map_location: As for :func:`torch.load`, but ``None`` means the CPU.
        mmap: Map the file instead of copying it; for files that nobody writes to while the tensors live.

    Returns:
        What the file holds, as plain containers. A safetensors file gives
        ``dict(state_dict=..., meta=...)`` with its metadata.

    Raises:
        FileNotFoundError: If there is no such file.
        UnsafeCheckpointError: If it asks for more than tensors and plain containers.
        CheckpointError: If it is damaged or no checkpoint.
    """
    path = Path(path).expanduser()
    location = 'cpu' if map_location is None else map_location
    kind = container.sniff(path)
    if kind == container.SAFETENSORS:
        return _read_safetensors(path, location)
    if kind == container.ZIP:
        _screen_zip(path)
    else:
        _screen_legacy(path)
    try:
        with _only_our_globals(), warnings.catch_warnings():
            # the advice in torch's warnings (other options of torch.load) is not for users of this function
            warnings.filterwarnings('ignore', category=UserWarning, module='torch')
            mapped = mmap and kind == container.ZIP
            content = plain(torch.load(path, map_location=location, weights_only=True, mmap=mapped))
    except container.PICKLE_ERRORS as error:
        raise CheckpointError(f'{path}: cannot be read ({_cause(error)})') from error
    _check_tensors(path, content)
    return content


def _cause(error: BaseException) -> str:
    """The part of an error of torch.load that says what is wrong, without its advice to load unsafely."""
    text = str(error)
    if 'Unsupported operand' in text:
        return 'written with another pickle protocol than torch.save uses by default; save it again with the default'
    for marker in ('WeightsUnpickler error: ', 'Weights only load failed. '):
        text = text.rpartition(marker)[2]
    lines = [line for line in text.split('\n\nCheck the documentation')[0].splitlines()
             if line.strip() and 'weights_only' not in line]
    words = lines[-1].strip() if lines else ''
    return f'truncated, damaged, or no weights: {type(error).__name__}{": " if words else ""}{words[:200]}'


def _allowed(name: str) -> bool:
    return name in _TORCH_NAMES or name in STAND_INS or name in _DTYPES or _STORAGE.fullmatch(name) is not None


def _modern(name: str) -> str:
    module, dot, attribute = name.rpartition('.')
    return _OLD_MODULES.get(module, module) + dot + attribute


def _refuse(path: Path, names: set[str]) -> None:
    listed = ', '.join(sorted(names)[:_SHOWN]) + (f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else '')
    raise UnsafeCheckpointError(f'{path}: names {listed}, which no file of weights needs\n'
                                'Unpickling such names can run any code: nothing of the file was run or read.')


def _screen_zip(path: Path) -> None:
    """Refuse a file by the globals in its pickle, all of them at once, before torch opens it."""
    record = container.check_zip(path)
    try:
        with zipfile.ZipFile(path) as archive:
            data = archive.read(record)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise CheckpointError(f'{path}: truncated or damaged ({error})') from error
    # A superset found by looking at bytes (strings may look like globals); the exact walk only where it matters.
    seen = {_modern(f'{m.decode("latin-1")}.{n.decode("latin-1")}') for m, n in _GLOBAL_LIKE.findall(data)}
    if all(_allowed(name) for name in seen):
        return
    try:
        named = {_modern(name) for name, slot in container.pickle_globals(io.BytesIO(data)) if slot is None}
    except container.PICKLE_ERRORS as error:
        raise CheckpointError(f'{path}: its pickle is damaged ({error})') from error
    bad = {name for name in named if not _allowed(name)}
    if bad:
        _refuse(path, bad)


def _screen_legacy(path: Path) -> None:
    """Do for torch's format before 1.6 what the directory of a zip does: bound all that it declares.

    There the pickle alone says how large each storage is, and torch allocates before it reads.
    """
    size = path.stat().st_size
    try:
        with path.open('rb') as file:
            stream = container.BoundedReader(file)
            spans, names, slots = [], set(), 0
            for _ in range(5):  # magic number, version, system, the object, the keys of its storages
                start = stream.tell()
                for name, slot in container.pickle_globals(stream):
                    names |= {_modern(name)} if slot is None else set()
                    slots = max(slots, slot or 0)
                spans.append((start, stream.tell()))
            bad = {name for name in names if not _allowed(name)}
            if bad:
                _refuse(path, bad)
            if slots > size:
                raise ValueError(f'memo slot {slots} in a file of {size} bytes')
            file.seek(spans[3][0])
            dry = _DryRun(io.BytesIO(file.read(spans[3][1] - spans[3][0])))
            dry.load()
    except container.PICKLE_ERRORS as error:
        raise CheckpointError(
            f'{path}: its pickle is truncated or damaged ({type(error).__name__}: {str(error)[:200]})') from error
    declared = sum(dry.storages.values())
    if declared > size - spans[4][1]:
        raise CheckpointError(f'{path}: declares {declared:,} bytes of tensors, holds {size - spans[4][1]:,}; '
                              'truncated, damaged, or made to exhaust memory')


class _Nothing:
    """What every global becomes in the dry run: accepts anything, does nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __call__(self, *args: Any) -> _Nothing:
        return _Nothing()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Accept an item."""

    def extend(self, items: Any) -> None:
        """Accept items."""


class _StorageType(_Nothing):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.item_size = _ITEM_SIZES.get(name.removesuffix('Storage'), 16)


class _DryRun(pickle.Unpickler):
    """Unpickles to nothing, adding up the storages that are declared on the way."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding='latin-1')
        self.storages: dict[Any, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Import nothing: every name is :class:`_Nothing`."""
        return _StorageType(name) if name.endswith('Storage') else _Nothing

    def persistent_load(self, pid: Any) -> Any:
        """Note the size of a storage."""
        if not (isinstance(pid, tuple) and len(pid) == 6 and pid[0] in ('storage', b'storage')):
            raise pickle.UnpicklingError(f'a persistent id {str(pid)[:80]!r}')
        _, kind, key, _, count, _ = pid
        if not isinstance(kind, _StorageType) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError(f'a storage of {str(count)[:40]} elements')
        self.storages[key] = count * kind.item_size
        return _Nothing()


def _read_safetensors(path: Path, location: Any) -> dict[str, Any]:
    import safetensors
    from safetensors.torch import load_file

    container.check_safetensors(path)
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            meta = dict(file.metadata() or {})
        device = str(location) if isinstance(location, (str, torch.device)) else 'cpu'
        tensors = load_file(path, device=device)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f'{path}: not a whole safetensors file ({error})') from error
    return {'state_dict': tensors, 'meta': meta}


def _check_tensors(path: Path, content: Any) -> None:
    """Refuse tensors that claim far more elements than were stored (stride 0): harmless here, a bomb when copied."""
    stack, seen, left = [content], set(), max(path.stat().st_size, _EXPANSION)
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type == 'meta':
                raise CheckpointError(f'{path}: holds a tensor without stored values ({value.layout}, {value.device})')
            surplus = value.numel() * value.element_size() - value.untyped_storage().nbytes()
            left -= max(surplus, 0)
            if left < 0:
                raise CheckpointError(f'{path}: holds a tensor of shape {tuple(value.shape)} with only '
                                      f'{value.untyped_storage().nbytes():,} bytes stored; made to exhaust memory?')
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values() if isinstance(value, dict) else value)
