"""Reading a checkpoint without running any of it.

``torch.load(weights_only=True)`` does the reading. Around it: the file's declared sizes are checked
before anything is allocated, the globals that its pickle names are compared with a list that is
shorter than torch's own, and the harmless classes of training scripts get inert stand-ins for the
time of the call. Nothing here ever sets ``weights_only=False``.
"""

from __future__ import annotations

import mmap as memory_map
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mila_mm.errors import printable
from mila_mm.weights.errors import CheckpointError, UnsafeCheckpointError
from mila_mm.weights.file import container
from mila_mm.weights.file.scan import Scan
from mila_mm.weights.file.standins import REGISTRATIONS, STAND_INS, plain

# What torch's own list would let pass and no checkpoint of weights needs (subclasses, constructors
# that allocate by a number in the file, sparse and quantised tensors) is left out.
_TORCH_NAMES = frozenset(
    {
        'collections.OrderedDict',
        'collections.Counter',
        'torch.Size',
        'torch.device',
        'torch.nn.parameter.Parameter',
        'torch._utils._rebuild_tensor',
        'torch._utils._rebuild_tensor_v2',
        'torch._utils._rebuild_tensor_v3',
        'torch._utils._rebuild_parameter',
        'torch._utils._rebuild_parameter_with_state',
        'torch.storage.UntypedStorage',
        'torch.storage.TypedStorage',
        '_codecs.encode',
        '__builtin__.set',
        'builtins.set',
        'builtins.complex',
    }
)
_DTYPES = frozenset(
    f'torch.{name}'
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and not name.startswith(('q', 'bits'))
)
_STORAGE = re.compile(r'torch(\.cuda)?\.[A-Z][A-Za-z0-9]*Storage')
# pickles of protocol 2 spell Python 3's builtins so
_OLD_MODULES = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}
_SHOWN = 5
# Tensors may share memory: bytes that they may claim in any file, and for each byte of it
_EXPANSION, _SHARING = 16 << 20, 8
_lock = threading.RLock()


@contextmanager
def only_our_globals() -> Iterator[None]:
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
        with only_our_globals(), warnings.catch_warnings():
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
    lines = [
        line
        for line in text.split('\n\nCheck the documentation')[0].splitlines()
        if line.strip() and 'weights_only' not in line
    ]
    words = lines[-1].strip() if lines else ''
    return f'truncated, damaged, or no weights: {type(error).__name__}{": " if words else ""}{words[:200]}'


def _allowed(name: str) -> bool:
    return name in _TORCH_NAMES or name in STAND_INS or name in _DTYPES or _STORAGE.fullmatch(name) is not None


def _modern(name: str) -> str:
    module, dot, attribute = name.rpartition('.')
    return _OLD_MODULES.get(module, module) + dot + attribute


def _refuse(path: Path, names: set[str]) -> None:
    listed = ', '.join(printable(name) for name in sorted(names)[:_SHOWN])
    more = f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
    raise UnsafeCheckpointError(
        f'{path}: names {listed}{more}, which no file of weights needs\n'
        'Unpickling such names can run any code: nothing of the file was run or read.'
    )


def _screen_zip(path: Path) -> None:
    """Refuse a file by what its pickle would do, before torch opens it."""
    record = container.check_zip(path)
    try:
        with zipfile.ZipFile(path) as archive:
            data = archive.read(record)
    except (*container.DAMAGED_ZIP, OSError) as error:
        raise CheckpointError(f'{path}: truncated or damaged ({error})') from error
    _screen(path, [Scan(data)])


def _screen_legacy(path: Path) -> None:
    """Do for torch's format before 1.6 what the directory of a zip does: bound all that it declares.

    There the pickle alone says how large each storage is, and torch allocates before it reads.
    """
    with path.open('rb') as file, memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_READ) as data:
        # magic number, version, system, the object, the keys of its storages
        scans = _screen(path, [Scan(data) for _ in range(5)])
        declared, held = sum(scans[3].storages.values()), len(data) - scans[4].position
    if declared > held:
        raise CheckpointError(
            f'{path}: declares {declared:,} bytes of tensors, holds {held:,}; '
            'truncated, damaged, or made to exhaust memory'
        )


def _screen(path: Path, scans: list[Scan]) -> list[Scan]:
    """Walk pickles that follow one another; all names that are not allowed are named at once."""
    names: set[str] = set()
    problem: BaseException | None = None
    start = 0
    for scan in scans:
        scan.start = scan.position = start
        try:
            start = scan.run().position
        except container.PICKLE_ERRORS as error:
            problem = error
        names |= scan.names
        if problem is not None:
            break
    bad = {name for name in map(_modern, names) if not _allowed(name)}
    if bad:
        _refuse(path, bad)
    if problem is not None:
        raise CheckpointError(
            f'{path}: its pickle is truncated, damaged, or not of weights '
            f'({type(problem).__name__}: {printable(str(problem))})'
        ) from problem
    return scans


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
    """Refuse tensors that claim far more than is stored (stride 0, many views of one): bombs when they are copied."""
    stack, seen, size = [content], set(), path.stat().st_size
    left = _EXPANSION + _SHARING * size
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type == 'meta':
                raise CheckpointError(f'{path}: holds a tensor without stored values ({value.layout}, {value.device})')
            left -= value.numel() * value.element_size()
            if left < 0:
                raise CheckpointError(
                    f'{path}: its tensors, one of shape {tuple(value.shape)}, claim more than '
                    f'{_SHARING} x the {size:,} bytes of the file; made to exhaust memory?'
                )
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(value.values() if isinstance(value, dict) else value)
