"""The registered ops of a whole block, ``block_forward`` and ``block_backward``, for the node of a block alone.

They are what runs where Triton kernels serve the shape (:func:`serves`); without autograd, which the node is itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mila_mm.ops.block.gradients import gradient_sizes
from mila_mm.ops.common import register

if TYPE_CHECKING:
    from mila_mm.ops.block.plan import Plan, Shape

EPS, ROPE_BASE = 1e-6, 1e4
"""The defaults of :func:`mila_mm.ops.mila_attention`."""

Setting = tuple[int, int, int, float, float, torch.dtype]
"""Height and width of the map, heads, eps of both norms, and what products are computed in."""


def _shape(
    x: Tensor, hidden: int, master: torch.dtype, scaled: tuple[bool, bool], keep: bool, setting: Setting
) -> Shape:
    from mila_mm.ops.block.plan import Shape
    from mila_mm.ops.triton import configs

    height, width, heads, eps1, eps2, dtype = setting
    # Of fp32 the user decides at any time whether TF32 will do.
    dots = configs.arithmetic(dtype).name if dtype == torch.float32 else None
    return Shape(
        x.shape[0], height, width, x.shape[2], hidden, heads, eps1, eps2, EPS, ROPE_BASE, dtype, x.dtype, master,
        scaled, keep, dots, x.device,
    )  # fmt: skip


def serves(
    x: Tensor, hidden: int, master: torch.dtype, scaled: tuple[bool, bool], keep: bool, setting: Setting
) -> bool:
    """Whether these ops can run a block on x (B, N, C), with parameters of dtype ``master``."""
    if not x.is_cuda or x.shape[1] != setting[0] * setting[1] or torch.float64 in (x.dtype, master, setting[-1]):
        return False
    from mila_mm.ops.block import plan

    return plan.find(_shape(x, hidden, master, scaled, keep, setting)) is not None


def _plan(
    x: Tensor, hidden: int, master: torch.dtype, scales: Sequence[Tensor | None], keep: bool, setting: Setting
) -> Plan:
    from mila_mm.ops.block import plan

    scaled = scales[0] is not None, scales[1] is not None
    found = plan.find(_shape(x, hidden, master, scaled, keep, setting))
    assert found is not None, 'asked for where serves() is False'
    return found


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    params: Sequence[Tensor],
    taps: Tensor,
    scale1: Tensor | None,
    scale2: Tensor | None,
    keep: bool,
    *setting: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from mila_mm.ops.block import launch

    scales = scale1, scale2
    plan = _plan(x, weights[6].shape[0], params[0].dtype, scales, keep, cast('Setting', setting))
    return launch.forward(plan, x.contiguous(), weights, params, taps, scales)


def _backward(
    grad: Tensor,
    kept: Sequence[Tensor],
    weights: Sequence[Tensor],
    params: Sequence[Tensor],
    taps: Tensor,
    scale1: Tensor | None,
    scale2: Tensor | None,
    *setting: Any,
) -> tuple[Tensor, Tensor]:
    from mila_mm.ops.block import launch

    scales = scale1, scale2
    plan = _plan(kept[0], weights[3].shape[0], params[0].dtype, scales, True, cast('Setting', setting))
    return launch.backward(plan, grad.contiguous(), [kept[0].contiguous(), *kept[1:]], weights, params, taps, scales)


def _fake_forward(x, weights, params, taps, scale1, scale2, keep, *setting):
    from mila_mm.ops.block.plan import results_of

    scaled, dtype = (scale1 is not None, scale2 is not None), setting[-1]
    size = results_of(_shape(x, weights[6].shape[0], params[0].dtype, scaled, keep, setting)).size
    product = x.new_empty((x.shape[0] * x.shape[1], 2 * x.shape[2]), dtype=dtype)
    buffer = x.new_empty(size // dtype.itemsize, dtype=dtype)
    return x.new_empty(x.shape), x.new_empty(x.shape), product, torch.empty_like(product), buffer


def _fake_backward(grad, kept, weights, params, taps, scale1, scale2, *setting):
    c, hidden = kept[0].shape[2], weights[3].shape[0]
    return kept[0].new_empty(kept[0].shape), params[0].new_empty(sum(gradient_sizes(c, hidden)))


_REST = 'Tensor[] params, Tensor taps, Tensor? scale1, Tensor? scale2'
_SETTING = 'int height, int width, int heads, float eps1, float eps2, ScalarType dtype'
register(
    'block_forward',
    f'(Tensor x, Tensor[] weights, {_REST}, bool keep, {_SETTING}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    _forward,
    _fake_forward,
)
register(
    'block_backward',
    f'(Tensor grad, Tensor[] kept, Tensor[] weights, {_REST}, {_SETTING}) -> (Tensor, Tensor)',
    _backward,
    _fake_backward,
)
