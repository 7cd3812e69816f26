"""``add_branch``, ``linear_weight_backward``, ``mlp_forward`` and ``mlp_backward``: the dense half of a block, for the
inside of its autograd node.

Registered without autograd: the node writes its backward itself. Weights come in the dtype of the activations; their
gradients leave in the dtype of the parameters, summed in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops.common import register
from mila_mm.ops.rows.op import column_sum


def add_branch(branch: Tensor, shortcut: Tensor, scale: Tensor | None) -> Tensor:
    """shortcut + branch * scale; without a scale into the memory of the branch, which is used up, if the dtype fits.

    Args:
        branch: (B, N, C).
        shortcut: (B, N, C), of the branch's dtype or a wider one, which the sum then has.
        scale: (B, 1, 1) in the branch's dtype, what stochastic depth makes of each image; None for 1.
    """
    if scale is None:
        return branch.add_(shortcut) if branch.dtype == shortcut.dtype else shortcut + branch
    if branch.dtype == shortcut.dtype:
        return torch.addcmul(shortcut, branch, scale)
    return shortcut + branch * scale


def _linear_weight_backward(grad: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    return torch.mm(grad.t(), x).to(dtype), column_sum(grad, dtype)


def _mlp_forward(
    y: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    shortcut: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    hidden = F.linear(y, weight1, bias1)
    return add_branch(F.linear(F.gelu(hidden), weight2, bias2), shortcut, scale), hidden


def _mlp_backward(
    grad: Tensor, y: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads2 = _linear_weight_backward(grad, F.gelu(hidden), dtype)  # again: it is as wide as hidden
    grad = torch.mm(grad.reshape(-1, grad.shape[-1]), weight2).view(hidden.shape)
    grad = torch.ops.aten.gelu_backward(grad, hidden)
    grads1 = _linear_weight_backward(grad, y, dtype)
    grad_y = torch.mm(grad.view(-1, grad.shape[-1]), weight1).view(y.shape)
    return grad_y, *grads1, *grads2


def _fake_linear_weight_backward(grad, x, dtype):
    rows, columns = grad.shape[-1], x.shape[-1]
    return grad.new_empty((rows, columns), dtype=dtype), grad.new_empty(rows, dtype=dtype)


def _fake_mlp_forward(y, weight1, bias1, weight2, bias2, shortcut, scale):
    return shortcut.new_empty(shortcut.shape), y.new_empty((*y.shape[:-1], bias1.shape[0]))


def _fake_mlp_backward(grad, y, hidden, weight1, weight2, dtype):
    grads = [y.new_empty(shape, dtype=dtype) for w in (weight1, weight2) for shape in (w.shape, w.shape[:1])]
    return y.new_empty(y.shape), *grads


register(
    'linear_weight_backward',
    '(Tensor grad, Tensor x, ScalarType dtype) -> (Tensor, Tensor)',
    _linear_weight_backward,
    _fake_linear_weight_backward,
)
register(
    'mlp_forward',
    '(Tensor y, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor shortcut, Tensor? scale) '
    '-> (Tensor, Tensor)',
    _mlp_forward,
    _fake_mlp_forward,
)
register(
    'mlp_backward',
    '(Tensor grad, Tensor y, Tensor hidden, Tensor weight1, Tensor weight2, ScalarType dtype) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    _mlp_backward,
    _fake_mlp_backward,
)
