"""What a block of one shape needs, whatever its tensors: where results lie in memory, and how kernels are launched."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mila_mm.ops.attention.geometry import Geometry
from mila_mm.ops.block import kernels
from mila_mm.ops.block.gradients import gradient_sizes
from mila_mm.ops.block.layout import RESULT, SCRATCH, Parts, Shape, results_of, scratch_of
from mila_mm.ops.block.matrices import Matrices
from mila_mm.ops.block.ways import ByAddress, ByTensors, Way
from mila_mm.ops.feed_forward.launch import gelu_backward_launch, hidden_backward_launch, mlp_launch
from mila_mm.ops.rows.launch import column_parts_launch, norm_backward_launch
from mila_mm.ops.stencil import launch as stencils
from mila_mm.ops.triton import capability, configs, kept
from mila_mm.ops.triton.kept import Launch


class Plan:
    """The launches of a block and where it has what; see :mod:`mila_mm.ops.block.launch` for their order.

    Args:
        shape: What it is for; :func:`find` says whether it can be served.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.setting = shape.height, shape.width, shape.heads, shape.eps1, shape.eps2, shape.dtype
        self.results = results_of(shape)
        self.rows = shape.batch * shape.tokens
        self.sizes = gradient_sizes(shape.channels, shape.hidden)
        self.vectors = sum(self.sizes[:-6])
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
        self._views()
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
        # The hidden map anew, its gradient and the GELU's: by one kernel where the forward is, else after two products.
        self.by_hidden = self.mlp is not None
        if self.by_hidden:
            self.hidden_back, hidden_parts = hidden_backward_launch(self.rows, c, shape.hidden)
        else:
            self.hidden_back, hidden_parts = gelu_backward_launch(self.rows, shape.hidden, shape.dtype)
        parts = Parts(norm_parts, stencil_parts, lepe_parts, column_parts, hidden_parts)
        self.matrices = Matrices(shape)
        self.scratch = scratch_of(shape, parts, self.matrices.place)
        block = configs.LEPE_CHANNELS if c % configs.LEPE_CHANNELS == 0 else 16
        self.sums = Launch(
            kernels, 'block_reduce_kernel', (50 * c // block + -(-shape.hidden // block),), (c, shape.hidden, *parts),
            ROWS=configs.REDUCE_ROWS, CHANNELS=block, num_warps=configs.REDUCE_WARPS,
        )  # fmt: skip
        self._last = [self.norm1, self.norm2, self.conv, self.dwc_conv, self.dwc_back, self.gate, self.query]
        self._last += [self.key_value, self.lepe, self.columns, self.hidden_back, self.sums, *self.matrices.launches]
        self._last += [self.reduce] if self.attention.splits > 1 else []

    def _views(self) -> None:
        """Sizes, strides and offset of what matrix products read and write."""
        shape, rows, c, results, scratch = self.shape, self.rows, self.shape.channels, self.results, self.scratch
        self.buffer_size = results.size // shape.dtype.itemsize
        self.scratch_size, self.flat_size = scratch.size // shape.dtype.itemsize, sum(self.sizes)
        self.y1, self.u, self.a, self.y2 = (
            results.strided(index, rows, c) for index in (RESULT.y1, RESULT.u, RESULT.a, RESULT.y2)
        )
        self.hidden, self.grad_hidden = scratch.strided(SCRATCH.hidden), scratch.strided(SCRATCH.grad_hidden)
        self.grad_u = scratch.strided(SCRATCH.grad_u)
        sizes, strides, offset = scratch.strided(SCRATCH.grad_products)
        self.grad_qk = sizes[1:], strides[1:], offset
        self.grad_joint = sizes[1:], strides[1:], offset + strides[0]
        # Where products write gradients, and all these at once.
        hidden, begin = shape.hidden, scratch.strided(SCRATCH.matrices)[2] if self.matrices.casts else self.vectors
        self.all_matrices = (sum(self.sizes[-6:]),), (1,), begin
        self.matrix_grads = []
        for sizes in ((2 * c, c), (2 * c, c), (c, c), (hidden, c), (c, hidden)):
            self.matrix_grads.append((sizes, (sizes[1], 1), begin))
            begin += sizes[0] * sizes[1]

    def way(self, backward: bool, *tensors: Tensor) -> Way:
        """How to launch the kernels of the forward or the ``backward`` now, on the current device.

        ``tensors`` are those whose memory is not ours.
        """
        if self._ages.get(backward) is not kept.age() or kept.watched():
            return ByTensors()
        bits = 0
        for x in tensors:
            bits |= x.data_ptr()
        return ByTensors() if bits % 16 else ByAddress(kept.current_stream())

    def settle(self, backward: bool) -> None:
        """Say after a pass by tensors that later ones may go by address, if all launches have been bound."""
        if all(launch.bound for launch in (self._last if backward else self._first)):
            self._ages[backward] = kept.age()


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
