"""A whole block by Triton kernels: ``block_forward`` and ``block_backward``, for the node of a block alone.

They run where :func:`find` has a plan; without autograd, which the node is itself. Where somebody watches calls they
are registered ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mila_mm.ops.block.gradients import gradient_sizes
from mila_mm.ops.common import register
from mila_mm.ops.triton import capability
from mila_mm.ops.triton.configs import KernelFailed

if TYPE_CHECKING:
    from mila_mm.ops.block.layout import Shape
    from mila_mm.ops.block.plan import Plan

EPS, ROPE_BASE = 1e-6, 1e4
"""The defaults of :func:`mila_mm.ops.mila_attention`."""

Setting = tuple[int, int, int, float, float, torch.dtype]
"""Height and width of the map, heads, eps of both norms, and what products are computed in."""
Scales = tuple[Tensor | None, Tensor | None]
"""What stochastic depth multiplies each branch by, (B,), or None."""


def _shape(
    x: Tensor, hidden: int, master: torch.dtype, scaled: tuple[bool, bool], keep: bool, setting: Setting
) -> Shape:
    from mila_mm.ops.block.layout import Shape
    from mila_mm.ops.triton import configs

    batch, _, channels = x.shape
    height, width, heads, eps1, eps2, dtype = setting
    # Of fp32 the user decides at any time whether TF32 will do.
    dots = configs.arithmetic(dtype).name if dtype == torch.float32 else None
    return Shape(
        batch, height, width, channels, hidden, heads, eps1, eps2, EPS, ROPE_BASE, dtype, x.dtype, master,
        scaled, keep, dots, x.device,
    )  # fmt: skip


def find(x: Tensor, hidden: int, master: torch.dtype, scales: Scales, keep: bool, setting: Setting) -> Plan | None:
    """The plan by which kernels run a block on x (B, N, C), with parameters of dtype ``master``; None where none do.

    ``keep`` says whether there will be a backward.
    """
    if not x.is_cuda or x.shape[1] != setting[0] * setting[1] or capability.has_given_up(x.device):
        return None
    from mila_mm.ops.block import plan

    return plan.find(_shape(x, hidden, master, (scales[0] is not None, scales[1] is not None), keep, setting))


def forward(
    plan: Plan, x: Tensor, weights: Sequence[Tensor], params: Sequence[Tensor], taps: Tensor, scales: Scales
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See :func:`mila_mm.ops.block.launch.forward`; x of any strides.

    Raises:
        KernelFailed: A kernel does not work here, which has been said, and :func:`find` will answer None from now on.
    """
    if is_in_torch_dispatch_mode():
        rest = weights, params, taps, *scales, plan.shape.keep, *plan.setting
        return torch.ops.mila_mm.block_forward(x, *rest)
    from mila_mm.ops.block import launch

    try:
        return launch.forward(plan, x.contiguous(), weights, params, taps, scales)
    except KernelFailed as failure:
        capability.give_up(x.device, failure)
        raise


def backward(
    plan: Plan,
    grad: Tensor,
    kept: Sequence[Tensor],
    weights: Sequence[Tensor],
    params: Sequence[Tensor],
    taps: Tensor,
    scales: Scales,
) -> tuple[Tensor, Tensor]:
    """See :func:`mila_mm.ops.block.launch.backward`; raises as :func:`forward` does."""
    if is_in_torch_dispatch_mode():
        return torch.ops.mila_mm.block_backward(grad, kept, weights, params, taps, *scales, *plan.setting)
    from mila_mm.ops.block import launch

    try:
        return launch.backward(plan, grad, kept, weights, params, taps, scales)
    except KernelFailed as failure:
        capability.give_up(grad.device, failure)
        raise


def results(plan: Plan, kept: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What the forward kept, tensor by tensor: of the first half x, x1, mean, rstd, y1, joint, u, qk, a, state and key
    mean; of the second x2, x3, mean, rstd, y2.
    """
    from mila_mm.ops.block.layout import Results

    x, x2, joint, qk, buffer = kept
    if buffer.storage_offset():  # unpacked by somebody's hook, as a view
        buffer = buffer.clone()
    layout = plan.results
    at = Results(*(layout.view(buffer, index) for index in range(len(layout.slots))))
    joint, qk = (product.view(*x.shape[:2], -1) for product in (joint, qk))
    first = x, at.x1, at.mean1, at.rstd1, at.y1, joint, at.u, qk, at.a, at.state, at.key_mean
    return *first, x2, at.x3, at.mean2, at.rstd2, at.y2


def _planned(x: Tensor, hidden: int, master: torch.dtype, scales: Scales, keep: bool, setting: Any) -> Plan:
    found = find(x, hidden, master, scales, keep, setting)
    if found is None:
        raise KernelFailed(f'no kernels for a block of {tuple(x.shape)}')
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
    plan = _planned(x, weights[6].shape[0], params[0].dtype, scales, keep, setting)
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
    plan = _planned(kept[0], weights[3].shape[0], params[0].dtype, scales, True, setting)
    return launch.backward(plan, grad.contiguous(), [kept[0].contiguous(), *kept[1:]], weights, params, taps, scales)


def _fake_forward(x, weights, params, taps, scale1, scale2, keep, *setting):
    from mila_mm.ops.block.layout import results_of

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
