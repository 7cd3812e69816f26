"""Kernels started by hand get what Triton's JIT would have given them; on a driver that only notes what it is told."""

from __future__ import annotations

import os
import subprocess
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip('triton')
if os.environ.get('TRITON_INTERPRET', '0') not in {'', '0'}:
    pytest.skip("Triton's interpreter launches nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from mila_mm.ops import common  # noqa: E402
from mila_mm.ops.rows import kernels  # noqa: E402
from mila_mm.ops.triton import capability, kept  # noqa: E402


class Notes:
    """A driver of one GPU that is not there: binaries are compiled for it, and launches are noted."""

    def __init__(self) -> None:
        self.launches: list[tuple[object, ...]] = []
        self.loaded = 0
        self.utils = SimpleNamespace(
            load_binary=self.load, get_device_properties=lambda device: {'max_shared_mem': 232448}
        )

    def load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[object, ...]:
        self.loaded += 1
        return object(), f'{name} {self.loaded}', 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(*args: object) -> None:
            grid, stream, function, packed = args[:3], args[3], args[4], args[5]
            values = [x.data_ptr() if isinstance(x, Tensor) else x for x in args[9:]]
            self.launches.append((grid, stream, function, packed, values))

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 17

    def get_current_target(self) -> GPUTarget:
        return GPUTarget('cuda', 90, 32)


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Notes]:
    notes = Notes()
    monkeypatch.setattr(driver, '_active', notes)
    kernels.column_parts_kernel.device_caches.clear()
    kept.clear()
    yield notes
    kernels.column_parts_kernel.device_caches.clear()
    kept.clear()


def arguments(x: Tensor, **constants: object) -> tuple[tuple[object, ...], dict[str, object]]:
    """Of a sum over the rows of x."""
    parts = torch.empty(3, x.shape[1])
    rest = {'BLOCK': 4, 'CHANNELS': 32, 'num_warps': 1, **constants}
    return (x, parts, x.stride(0), x.shape[1], x.shape[0], 4), rest


def start(notes: Notes, x: Tensor, grid: tuple[int, ...] = (2, 3), **constants: object) -> int:
    """Start a kernel by hand and by the JIT, hold both to the same launch, and count the binaries loaded so far."""
    args, rest = arguments(x, **constants)
    kept.start(kernels.column_parts_kernel, grid, *args, **rest)
    kept.start(kernels.column_parts_kernel, grid, *args, **rest)
    kernels.column_parts_kernel[grid](*args, **rest)
    assert notes.launches[-1] == notes.launches[-2] == notes.launches[-3]
    assert notes.launches[-1][0] == (*grid, 1, 1)[:3] and notes.launches[-1][1] == 17
    return notes.loaded


def test_is_what_the_jit_starts(notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(10, 64)
    assert start(notes, x) == 1
    assert start(notes, x, (4,)) == 1
    assert start(notes, x.half()) == 2
    assert start(notes, x, num_warps=2) == 3
    assert start(notes, x, CHANNELS=64) == 4
    assert start(notes, x.repeat(1, 2)[:, :40]) == 5  # 40 channels are no multiple of 16
    assert start(notes, torch.zeros(11, 64)) == 5  # rows are not specialised on

    def fail(*args: object, **options: object) -> None:
        raise AssertionError('the JIT was asked')

    args, rest = arguments(x)
    monkeypatch.setattr(type(kernels.column_parts_kernel), 'run', fail)
    count = len(notes.launches)
    kept.start(kernels.column_parts_kernel, (2, 3), *args, **rest)
    assert len(notes.launches) == count + 1


def test_unusual_arguments_go_through_the_jit(notes: Notes) -> None:
    aligned, moved = torch.zeros(10, 64), torch.zeros(641)[1:].view(10, 64)
    assert start(notes, aligned) == 1
    assert start(notes, moved) == 2  # an address that is no multiple of 16 has a binary of its own
    args, rest = arguments(aligned)
    far = (*args[:5], 2**31)
    kept.start(kernels.column_parts_kernel, (2, 3), *far, **rest)
    kernels.column_parts_kernel[(2, 3)](*far, **rest)
    assert notes.launches[-1] == notes.launches[-2] and notes.loaded == 3


def test_whoever_watches_launches_sees_them(notes: Notes) -> None:
    seen: list[Any] = []
    args, rest = arguments(torch.zeros(10, 64))
    kept.start(kernels.column_parts_kernel, (2, 3), *args, **rest)
    hooks = triton.knobs.runtime.launch_enter_hook
    calls: list[tuple[object, ...]] = []
    jit = type(kernels.column_parts_kernel).run

    def watch(self: Any, *a: object, **k: object) -> Any:
        calls.append(a)
        return jit(self, *a, **k)

    hooks.add(seen.append)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(kernels.column_parts_kernel), 'run', watch)
            kept.start(kernels.column_parts_kernel, (2, 3), *args, **rest)
    finally:
        hooks.remove(seen.append)
    assert calls


@pytest.mark.parametrize(
    'error',
    [
        triton.runtime.errors.OutOfResources(200000, 101376, 'shared memory'),
        triton.runtime.errors.PTXASError('ptxas fatal: sm_121a is not defined'),
        RuntimeError('PassManager::run failed'),
        RuntimeError('Triton Error [CUDA]: device kernel image is invalid'),
        PermissionError(13, 'Permission denied', '/root/.triton/cache'),
        subprocess.CalledProcessError(1, ['gcc', 'main.c']),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_kernel_that_cannot_be_made_hands_over_to_plain_operators(
    error: Exception, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(type(kernels.column_parts_kernel), 'run', fail)
    monkeypatch.setattr(capability, '_given_up', {})
    args, rest = arguments(torch.zeros(10, 64))
    calls = []

    def op(x: torch.Tensor, scale: float) -> torch.Tensor:
        """As the ops are: by a kernel where nothing speaks against it."""
        calls.append(capability._why_given_up(x.device))
        if calls[-1] is None:
            kept.start(kernels.column_parts_kernel, (2, 3), *args, **rest)
        return x * scale

    guarded = common._or_plainly(op)
    with pytest.raises(RuntimeError, match=rf'column_parts_kernel cannot run here \({type(error).__name__}') as raised:
        guarded(torch.ones(2), 3.0)  # as the environment of the tests says
    assert not isinstance(raised.value, capability.KernelFailed), 'nobody takes it for one to get over'
    monkeypatch.delenv('MILA_MM_KERNEL_ERRORS')
    with pytest.warns(UserWarning, match=rf'column_parts_kernel cannot run here \({type(error).__name__}: .*plain'):
        assert guarded(torch.ones(2), 3.0).tolist() == [3.0, 3.0]
    assert calls[:2] == [None, None] and type(error).__name__ in calls[2]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert guarded(torch.ones(2), 3.0).tolist() == [3.0, 3.0], 'said once, and not tried again'
    assert len(calls) == 4


@pytest.mark.parametrize(
    'error',
    [
        RuntimeError('0 active drivers ([]). There should only be one.'),
        AssertionError('libcuda.so cannot found!\nPlease make sure GPU is set up'),
        FileNotFoundError(2, 'No such file or directory', '/sbin/ldconfig'),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_driver_that_triton_does_not_get_to_is_such_a_failure(
    error: Exception, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> int:
        raise error

    monkeypatch.setattr(notes, 'get_current_device', fail)
    args, rest = arguments(torch.zeros(10, 64))
    with pytest.raises(capability.KernelFailed, match="does not get to this GPU's driver") as caught:
        kept.start(kernels.column_parts_kernel, (2, 3), *args, **rest)
    assert caught.value.__cause__ is error
    monkeypatch.setattr(capability, '_given_up', {})
    monkeypatch.delenv('MILA_MM_KERNEL_ERRORS')
    with pytest.warns(UserWarning, match=type(error).__name__):
        capability.give_up(torch.device('cuda', 0), caught.value)
    assert '\n' not in capability._given_up[torch.device('cuda', 0)]


@pytest.mark.parametrize('words', ['out of memory', 'an illegal memory access was encountered'])
def test_what_is_no_fault_of_a_kernel_stays_what_it_is(
    words: str, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError(f'Triton Error [CUDA]: {words}')

    monkeypatch.setattr(type(kernels.column_parts_kernel), 'run', fail)
    args, rest = arguments(torch.zeros(10, 64))
    with pytest.raises(RuntimeError, match=words) as caught:
        kept.start(kernels.column_parts_kernel, (2, 3), *args, **rest)
    assert not isinstance(caught.value, capability.KernelFailed)
