"""What the ops share: their registration, autocast, transforms, checks of maps, tokens as images and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active

from mila_mm.ops.triton import capability
from mila_mm.ops.triton.configs import KernelFailed

BACKENDS = ('auto', 'triton', 'reference')

# define + impl costs less Python time for each call than torch.library.custom_op; at batch 1 it exceeds the GPU's time.
_library = torch.library.Library('mila_mm', 'DEF')
_plain_only = False

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
"""The functions behind ``torch.ops.mila_mm``, for who needs neither autograd nor the dispatcher around them."""


def register(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    differentiate: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    once: str | None = None,
) -> None:
    """Register ``torch.ops.mila_mm.NAME`` for CPU and CUDA tensors.

    Args:
        name: Of the op.
        schema: Arguments and results as torch.library writes them, without the name.
        function: The op on real tensors; its results are contiguous.
        fake: Shapes, dtypes and strides of the results for fake tensors.
        differentiate: The backward, called with ctx and the gradients of the results.
        setup_context: Keeps what the backward needs.
        once: For an op that is a backward itself: what to say where somebody differentiates it again.
    """
    function = _or_plainly(function)
    IMPLEMENTATIONS[name] = function
    _library.define(f'{name}{schema}')
    for key in ('CPU', 'CUDA'):
        _library.impl(name, function, key)
    torch.library.register_fake(f'mila_mm::{name}', fake, lib=_library)
    if once is not None:

        def refuse(ctx: Any, *_: Any) -> NoReturn:
            raise RuntimeError(once)

        differentiate = refuse
    if differentiate is not None:
        torch.library.register_autograd(f'mila_mm::{name}', differentiate, setup_context=setup_context, lib=_library)


def _or_plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of an op; where a kernel of it turns out not to work here, again, by PyTorch's own operators.

    An op writes to none of its arguments, or only in the last of its kernels, so that nothing of the first attempt is
    left.
    """

    @wraps(function)
    def call(*args: Any) -> Any:
        try:
            return function(*args)
        except KernelFailed as failure:
            capability.give_up(next(arg.device for arg in args if isinstance(arg, Tensor)), failure)
            return function(*args)

    return call


def as_written(v: Tensor) -> AbstractContextManager:
    """Keep autocast out of a kernel: inside of an op it would still turn the products of the fp32 island to 16 bits."""
    device = v.device.type
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def transformed() -> bool:
    """Whether ``torch.func`` transforms the call: its forward mode takes what has no rule for it for a constant."""
    return not torch.compiler.is_compiling() and _are_functorch_transforms_active()


def plain_operators(x: Tensor, backend: str) -> bool:
    """Whether plain operators must do: asked for, in a trace and torch.func, which need them, and without a kernel."""
    return (
        backend == 'reference'
        or torch.jit.is_tracing()
        or needs_plain_operators()
        or transformed()
        or x.device.type not in ('cpu', 'cuda', 'meta')
    )


@contextmanager
def only_plain_operators() -> Iterator[None]:
    """Let the public functions compute with PyTorch's own operators, for graphs that must run without this package."""
    global _plain_only  # noqa: PLW0603  the public functions have no other way to know
    before, _plain_only = _plain_only, True
    try:
        yield
    finally:
        _plain_only = before


def needs_plain_operators() -> bool:
    """Whether the call is recorded for a runtime that does not know this package's ops: ONNX, or as asked for."""
    return _plain_only or torch.onnx.is_in_onnx_export()


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype that autocast uses on a type of device, None where it is off or does not exist (meta)."""
    if device == 'meta' or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that sums over x are taken in: fp64 for fp64, fp32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_image(x: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, H * W, C) as an image (B, C, H, W) in channels_last, without a copy."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """An image (B, C, H, W) as contiguous tokens (B, H * W, C); no copy where it is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def check_map(name: str, tensor: str, tokens: int, spatial_shape: tuple[int, int]) -> None:
    """Raise ValueError unless ``spatial_shape`` is (H, W) of a map of the tokens that a tensor has."""
    if not isinstance(spatial_shape, (tuple, list)) or len(spatial_shape) != 2:
        raise ValueError(f'{name}: expected spatial_shape to be (H, W), got {spatial_shape!r}')
    height, width = spatial_shape
    # Under torch.jit.trace sizes are tensors.
    if not all(isinstance(side, (int, torch.SymInt, Tensor)) for side in (height, width)):
        raise ValueError(f'{name}: expected spatial_shape to be two integers, got {spatial_shape!r}')
    if height < 0 or width < 0 or tokens != height * width:
        raise ValueError(
            f'{name}: expected {tensor} of N = H * W tokens for spatial_shape {(height, width)}, got {tokens}'
        )
