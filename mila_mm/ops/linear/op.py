"""``add_branch``, ``linear_backward`` and ``cast_all``: what the autograd node of a block does around its products.

Registered without autograd: the node writes its backward itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mila_mm.ops.common import register
from mila_mm.ops.rows.op import column_sum


def add_branch(branch: Tensor, shortcut: Tensor, scale: Tensor | None) -> Tensor:
    """shortcut + branch * scale; without a scale into the memory of the branch, which is used up, if the dtype fits.

    Args:
        branch: (B, N, C).
        shortcut: (B, N, C), of the branch's dtype or a wider one, which the sum then has.
        scale: (B,) in the branch's dtype, what stochastic depth makes of each image; None for 1.
    """
    if scale is None:
        return branch.add_(shortcut) if branch.dtype == shortcut.dtype else shortcut + branch
    scale = scale[:, None, None]
    if branch.dtype == shortcut.dtype:
        return torch.addcmul(shortcut, branch, scale)
    return shortcut + branch * scale


def _linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty without a weight), weight and bias (in ``dtype``) of a Linear, from that of its result."""
    rows = grad.reshape(-1, grad.shape[-1])
    grad_weight, grad_bias = torch.mm(rows.t(), x.reshape(-1, x.shape[-1])), column_sum(rows, dtype)
    grad_x = x.new_empty(0) if weight is None else torch.mm(rows, weight).view(x.shape)
    return grad_x, grad_weight, grad_bias


def _fake_linear_backward(grad, x, weight, dtype):
    rows, columns = grad.shape[-1], x.shape[-1]
    grad_x = x.new_empty(0 if weight is None else x.shape)
    return grad_x, grad.new_empty((rows, columns)), grad.new_empty(rows, dtype=dtype)


register(
    'linear_backward',
    '(Tensor grad, Tensor x, Tensor? weight, ScalarType dtype) -> (Tensor, Tensor, Tensor)',
    _linear_backward,
    _fake_linear_backward,
)


def _cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Cast contiguous tensors at once, into one buffer."""
    sizes = [t.numel() for t in tensors]
    flat = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device)
    results = [piece.view(t.shape) for piece, t in zip(flat.split_with_sizes(sizes), tensors, strict=True)]
    torch._foreach_copy_(results, list(tensors))
    return results


def _fake_cast_all(tensors, dtype):
    return [t.new_empty(t.shape, dtype=dtype) for t in tensors]


register('cast_all', '(Tensor[] tensors, ScalarType dtype) -> Tensor[]', _cast_all, _fake_cast_all)
