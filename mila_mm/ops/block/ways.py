"""The two ways to launch a block's kernels: with tensors, by Triton's JIT, and with addresses, what it has compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from mila_mm.ops.block.layout import Layout
from mila_mm.ops.triton.kept import Launch

Place = Any
"""A tensor, or its address: what the way that it goes takes."""


class Way(Protocol):
    """How kernels are launched."""

    def of(self, *tensors: Tensor) -> Sequence[Place]:
        """Tensors as :meth:`run` takes them."""

    def halves(self, x: Tensor) -> Sequence[Place]:
        """The left and right half of a matrix."""

    def places(self, layout: Layout, buffer: Tensor) -> Sequence[Place]:
        """Those of a buffer."""

    def run(self, launch: Launch, *places: Place) -> None:
        """Launch."""


class ByTensors:
    """Launching through Triton's JIT, or its interpreter."""

    def of(self, *tensors: Tensor) -> Sequence[Tensor]:
        """See :class:`Way`."""
        return tensors

    def halves(self, x: Tensor) -> Sequence[Tensor]:
        """See :class:`Way`."""
        return x.chunk(2, -1)

    def places(self, layout: Layout, buffer: Tensor) -> Sequence[Tensor]:
        """See :class:`Way`."""
        return [layout.view(buffer, index) for index in range(len(layout.slots))]

    def run(self, launch: Launch, *tensors: Place) -> None:
        """See :class:`Way`."""
        launch(*tensors)


class ByAddress:
    """Launching what has been compiled and bound: nothing but addresses is left to be said."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def of(self, *tensors: Tensor) -> Sequence[int]:
        """See :class:`Way`."""
        return [x.data_ptr() for x in tensors]

    def halves(self, x: Tensor) -> Sequence[int]:
        """See :class:`Way`."""
        first = x.data_ptr()
        return first, first + x.shape[-1] // 2 * x.itemsize

    def places(self, layout: Layout, buffer: Tensor) -> Sequence[int]:
        """See :class:`Way`."""
        first = buffer.data_ptr()
        return [first + offset for offset in layout.offsets]

    def run(self, launch: Launch, *addresses: Place) -> None:
        """See :class:`Way`."""
        launch.at(self._stream, *addresses)
