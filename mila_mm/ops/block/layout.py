"""Where what a block of one shape computes lies in memory.

A block's own results lie in one buffer, and so do its gradients, each where something lay that nobody needs any more.
What autograd has to be given, and what outlives the block, has memory of its own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mila_mm.ops.triton import configs

_LINE = 256  # bytes; what tensors begin at multiples of


class Shape(NamedTuple):
    """All that a plan depends on.

    Attributes:
        batch: Images.
        height: Of the map.
        width: Of the map.
        channels: Of the tokens, C.
        hidden: Units of the MLP.
        heads: Of the attention.
        eps1: Of the first norm.
        eps2: Of the second.
        eps: Of the attention's normaliser.
        rope_base: Of its rotations.
        dtype: That products and convolutions are computed in.
        residual: That of x and of what is added to it.
        master: That of the parameters and their gradients.
        scaled: Whether stochastic depth multiplies each branch.
        keep: Whether there will be a backward.
        dots: How the attention takes its matrix products, see :func:`mila_mm.ops.triton.configs.arithmetic`.
        device: Where all of it is.
    """

    batch: int
    height: int
    width: int
    channels: int
    hidden: int
    heads: int
    eps1: float
    eps2: float
    eps: float
    rope_base: float
    dtype: torch.dtype
    residual: torch.dtype
    master: torch.dtype
    scaled: tuple[bool, bool]
    keep: bool
    dots: str | None
    device: torch.device

    @property
    def tokens(self) -> int:
        """Of an image."""
        return self.height * self.width


class Layout:
    """Tensors in one buffer: for each the bytes before it, its shape and dtype."""

    def __init__(self) -> None:
        self.slots: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        self.offsets: list[int] = []
        self.size = 0  # bytes

    def add(self, dtype: torch.dtype, *shape: int, at: int | None = None) -> int:
        """Make room for a tensor, or take that at ``at``; returns the bytes before it."""
        offset = self.size if at is None else at
        self.slots.append((offset, shape, dtype))
        self.offsets.append(offset)
        self.size = max(self.size, -(-(offset + math.prod(shape) * dtype.itemsize) // _LINE) * _LINE)
        return offset

    def strided(self, index: int, *shape: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Sizes, strides and offset of a tensor in a buffer of its dtype, as it was added or in another shape."""
        offset, own, dtype = self.slots[index]
        sizes = shape or own
        strides = [1] * len(sizes)
        for axis in range(len(sizes) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * sizes[axis + 1]
        return sizes, tuple(strides), offset // dtype.itemsize

    def view(self, buffer: Tensor, index: int, *shape: int) -> Tensor:
        """A tensor of the buffer, as it was added or in another shape."""
        dtype = self.slots[index][2]
        typed = buffer if buffer.dtype == dtype else buffer.view(dtype)
        return typed.as_strided(*self.strided(index, *shape))


class Results(NamedTuple):
    """What lies in the buffer of the forward, by the names of :mod:`mila_mm.nn.block_node`."""

    x1: Any
    y1: Any
    mean1: Any
    rstd1: Any
    u: Any
    a: Any
    x3: Any
    y2: Any
    mean2: Any
    rstd2: Any
    state: Any
    key_mean: Any
    state_parts: Any
    mean_parts: Any


class Scratch(NamedTuple):
    """What lies in that of the backward: gradients, and parts of sums in the order of :func:`parts_of`."""

    hidden: Any
    grad_hidden: Any
    grad_products: Any  # of qk, and behind it of joint
    grad_out: Any  # of the attention before its gate
    grad_u: Any
    grad_conv: Any  # of the result of cpe2, then of cpe1
    matrices: Any  # in the dtype of the products, or parts of them
    grad_state: Any
    grad_mean: Any
    state_parts: Any
    mean_parts: Any
    norm1: Any
    norm2: Any
    cpe1: Any
    dwc: Any
    cpe2: Any
    lepe: Any
    products: Any
    joint: Any
    fc1: Any


RESULT = Results(*range(len(Results._fields)))
SCRATCH = Scratch(*range(len(Scratch._fields)))


def results_of(shape: Shape) -> Layout:
    """Where :class:`Results` lie: for a backward all stay, without one they follow each other in three places."""
    layout, fp32 = Layout(), torch.float32
    tokens = shape.batch, shape.tokens
    size = *tokens, shape.channels
    d, splits = shape.channels // shape.heads, -(-shape.tokens // configs.tokens_per_split(shape.tokens))
    x1 = layout.add(shape.residual, *size)
    y1 = layout.add(shape.dtype, *size)
    mean, rstd = layout.add(fp32, *tokens), layout.add(fp32, *tokens)
    layout.add(shape.dtype, *size, at=None if shape.keep else y1)
    a = layout.add(shape.dtype, *size)
    layout.add(shape.residual, *size, at=None if shape.keep else x1)
    layout.add(shape.dtype, *size, at=None if shape.keep else y1)
    layout.add(fp32, *tokens, at=None if shape.keep else mean)
    layout.add(fp32, *tokens, at=None if shape.keep else rstd)
    state = layout.add(fp32, shape.batch, shape.heads, d, d)
    key_mean = layout.add(fp32, shape.batch, shape.heads, d)
    _add_parts(layout, shape, splits, a, state, key_mean)
    return layout


def _add_parts(layout: Layout, shape: Shape, splits: int, free: int, state: int, key_mean: int) -> None:
    """The parts of a state and a mean, in ``free`` memory of an activation if they fit; a single one is the sum."""
    d, fp32 = shape.channels // shape.heads, torch.float32
    if splits == 1:
        layout.add(fp32, shape.batch, shape.heads, d, d, at=state)
        layout.add(fp32, shape.batch, shape.heads, d, at=key_mean)
        return
    count = shape.batch * splits * shape.heads
    vector = free + -(-count * d * d * 4 // _LINE) * _LINE
    # As a rule they take half of what an activation of 16 bits does.
    fits = vector + count * d * 4 <= free + 2 * shape.batch * shape.tokens * shape.channels
    layout.add(fp32, shape.batch, splits, shape.heads, d, d, at=free if fits else None)
    layout.add(fp32, shape.batch, splits, shape.heads, d, at=vector if fits else None)


class Parts(NamedTuple):
    """How many parts there are of each kind of sum; they lie behind each other in the order of :func:`parts_of`."""

    norm: int
    stencil: int
    lepe: int
    column: int
    hidden: int


def parts_of(shape: Shape, parts: Parts) -> list[int]:
    """Numbers of the sums' parts: both norms with the bias before them, four stencils, biases of qk and joint, of fc1.

    A part of a norm is of three vectors: its weight, its bias, and the bias of out_proj for the first, of fc2 for the
    second. The stencils, of ten vectors, are cpe1, dwc, cpe2 and lepe.
    """
    c = shape.channels
    stencils = [10 * c * parts.stencil] * 3 + [10 * c * parts.lepe]
    return [3 * c * parts.norm] * 2 + stencils + [2 * c * parts.column] * 2 + [shape.hidden * parts.hidden]


def scratch_of(shape: Shape, parts: Parts, matrices: tuple[torch.dtype, int]) -> Layout:
    """Where :class:`Scratch` lies: what the attention's part writes where the MLP's hidden maps have been.

    ``matrices`` are the dtype and the number of what there is of the matrices' gradients.
    """
    layout, fp32 = Layout(), torch.float32
    rows, c, hidden = shape.batch * shape.tokens, shape.channels, shape.hidden
    d, splits = c // shape.heads, -(-shape.tokens // configs.tokens_per_split(shape.tokens))
    layout.add(shape.dtype, rows, hidden)
    layout.add(shape.dtype, rows, hidden)
    later = Layout()
    offsets = [later.add(shape.dtype, 2, rows, 2 * c), later.add(shape.dtype, rows, c), later.add(shape.dtype, rows, c)]
    offsets.append(later.add(shape.residual, rows, c))
    for offset, (_, sizes, dtype) in zip(offsets, later.slots, strict=True):
        layout.add(dtype, *sizes, at=offset)
    layout.add(*matrices)
    state = layout.add(fp32, shape.batch, shape.heads, d, d)
    mean = layout.add(fp32, shape.batch, shape.heads, d)
    _add_parts(layout, shape, splits, offsets[3], state, mean)
    begin = layout.size
    for size in parts_of(shape, parts):
        layout.add(fp32, size, at=begin)
        begin += 4 * size
    return layout
