"""Tensors as kernels take them: on their device, with strides and alignment that a kernel can read in place."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mila_mm.ops.triton import configs

_HERE = nullcontext()


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the one that holds ``x``."""
    # Changing the device to what it is costs as much as a launch.
    return torch.cuda.device(x.device) if x.is_cuda and x.device.index != torch.cuda.current_device() else _HERE


def fp32_like(x: Tensor, *shape: int) -> Tensor:
    """Uninitialised fp32 memory beside ``x``: every kernel writes all of its result."""
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def aligned(channels: int) -> bool:
    """Whether tokens begin at multiples of 16 elements, as wide loads need it: a matter of the model, not of a call."""
    return channels % 16 == 0


def readable(x: Tensor, width: int) -> Tensor:
    """``x`` (B, N, C) of a map ``width`` tokens wide as it is where the kernels can read it in place, else a copy.

    They need adjacent channels (an expanded gradient has none), offsets in a tile of less than 2**31 elements, and,
    where C allows, tokens and images at multiples of 16 elements. So inputs of one shape are loaded in one way, and
    their sums taken in one order, however they lie in memory.
    """
    if x.numel() == 0:
        return x
    batch_stride, token_stride, channel_stride = x.stride()
    images = x.shape[0] == 1 or batch_stride % 16 == 0
    placed = images and token_stride % 16 == 0 and x.data_ptr() % 16 == 0
    if channel_stride == 1 and configs.offsets_fit(width, token_stride) and (placed or not aligned(x.shape[2])):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def as_rows(x: Tensor) -> Tensor:
    """``x`` (..., C) as (M, C) with adjacent channels, a copy only where its rows are not one distance apart.

    As in :func:`readable`, tensors of one shape are loaded in one way, however they lie in memory.
    """
    rows = x.reshape(-1, x.shape[-1])
    row_stride, channel_stride = rows.stride()
    placed = row_stride % 16 == 0 and rows.data_ptr() % 16 == 0
    if channel_stride == 1 and (placed or not aligned(rows.shape[1])) and row_stride >= rows.shape[1]:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def vector_or(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """A (C,) parameter as the kernels read it, dense; an argument that no kernel reads still needs an address."""
    return stand_in if x is None else x.contiguous()


def depthwise_taps(lepe_weight: Tensor | None, like: Tensor, width: int) -> Tensor:
    """The (C, 1, 3, 3) weight as (C / width, 9, width) fp32, zero behind C.

    One tap of adjacent channels is then a wide load, and nine of them lie at constant distances.
    """
    if lepe_weight is None:
        return like
    channels = lepe_weight.shape[0]
    blocks = -(-channels // width)
    weight = lepe_weight.reshape(channels, 9)
    if blocks * width != channels:
        weight = torch.nn.functional.pad(weight, (0, 0, 0, blocks * width - channels))
    taps = weight.view(blocks, width, 9).transpose(1, 2)
    return taps.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
