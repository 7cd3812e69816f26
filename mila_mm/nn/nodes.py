"""What nodes of autograd with a backward written by hand share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

import mila_mm.ops.linear.op  # noqa: F401  registers what no public function needs
from mila_mm.ops.common import IMPLEMENTATIONS

_DIRECT = SimpleNamespace(**IMPLEMENTATIONS)


def direct_ops() -> Any:
    """The ops as functions; what watches calls (a counter of operations, say) sees the registered ones instead."""
    return torch.ops.mila_mm if is_in_torch_dispatch_mode() else _DIRECT


class FirstOrderOnly(torch.autograd.Function):
    """The identity of its first argument, which cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        """Hand the gradient on."""
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        """Refuse."""
        raise RuntimeError(
            "MILA: expected one differentiation, got a second; build the model with attn_backend='reference' for it"
        )


class NormNode(torch.autograd.Function):
    """``NormNode.apply(x, weight, bias, eps, dtype)``: a LayerNorm of tokens x (B, N, C) that writes ``dtype``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """Compute (B, N, C)."""
        y, mean, rstd = direct_ops().layer_norm_forward(x, weight, bias, eps, dtype)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, weight and bias."""
        saved = ctx.saved_tensors
        with torch.no_grad():
            grads = direct_ops().layer_norm_backward(grad, *saved)
        if torch.is_grad_enabled():  # create_graph=True
            grads = tuple(FirstOrderOnly.apply(each, grad, *saved[:3]) for each in grads)
        return *grads, None, None
