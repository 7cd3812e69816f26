"""The parameters of a pass in the dtype that it computes in: cast and laid out once, in one buffer.

Autocast casts each weight where it is used, and each gradient back, in a call of its own: 695 of the 1,691 calls of
MILA-T's training step. The buffer is new in every pass, so that what an earlier pass kept for its backward stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors

_LEPE = 12  # of a block's parameters, its attention's depthwise weight


class Castable:
    """Parameters that are cast together.

    Args:
        parts: For each tensor that is wanted the parameters that it is made of, one below the other; dense, and
            contiguous where there are several.
    """

    def __init__(self, parts: Sequence[Sequence[Tensor]]) -> None:
        self.parts = [tuple(part) for part in parts]
        self.shapes = [(sum(p.shape[0] for p in part), *part[0].shape[1:]) for part in self.parts]
        self._sources: list[Tensor] = []
        self._addresses: list[int] = []
        self._chosen: torch.dtype | None = None

    def _choose(self, dtype: torch.dtype) -> None:
        """Settle what has to be copied: what is of another dtype, or made of several parameters."""
        self._copied = [len(part) > 1 or part[0].dtype != dtype for part in self.parts]
        copied = [part for part, wanted in zip(self.parts, self._copied, strict=True) if wanted]
        self._params = [p for part in copied for p in part]
        self._sizes = [p.numel() for p in self._params]
        shapes = [shape for shape, wanted in zip(self.shapes, self._copied, strict=True) if wanted]
        # Without memory of their own: in one call they take the buffer apart, as distributed training does its buckets.
        self._templates = [
            torch.empty(1, device=part[0].device).expand(shape) for part, shape in zip(copied, shapes, strict=True)
        ]
        self._strides = [None if part[0].is_contiguous() else part[0].stride() for part in self.parts]
        self._addresses, self._chosen = [], dtype

    def _read(self) -> list[Tensor]:
        """The parameters to copy as flat views, made anew where one has got other memory (``p.data = ...``)."""
        addresses = [p.data_ptr() for p in self._params]
        if addresses != self._addresses:
            # In the order of memory, whatever the layout: one is in channels_last, the others contiguous.
            self._sources = [p.detach().as_strided((p.numel(),), (1,)) for p in self._params]
            self._addresses = addresses
        return self._sources

    def cast(self, dtype: torch.dtype) -> list[Tensor]:
        """All parts in ``dtype``, without gradients: parameters themselves where nothing is to be done."""
        if dtype != self._chosen:
            self._choose(dtype)
        if not self._params:
            return [part[0] for part in self.parts]
        flat = torch.empty(sum(self._sizes), dtype=dtype, device=self._params[0].device)
        torch._foreach_copy_(flat.split_with_sizes(self._sizes), self._read())
        joint = iter(_unflatten_dense_tensors(flat, self._templates))
        return [
            (next(joint) if strides is None else next(joint).as_strided(shape, strides)) if copied else part[0]
            for part, shape, copied, strides in zip(self.parts, self.shapes, self._copied, self._strides, strict=True)
        ]


class Taps:
    """The depthwise weights in the attentions of blocks as the kernels read them, laid out at once.

    Args:
        blocks: With their parameters in the order of their node.
    """

    def __init__(self, blocks: Sequence[tuple[nn.Module, tuple[Tensor, ...]]]) -> None:
        self._count = len(blocks)
        groups: dict[tuple[int, torch.dtype], tuple[list[int], list[Tensor]]] = {}
        for place, (block, params) in enumerate(blocks):
            weight, heads = params[_LEPE], cast('Any', block).attn.num_heads
            places, sources = groups.setdefault((weight.shape[0] // heads, weight.dtype), ([], []))
            places.append(place)
            sources.append(weight.detach().view(heads, -1, 9).transpose(1, 2))
        self._groups = list(groups.values())

    def lay_out(self) -> list[Tensor | None]:
        """For each block (heads, 9, C / heads) in fp32."""
        result: list[Tensor | None] = [None] * self._count
        for places, sources in self._groups:
            joint = torch.cat(sources).to(torch.float32)
            for place, taps in zip(places, joint.split([len(source) for source in sources]), strict=True):
                result[place] = taps
        return result


class Casted(torch.autograd.Function):
    """``Casted.apply(values, *params)``: ``values``, parameters in another dtype, with their gradients cast back at
    once."""

    @staticmethod
    def forward(ctx: Any, values: Sequence[Tensor], *params: Tensor) -> tuple[Tensor, ...]:
        """Hand the values on."""
        ctx.set_materialize_grads(False)
        ctx.strides = [p.stride() for p in params]
        ctx.dtype = params[0].dtype
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Cast the gradients."""
        given = [grad for grad in grads if grad is not None]
        if not given:
            return None, *grads
        if torch.is_grad_enabled():  # create_graph=True: as differentiable as a cast is
            return None, *(None if grad is None else grad.to(ctx.dtype) for grad in grads)
        ends = list(accumulate(grad.numel() for grad in given))
        flat = torch.empty(ends[-1], dtype=ctx.dtype, device=given[0].device)
        pieces = iter(flat.tensor_split(ends[:-1]))
        results = [
            None if grad is None else next(pieces).as_strided(grad.shape, strides)
            for grad, strides in zip(grads, ctx.strides, strict=True)
        ]
        torch._foreach_copy_([piece for piece in results if piece is not None], given)
        return None, *results


Parameters = tuple[Tensor, Tensor | None]
"""Weight and bias of a convolution."""


class CastConvolutions(NamedTuple):
    """The convolutions of a stem or a downsampling, in their order.

    Attributes:
        values: Their parameters in the dtype of a pass, without gradients.
        params: The parameters themselves.
    """

    values: list[Parameters]
    params: list[Parameters]

    def with_gradients(self) -> list[Parameters]:
        """The values, with gradients for the parameters."""
        params = [p for pair in self.params for p in pair if p is not None]
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in params):
            return self.values
        given = iter(Casted.apply([value for pair in self.values for value in pair if value is not None], *params))
        return [(next(given), None if bias is None else next(given)) for _, bias in self.params]
