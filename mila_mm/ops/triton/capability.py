"""Whether Triton kernels can run on these tensors here, and if not, why; imports no Triton by itself."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mila_mm.ops.triton.configs import (
    DTYPES,
    HEAD_WIDTHS,
    MAX_GRID,
    MAX_ROW,
    MAX_SIDE,
    MAX_STENCIL_CHANNELS,
    KernelFailed,
    interpreted,
    offsets_fit,
)

MINIMUM_TRITON = (3, 5)
"""The first whose loops can keep invariant code inside, which saves registers in the query kernel."""
MINIMUM_CAPABILITY = (8, 0)
"""Ampere: the first with bf16 and TF32 matrix units."""
_given_up: dict[torch.device, str] = {}


def _constant(function: Callable[..., str | None]) -> Callable[..., str | None]:
    """Ask once in a process; Dynamo, which could not trace the question, takes the answer for a constant."""
    cached = functools.cache(function)

    @torch.compiler.assume_constant_result
    @functools.wraps(function)
    def ask(*args: torch.device) -> str | None:
        return cached(*args)

    ask.cache_clear = cached.cache_clear
    return ask


@_constant
def _why_no_triton() -> str | None:
    if importlib.util.find_spec('triton') is None:
        return 'expected the package triton, got none installed'
    try:
        import triton
    except (ImportError, OSError) as error:  # a library of it that this system cannot load
        return f'expected a triton that can be imported, got {_first_line(error)}'
    version = tuple(int(part) for part in triton.__version__.split('.')[:2])
    if version < MINIMUM_TRITON:
        return f'expected triton >= {".".join(map(str, MINIMUM_TRITON))}, got {triton.__version__}'
    try:
        importlib.import_module('mila_mm.ops.triton.kept')
    except (ImportError, AttributeError) as error:  # a newer one that has moved what is used of it
        return f'expected a triton that this package knows, got {triton.__version__} ({_first_line(error)})'
    return None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0] if lines else "no message"}'


@_constant
def _why_no_compiler() -> str | None:
    """Triton builds its launcher at the first launch, with the compiler that its ``runtime/build.py`` looks for."""
    import triton

    knobs = getattr(triton, 'knobs', None)
    if interpreted() or sys.platform != 'linux' or (knobs is not None and knobs.build.impl is not None):
        return None
    named = os.environ.get('CC')
    if not any(shutil.which(name) for name in (('gcc', 'clang') if named is None else (named,))):
        return f'expected a C compiler for Triton ({named or "gcc or clang"}), got none installed'
    header = Path(sysconfig.get_paths(scheme='posix_prefix')['include']) / 'Python.h'
    if not header.is_file() and not any(os.environ.get(name) for name in ('CPATH', 'C_INCLUDE_PATH')):
        return f"expected Python's headers for Triton, got no {header}"
    return None


@_constant
def _why_not_device(device: torch.device) -> str | None:
    if interpreted():
        return None
    if device.type != 'cuda':
        return f'expected CUDA tensors, got {device.type}'
    if torch.version.hip is not None:
        return f'expected an NVIDIA GPU, got ROCm {torch.version.hip}'
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f'expected compute capability >= 8.0, got {capability[0]}.{capability[1]}'
    return None


@torch.compiler.assume_constant_result
def _why_given_up(device: torch.device) -> str | None:
    return _given_up.get(device)


def has_given_up(device: torch.device) -> bool:
    """Whether kernels have turned out not to work on a device."""
    return device in _given_up


def failures_are_raised() -> bool:
    """Whether the environment has ``MILA_MM_KERNEL_ERRORS=raise``: a test or a benchmark of kernels or CUDA graphs must
    not pass without them."""
    return os.environ.get('MILA_MM_KERNEL_ERRORS') == 'raise'


def give_up(device: torch.device, failure: KernelFailed) -> None:
    """Leave the kernels alone on a device from now on, and say so; what has been computed by them stays right.

    Raises:
        RuntimeError: Where failures are to be raised (:func:`failures_are_raised`). It is no :class:`KernelFailed`,
            which would be handled once more.
    """
    cause = _first_line(failure.__cause__ or failure)
    if failures_are_raised():
        raise RuntimeError(f'{failure} ({cause})') from failure
    _given_up[device] = f'expected kernels that work on this GPU, got {failure} ({cause})'
    warnings.warn(
        f'mila_mm.ops: {failure} ({cause}); the slower form in plain PyTorch runs on {device} from now on. '
        'MILA_MM_KERNEL_ERRORS=raise shows where',
        stacklevel=2,
    )


def _why_not_here(device: torch.device) -> str | None:
    """What concerns the machine, whatever the tensors."""
    return _why_no_triton() or _why_not_device(device) or _why_no_compiler() or _why_given_up(device)


@functools.cache
def warn_of_what_is_missing(device: torch.device) -> None:
    """Warn, once, where only the installation keeps a GPU that could run the kernels from doing so."""
    if _why_not_device(device) is None and (reason := _why_no_triton() or _why_no_compiler()) is not None:
        warnings.warn(f'mila_mm.ops: {reason}; the slower form in plain PyTorch runs on this GPU instead', stacklevel=2)


def _why_not_size(batch: int, spatial_shape: tuple[int, int] | None, channels: int) -> str | None:
    """What is expected of sizes. What was got is not said: in a program compiled for any size it has no number."""
    height, width = spatial_shape or (1, 1)
    if batch > MAX_GRID or height > MAX_SIDE or width > MAX_SIDE:
        return f'expected at most {MAX_GRID} images and {MAX_SIDE} tokens on a side, got more'
    if height * width >= 2**31 or not offsets_fit(width, channels):
        return 'expected fewer than 2**31 tokens, and as many numbers in ten rows of them, got more'
    return None


def why_not(qk: Tensor, v: Tensor, num_heads: int, spatial_shape: tuple[int, int] | None = None) -> str | None:
    """Say why the kernels cannot take these tensors.

    Args:
        qk: (B, N, 2C). v: (B, N, C). num_heads: Heads; C is a multiple of it.
        spatial_shape: (H, W) with N = H * W, or None for no question about the map.

    Returns:
        None where they can, else one line, 'expected ..., got ...'.
    """
    if (reason := _why_not_here(v.device)) is not None:
        return reason
    if qk.device != v.device:
        return f'expected qk and v on one device, got {qk.device} and {v.device}'
    if v.dtype not in DTYPES or qk.dtype != v.dtype:
        return f'expected qk and v both float32, float16 or bfloat16, got {qk.dtype} and {v.dtype}'
    head_width = v.shape[-1] // num_heads
    if head_width not in HEAD_WIDTHS:
        return f'expected heads of {", ".join(map(str, HEAD_WIDTHS))} channels, got {head_width}'
    return _why_not_size(v.shape[0], spatial_shape, qk.shape[2])


def why_not_stencil(
    x: Tensor, spatial_shape: tuple[int, int] | None = None, widest: int = MAX_STENCIL_CHANNELS
) -> str | None:
    """Say why the kernels of :mod:`mila_mm.ops.stencil.kernels` cannot take tokens x (B, N, C); None where they can.

    ``spatial_shape`` is (H, W) with N = H * W, or None for no question about the map; ``widest`` is how many channels
    they take.
    """
    if (reason := _why_not_here(x.device)) is not None:
        return reason
    if x.dtype not in DTYPES:
        return f'expected float32, float16 or bfloat16, got {x.dtype}'
    if x.shape[-1] > widest:
        return f'expected at most {widest} channels, got {x.shape[-1]}'
    return _why_not_size(x.shape[0], spatial_shape, x.shape[2])


def why_not_block(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    batch: int,
    spatial_shape: tuple[int, int],
    channels: int,
    hidden: int,
    num_heads: int,
) -> str | None:
    """Say why the kernels cannot serve a whole block: of an MLP of ``hidden`` units, as above otherwise."""
    if (reason := _why_not_here(device)) is not None:
        return reason
    if any(dtype not in DTYPES for dtype in dtypes):
        return f'expected float32, float16 or bfloat16, got {dtypes}'
    if channels > MAX_STENCIL_CHANNELS or hidden > MAX_ROW:
        return f'expected at most {MAX_STENCIL_CHANNELS} channels, got {channels}'
    if channels // num_heads not in HEAD_WIDTHS:
        return f'expected heads of {", ".join(map(str, HEAD_WIDTHS))} channels, got {channels // num_heads}'
    return _why_not_size(batch, spatial_shape, 2 * channels)


def why_not_rows(x: Tensor) -> str | None:
    """Say why the kernels that walk rows of x (..., C), whatever map they form, cannot take it; None where they can."""
    if (reason := _why_not_here(x.device)) is not None:
        return reason
    if x.dtype not in DTYPES:
        return f'expected float32, float16 or bfloat16, got {x.dtype}'
    if x.shape[-1] > MAX_ROW or x.numel() >= 2**31 * 16:
        return f'expected rows of at most {MAX_ROW} channels, and fewer than 2**35 numbers, got more'
    return None
