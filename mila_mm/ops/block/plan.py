"""What a block of one shape needs, whatever its tensors: where results lie in memory, and how kernels are launched.

A block's own results lie in one buffer, and so do its gradients, each where something lay that nobody needs any more.
What autograd has to be given, and what outlives the block, has memory of its own.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mila_mm.ops.attention.geometry import Geometry
from mila_mm.ops.block import kernels
from mila_mm.ops.block.gradients import gradient_sizes
from mila_mm.ops.feed_forward.launch import gelu_backward_launch, mlp_launch
from mila_mm.ops.rows.launch import column_parts_launch, norm_backward_launch
from mila_mm.ops.stencil import launch as stencils
from mila_mm.ops.triton import capability, configs, kept
from mila_mm.ops.triton.kept import Launch

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

    def view(self, buffer: Tensor, index: int, *shape: int) -> Tensor:
        """A tensor of the buffer, as it was added or in another shape."""
        offset, own, dtype = self.slots[index]
        typed = buffer if buffer.dtype == dtype else buffer.view(dtype)
        sizes = shape or own
        strides = [1] * len(sizes)
        for axis in range(len(sizes) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * sizes[axis + 1]
        return typed.as_strided(sizes, strides, offset // dtype.itemsize)


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
    matrices: Any
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


def scratch_of(shape: Shape, parts: Parts) -> Layout:
    """Where :class:`Scratch` lies: what the attention's part writes where the MLP's hidden maps have been."""
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
    layout.add(
        shape.dtype, sum(gradient_sizes(shape.channels, shape.hidden)[-6:]) if shape.master != shape.dtype else 0
    )
    state = layout.add(fp32, shape.batch, shape.heads, d, d)
    mean = layout.add(fp32, shape.batch, shape.heads, d)
    _add_parts(layout, shape, splits, offsets[3], state, mean)
    begin = layout.size
    for size in parts_of(shape, parts):
        layout.add(fp32, size, at=begin)
        begin += 4 * size
    return layout


class Plan:
    """The launches of a block and where it has what; see :mod:`mila_mm.ops.block.launch` for their order.

    Args:
        shape: What it is for; :func:`find` says whether it can be served.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.results = results_of(shape)
        self.rows = shape.batch * shape.tokens
        self.sizes = gradient_sizes(shape.channels, shape.hidden)
        self.vectors, c = sum(self.sizes[:-6]), shape.channels
        self.matrices = [2 * c * c, 2 * c * c, c * c, shape.hidden * c, shape.hidden * c]
        self.columns_of = [c, c, c, c, shape.hidden]
        self.attention = Geometry(
            (shape.batch, shape.tokens, shape.channels),
            shape.height,
            shape.width,
            shape.heads,
            shape.rope_base,
            shape.dtype,
            shape.device,
            shape.dots,
        )
        batch, height, width, c, tokens = shape.batch, shape.height, shape.width, shape.channels, shape.tokens
        self._map = batch, c, height, width
        self._one, self._two = (tokens * c, c), (tokens * 2 * c, 2 * c)  # strides of images and tokens
        self._forward()
        self._backward()
        self._ages: dict[bool, object] = {}

    def _forward(self) -> None:
        shape, one, two = self.shape, self._one, self._two
        self.cpe1 = stencils.cpe_norm_launch(*self._map, one, shape.eps1)
        self.cpe2 = stencils.cpe_norm_launch(*self._map, one, shape.eps2)
        self.dwc = stencils.dwc_silu_launch(*self._map, (*two, *two), shape.dtype, False)
        self.state = self.attention.state((*two, *one))
        self.reduce = self.attention.reduce()
        self.output = self.attention.output((*two, *one, *two), shape.eps)
        self.mlp = None
        if shape.dtype != torch.float32 and shape.channels in configs.MLP_WIDTHS:
            self.mlp = mlp_launch(
                shape.batch,
                shape.tokens,
                shape.channels,
                shape.hidden,
                (*one, *one),
                shape.dtype,
                True,
                shape.scaled[1],
            )
        self._first = [self.cpe1, self.cpe2, self.dwc, self.state, self.output]
        self._first += [launch for launch in (self.mlp,) if launch is not None]
        self._first += [self.reduce] if self.attention.splits > 1 else []

    def _backward(self) -> None:
        shape, one, two = self.shape, self._one, self._two
        c, norm = shape.channels, (shape.batch, shape.tokens, shape.channels, (*one, *one, *one), True, 3)
        self.norm1, norm_parts = norm_backward_launch(*norm, shape.scaled[0])
        self.norm2, _ = norm_backward_launch(*norm, shape.scaled[1])
        self.conv, stencil_parts = stencils.stencil_backward_launch(*self._map, (*one, c), True)
        self.dwc_conv, _ = stencils.stencil_backward_launch(*self._map, (*two, 2 * c), False)
        self.dwc_back = stencils.dwc_silu_launch(*self._map, (*two, *one), shape.dtype, True)
        self.gate = self.attention.gate_backward((*one, *two, *one, *two, 2 * c), shape.eps)
        self.query = self.attention.query_backward((*one, *two), shape.eps)
        self.key_value = self.attention.key_value_backward((*one, *two, *one))
        self.lepe, lepe_parts = stencils.depthwise_weight_launch(*self._map, (*one, *one), shape.dtype)
        self.columns, column_parts = column_parts_launch(self.rows, 2 * c, 2 * c, 2)
        self.gelu, hidden_parts = gelu_backward_launch(self.rows, shape.hidden)
        parts = Parts(norm_parts, stencil_parts, lepe_parts, column_parts, hidden_parts)
        self.scratch = scratch_of(shape, parts)
        block = configs.LEPE_CHANNELS if c % configs.LEPE_CHANNELS == 0 else 16
        self.sums = Launch(
            kernels, 'block_reduce_kernel', (50 * c // block + -(-shape.hidden // block),), (c, shape.hidden, *parts),
            ROWS=configs.REDUCE_ROWS, CHANNELS=block, num_warps=configs.REDUCE_WARPS,
        )  # fmt: skip
        self._last = [self.norm1, self.norm2, self.conv, self.dwc_conv, self.dwc_back, self.gate, self.query]
        self._last += [self.key_value, self.lepe, self.columns, self.gelu, self.sums]
        self._last += [self.reduce] if self.attention.splits > 1 else []

    def way(self, backward: bool, *tensors: Tensor) -> ByTensors | ByAddress:
        """How to launch the kernels of the forward or the ``backward`` now, on the current device.

        ``tensors`` are those whose memory is not ours.
        """
        bound = self._ages.get(backward) is kept.age() and not kept.watched()
        if bound and not any(x.data_ptr() % 16 for x in tensors):
            return ByAddress(kept.current_stream())
        return ByTensors()

    def settle(self, backward: bool) -> None:
        """Say after a pass by tensors that later ones may go by address, if all launches have been bound."""
        if all(launch.bound for launch in (self._last if backward else self._first)):
            self._ages[backward] = kept.age()


class ByTensors:
    """Launching through Triton's JIT, or its interpreter."""

    def of(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors as :meth:`run` takes them."""
        return tensors

    def places(self, layout: Layout, buffer: Tensor) -> list[Tensor]:
        """Those of a buffer."""
        return [layout.view(buffer, index) for index in range(len(layout.slots))]

    def run(self, launch: Launch, *tensors: Tensor) -> None:
        """Launch."""
        launch(*tensors)


class ByAddress:
    """Launching what has been compiled and bound: nothing but addresses is left to be said."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def of(self, *tensors: Tensor) -> list[int]:
        """See :class:`ByTensors`."""
        return [x.data_ptr() for x in tensors]

    def places(self, layout: Layout, buffer: Tensor) -> list[int]:
        """See :class:`ByTensors`."""
        first = buffer.data_ptr()
        return [first + offset for offset in layout.offsets]

    def run(self, launch: Launch, *addresses: int) -> None:
        """See :class:`ByTensors`."""
        launch.at(self._stream, *addresses)


@lru_cache(maxsize=512)
def find(shape: Shape) -> Plan | None:
    """The plan for a shape; None where kernels of ours do not serve it."""
    spatial = shape.height, shape.width
    if shape.channels % 16 or shape.hidden % 16 or shape.batch * shape.tokens == 0:
        return None
    reason = capability.why_not_block(
        shape.device, (shape.dtype, shape.residual, shape.master), shape.batch, spatial, shape.channels, shape.hidden,
        shape.heads,
    )  # fmt: skip
    return None if reason is not None else Plan(shape)
