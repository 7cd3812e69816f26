"""CUDA graphs of a backbone, forward and backward: what the host launches for a step becomes two launches.

A graph is captured for each shape of image; those used least recently are dropped. All lie in one memory pool, since
one shape is at work at a time: a graph's activations are anybody's memory once its backward has run.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mila_mm.errors import UserError
from mila_mm.ops.triton.capability import failures_are_raised

_logger = logging.getLogger('mila_mm')
_WARM_UPS = 3
"""Passes before a capture: libraries choose their algorithms and Triton compiles in them."""
_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


class Graph:
    """A CUDA graph in a memory pool."""

    def __init__(self, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Record what a function launches; its results are written by each :meth:`replay`."""
        # Other threads, one that pins memory for a data loader say, may go on meanwhile.
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode='thread_local'):
            return function()

    def replay(self) -> None:
        """Launch it."""
        self._graph.replay()

    @staticmethod
    def pool() -> Any:
        """A new memory pool."""
        return torch.cuda.graph_pool_handle()

    @staticmethod
    def warm_up(function: Callable[[], object]) -> None:
        """Run what is about to be captured, on a stream of its own."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)


def why_not_graphs(backbone: nn.Module) -> str | None:
    """What of a backbone a CUDA graph cannot hold, in one line with what to do; None where it can be captured."""
    if getattr(backbone, 'with_cp', False):
        return 'with_cp recomputes in the backward, which a graph cannot hold: leave one of the two out'
    for name, module in backbone.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            return f'{name} is a SyncBatchNorm, whose exchange between ranks a graph cannot hold: take norm_cfg type BN'
        if name and any(getattr(module, hooks) for hooks in _HOOKS):
            return f'{name} has hooks, which would run in the capture alone: remove them (--debug-nonfinite sets some)'
    if not all(type(p) is nn.Parameter for p in backbone.parameters()):
        return 'its parameters are sharded, and move: take DDP'
    return None


class _Token:
    """Is alive as long as the backward of a pass may come."""


class _Shape:
    """The graphs of one shape: static tensors, what fills them, and the pass that is under way."""

    image: Tensor
    outputs: list[Tensor]
    forward: Any
    backward: Any = None
    grad_outputs: list[Tensor]
    grads: list[Tensor | None]  # where its backward writes those of the parameters
    grad_image: Tensor | None = None


class _Replay(torch.autograd.Function):
    """A pass through the graphs of a shape, as autograd sees it."""

    @staticmethod
    def forward(ctx: Any, graphs: BackboneGraphs, shape: _Shape, token: _Token, image: Tensor, *params: Tensor) -> Any:
        ctx.graphs, ctx.shape, ctx.token, ctx.needs_image = graphs, shape, token, image.requires_grad
        shape.image.copy_(image)
        shape.forward.replay()
        return tuple(output.detach() for output in shape.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.token is None:
            raise RuntimeError('CUDA graphs of a backbone: expected one backward of a pass, got a second')
        ctx.token = None
        shape, graphs = ctx.shape, ctx.graphs
        for static, grad in zip(shape.grad_outputs, grads, strict=True):
            static.zero_() if grad is None else static.copy_(grad)
        graphs.keep_accumulated(shape.grads)
        shape.backward.replay()
        grad_image = shape.grad_image.clone() if ctx.needs_image else None
        return None, None, None, grad_image, *(None if g is None else g.detach() for g in shape.grads)


class BackboneGraphs:
    """Stands for ``forward`` of a backbone: ``backbone.forward = BackboneGraphs(backbone)``.

    In training the maps are overwritten by the next pass, and a second pass that comes before the backward of the first
    runs without a graph; without gradients the maps are copies. Running statistics of BatchNorms, stochastic depth,
    gradient scaling, accumulation and DDP work as without graphs; DDP sends all gradients of the backbone at the end of
    its backward.

    Args:
        backbone: The backbone, on its GPU and with its final parameters when it is first called; parameters that are
            moved, or frozen, later are captured anew.
        shapes: Graphs that are kept, of images of different shapes, training and inference apart.
        graph: The class of the graphs.
    """

    def __init__(self, backbone: nn.Module, shapes: int = 8, graph: type[Any] = Graph) -> None:
        self._backbone = backbone
        self._forward = type(backbone).forward
        self._limit = shapes
        self._graph = graph
        self._pool: Any = None
        self._shapes: OrderedDict[Any, _Shape] = OrderedDict()
        self._state: Any = None
        self._under_way: Any = None
        self._said: set[str] = set()
        self._broken = False
        self._params: list[nn.Parameter] = []
        self.grads: list[Tensor | None] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> BackboneGraphs:
        return BackboneGraphs(deepcopy(self._backbone, memo), self._limit, self._graph)

    def __reduce__(self) -> tuple[Any, ...]:
        return BackboneGraphs, (self._backbone, self._limit, self._graph)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps of images x (B, C, H, W)."""
        backbone = self._backbone
        if x.device.type != 'cuda' and self._graph is Graph:
            self._say('the images are not on a GPU')
            return self._forward(backbone, x)
        self._look_for_changes()
        training = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self._params))
        # Without gradients too: what the first one keeps for its backward lies in the pool that all graphs write to.
        if self._is_under_way():
            self._say('a pass came before the backward of the one before it')
            return self._forward(backbone, x)
        low = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else None
        modes = tuple(module.training for module in backbone.modules())
        key = (x.shape, x.stride(), x.dtype, low, training, x.requires_grad, modes)
        shape = self._captured(key, x, training, low)
        if shape is None:
            return self._forward(backbone, x)
        if training:
            token = _Token()
            self._under_way = weakref.ref(token)
            return _Replay.apply(self, shape, token, x, *self._params)
        with torch.no_grad():
            shape.image.copy_(x)
            shape.forward.replay()
            return tuple(output.clone() for output in shape.outputs)

    def _captured(self, key: Any, x: Tensor, training: bool, low: torch.dtype | None) -> _Shape | None:
        """The graphs of a shape; None where they could not be captured, now or before."""
        if self._broken:
            return None
        shape = self._shapes.get(key)
        if shape is None:
            while len(self._shapes) >= self._limit:
                self._shapes.popitem(last=False)
            try:
                shape = self._shapes[key] = self._capture(x, training, low)
            except RuntimeError as error:
                if failures_are_raised():
                    raise
                # What the driver says of one shape it will say of others; and no more memory is to be tried for.
                self._broken = True
                self._shapes.clear()
                self._say(f'a capture failed ({type(error).__name__}: {str(error).splitlines()[0]})')
                return None
        self._shapes.move_to_end(key)
        return shape

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _logger.warning('graph_backbone: runs without a CUDA graph: %s', reason)

    def _is_under_way(self) -> bool:
        return self._under_way is not None and self._under_way() is not None

    def _look_for_changes(self) -> None:
        """Forget all graphs where they would read old memory, or give gradients to others than want them."""
        params, buffers = list(self._backbone.parameters()), list(self._backbone.buffers())
        state = [(p.data_ptr(), p.requires_grad) for p in params], [b.data_ptr() for b in buffers]
        if state == self._state:
            return
        self._shapes.clear()
        self._state, self._params = state, params
        self.grads = [torch.zeros_like(p) if p.requires_grad else None for p in params]

    def keep_accumulated(self, grads: Sequence[Tensor | None]) -> None:
        """Move gradients that lie in the graphs' memory and are to be added to: a replay writes there."""
        held = [
            (p, p.grad) for p, g in zip(self._params, grads, strict=True)
            if g is not None and p.grad is not None and p.grad.data_ptr() == g.data_ptr()
        ]  # fmt: skip
        if held:
            copies = [torch.empty_like(grad) for _, grad in held]
            torch._foreach_copy_(copies, [grad for _, grad in held])
            for (p, _), copy in zip(held, copies, strict=True):
                p.grad = copy

    def _capture(self, x: Tensor, training: bool, low: torch.dtype | None) -> _Shape:
        """Make the graphs of a shape."""
        if (reason := why_not_graphs(self._backbone)) is not None:
            raise UserError(f'graph_backbone: {reason}')
        if self._pool is None:
            self._pool = self._graph.pool()
        buffers = list(self._backbone.buffers())
        before = [b.clone() for b in buffers]
        # Nothing of a capture may be an inference tensor, which could not be written to later.
        with torch.inference_mode(False), torch.set_grad_enabled(training):
            shape = _Shape()
            shape.grads = self.grads
            shape.image = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
            if training and x.requires_grad:
                shape.grad_image = torch.zeros_like(x)
            forward, backward = partial(self._run, shape, low), partial(self._differentiate, shape)

            def step() -> None:
                outputs = forward()
                if training:
                    shape.grad_outputs = [torch.zeros_like(output) for output in outputs]
                    backward(outputs)

            try:
                self._graph.warm_up(step)
                shape.forward = self._graph(self._pool)
                outputs = shape.forward.capture(forward)
                if training:
                    shape.backward = self._graph(self._pool)
                    shape.backward.capture(partial(backward, outputs))
            finally:
                with torch.no_grad():
                    for buffer, value in zip(buffers, before, strict=True):
                        buffer.copy_(value)  # the warm-up has moved running statistics
            # Without what was kept for the backward: in the pool it is free for other shapes now.
            shape.outputs = [output.detach() for output in outputs]
        return shape

    def _run(self, shape: _Shape, low: torch.dtype | None) -> list[Tensor]:
        """The forward of a graph."""
        # A cast in autocast's cache would be one of the capture, for good.
        cast = nullcontext() if low is None else torch.autocast(shape.image.device.type, low, cache_enabled=False)
        with cast:
            return list(self._forward(self._backbone, shape.image))

    def _differentiate(self, shape: _Shape, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The backward of a graph: into memory that all shapes share, since a backward is read before the next."""
        wanted: list[Tensor] = [p for p in self._params if p.requires_grad]
        results = [g for g in shape.grads if g is not None]
        if shape.grad_image is not None:
            wanted, results = [*wanted, shape.image], [*results, shape.grad_image]
        grads = torch.autograd.grad(outputs, wanted, shape.grad_outputs, allow_unused=True)
        given = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
        with torch.no_grad():
            torch._foreach_copy_([result for result, _ in given], [grad for _, grad in given])
        return results
