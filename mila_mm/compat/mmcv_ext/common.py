"""What the stand-in ops share: the calling convention of compiled code, dtypes, handing results over."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torchvision  # noqa: F401 - registers its kernels with torch.ops
from torch import Tensor

kernels = torch.ops.torchvision

P = ParamSpec('P')
R = TypeVar('R')


def as_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` as compiled code runs: no graph is recorded and autocast does not reach inside.

    Args:
        function: An op whose first tensor argument tells the device.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        with torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return call


def widen(tensor: Tensor, *, half_on_cuda: bool = False) -> Tensor:
    """Return ``tensor`` in a dtype to compute in: float64 stays, all else becomes float32.

    Args:
        tensor: Any floating dtype.
        half_on_cuda: Leave float16 on CUDA as it is, for kernels that exist for it.

    Returns:
        The tensor itself where its dtype will do, a float32 copy otherwise.
    """
    if tensor.dtype in (torch.float32, torch.float64):
        return tensor
    if half_on_cuda and tensor.is_cuda and tensor.dtype == torch.float16:
        return tensor
    return tensor.float()


def hand_over(buffer: Tensor, result: Tensor) -> None:
    """Make ``result`` the content of the caller's output ``buffer``, without a copy where that is possible.

    Args:
        buffer: Preallocated output of the shape of ``result``; its old content is dropped.
        result: What was computed, in any floating dtype.

    Raises:
        ValueError: If the shapes differ.
    """
    if buffer.shape != result.shape:
        raise ValueError(f'expected an output buffer of shape {tuple(result.shape)}, got {tuple(buffer.shape)}')
    # A buffer that shares its memory with another tensor must be written through. Inference mode does not record views.
    shared = buffer._is_view() or buffer.is_inference() or torch.compiler.is_compiling()
    if not shared and buffer.dtype == result.dtype and buffer.is_contiguous() and result.is_contiguous():
        buffer.set_(result)
    else:
        buffer.copy_(result)
