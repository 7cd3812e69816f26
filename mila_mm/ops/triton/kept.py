"""Launching kernels by hand: what Triton compiled for a kind of arguments is kept, and started without Triton's JIT.

At every call the JIT binds and specialises the arguments, looks its binary up, compares globals and calls hooks, in
Python; beside a kernel of ten microseconds that is what a small image waits for. Our launchers make arguments uniform
(see :mod:`mila_mm.ops.triton.tensors`), so what the JIT would specialise on is known without it.
"""

from __future__ import annotations

from subprocess import SubprocessError
from types import ModuleType
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.errors import TritonError
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mila_mm.ops.triton.configs import KernelFailed

CHECKED_TRITON = ((3, 5), (3, 6), (3, 7), (3, 8))
"""Versions in which a compiled kernel is known to be started as :func:`start` does; with others the JIT starts it."""
_NOT_OF_THE_BINARY = (
    *('out of memory', 'illegal memory access', 'misaligned address', 'unspecified launch failure'),
    *('captur', 'illegal instruction', 'device-side assert', 'ECC error'),
)
# CUDA's library that is not found is an assertion of Triton's.
_FAILURES = (TritonError, OSError, ImportError, SubprocessError, RuntimeError, AssertionError)
_KNOWN = tuple(int(part) for part in triton.__version__.split('.')[:2]) in CHECKED_TRITON
_INT32_MAX = 2**31 - 1
# Kernel -> what is specialised on -> compiled kernel, its function and its packed metadata, and constants in the order
# of the kernel's signature, which its C launcher skips over.
_Kept = tuple[Any, Any, Any, tuple[object, ...]]
_kept: dict[int, dict[tuple[object, ...], _Kept]] = {}
_sizes: dict[int, frozenset[int]] = {}
_age = object()  # changes when what has been kept may no longer be used


def clear() -> None:
    """Forget all kept kernels, as after a reset of the device."""
    global _age  # noqa: PLW0603  launches that have been bound ask for it
    _kept.clear()
    _sizes.clear()
    _age = object()


def age() -> object:
    """Is another one after :func:`clear`: what has been bound before is then no more."""
    return _age


def _hooked(chain: Any) -> bool:
    """Whether somebody watches launches (a profiler of Triton's)."""
    return chain is not None and bool(getattr(chain, 'calls', True))


def _specialised_on(kernel: JITFunction, args: tuple[object, ...]) -> tuple[tuple[object, ...], list[object]] | None:
    """What of the arguments a binary depends on, and the arguments with addresses for tensors; None where unusual.

    A binary depends on the dtypes, on whether an integer is 1 or a multiple of 16 (unless the kernel declines), on
    integers that need 64 bits, and on whether addresses are multiples of 16. The last two are unusual here.
    """
    sizes = _sizes[id(kernel)]
    key: list[object] = []
    values: list[object] = []
    addresses = 0
    for index, arg in enumerate(args):
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            addresses |= address
            values.append(address)
            key.append(arg.dtype)
        elif type(arg) is int:
            if not -_INT32_MAX <= arg <= _INT32_MAX:
                return None
            values.append(arg)
            if index not in sizes:
                key.append(arg)
        elif type(arg) is float:
            values.append(arg)
        else:
            return None
    return None if addresses % 16 else (tuple(key), values)


def _by_jit(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, object]) -> Any:
    """Launch through Triton's JIT, which compiles what it has not compiled yet.

    Raises:
        KernelFailed: Neither compiled nor loaded: an error of the compiler, of the C compiler or the cache on disk, or
            a driver that does not take the binary. Memory that is used up, and what an earlier kernel did, are not
            this.
    """
    try:
        return kernel[grid](*args, **constants)
    except _FAILURES as error:
        if not isinstance(kernel, JITFunction) or any(words in str(error) for words in _NOT_OF_THE_BINARY):
            raise
        raise KernelFailed(f'{kernel.fn.__name__} cannot run here') from error


def _current_device() -> int:
    """The index of the current device as Triton knows it.

    Raises:
        KernelFailed: Triton finds no driver, not CUDA's library, or cannot build what it asks the driver through.
    """
    try:
        return driver.active.get_current_device()
    except _FAILURES as error:
        if any(words in str(error) for words in _NOT_OF_THE_BINARY):
            raise
        raise KernelFailed("Triton does not get to this GPU's driver") from error


def watched() -> bool:
    """Whether launches have to go through Triton's JIT, for who has hooked them."""
    return _hooked(knobs.runtime.launch_enter_hook) or _hooked(knobs.runtime.launch_exit_hook)


def current_stream() -> int:
    """The stream of the current device that launches go to."""
    active = driver.active
    return active.get_current_stream(active.get_current_device())


def start(kernel: Any, grid: tuple[int, ...], *args: Tensor | int | float, **constants: object) -> _Kept | None:
    """Do what ``kernel[grid](*args, **constants)`` does, on the current device and stream, in less time.

    The first launch of a kind goes through Triton's JIT, and so does every one in Triton's interpreter, with hooks on
    launches, with a Triton unknown to this module, and with arguments that are not uniform.

    Args:
        kernel: Of ``triton.jit``; all its compile-time arguments follow the others.
        grid: One to three numbers of programs.
        args: The run-time arguments in their order: tensors on the current device, integers, floats.
        constants: The compile-time arguments, and options of the launch such as num_warps.

    Returns:
        What is kept of it, if anything.
    """
    if not _KNOWN or type(kernel) is not JITFunction or watched():
        _by_jit(kernel, grid, args, constants)
        return None
    kept = _kept.get(id(kernel))
    if kept is None:
        kept = _kept[id(kernel)] = {}
        _sizes[id(kernel)] = frozenset(p.num for p in kernel.params if p.do_not_specialize)
    described = _specialised_on(kernel, args)
    if described is None:
        _by_jit(kernel, grid, args, constants)
        return None
    key, values = described
    device = _current_device()
    active = driver.active
    key = (device, *key, *constants.items())
    found = kept.get(key)
    if found is None:
        compiled = _by_jit(kernel, grid, args, constants)
        skipped = tuple(constants.get(p.name) for p in kernel.params[len(args) :])
        # The grid's numbers do not enter a binary; a kernel that was only asked for and not launched has no function.
        if getattr(compiled, 'function', None) is not None:
            kept[key] = compiled.run, compiled.function, compiled.packed_metadata, skipped
        return kept.get(key)
    run, function, metadata, skipped = found
    one, two, three = (*grid, 1, 1)[:3]
    run(one, two, three, active.get_current_stream(device), function, metadata, None, None, None, *values, *skipped)
    return found


class Launch:
    """A launch with all of it that does not change from call to call: tensors, which come first, are what is missing.

    Args:
        module: Of the kernel.
        kernel: Its name there.
        grid: One to three numbers of programs.
        numbers: The run-time arguments behind the tensors.
        constants: As for :func:`start`.
    """

    __slots__ = (
        '_age',
        '_arguments',
        '_constants',
        '_function',
        '_grid',
        '_kernel',
        '_metadata',
        '_module',
        '_rest',
        '_run',
    )

    def __init__(
        self,
        module: ModuleType,
        kernel: str,
        grid: tuple[int, ...],
        numbers: tuple[int | float, ...],
        **constants: object,
    ) -> None:
        self._module, self._kernel, self._grid = module, kernel, (*grid, 1, 1)[:3]
        self._arguments, self._constants = numbers, constants
        self._age: object = None

    def __call__(self, *tensors: Tensor) -> None:
        """Start the kernel on tensors, and keep what :meth:`at` needs."""
        kernel = getattr(self._module, self._kernel)
        found = start(kernel, self._grid, *tensors, *self._arguments, **self._constants)
        if found is not None and self._age is not _age:
            self._run, self._function, self._metadata, skipped = found
            self._rest, self._age = (*self._arguments, *skipped), _age

    @property
    def bound(self) -> bool:
        """Whether :meth:`at` can start it."""
        return self._age is _age

    def at(self, stream: int, *addresses: int) -> None:
        """Start a bound launch on a stream of the device it is bound to, on memory as aligned as it was then: by 16.

        ``addresses`` stand for tensors of the dtypes that it is bound to. Nothing is checked.
        """
        one, two, three = self._grid
        self._run(one, two, three, stream, self._function, self._metadata, None, None, None, *addresses, *self._rest)
