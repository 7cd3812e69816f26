"""``batch_norm``: a BatchNorm by the statistics of its batch, and the ReLU behind it, in three passes over memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mila_mm.ops.batch_norm.reference import batch_norm_reference
from mila_mm.ops.common import BACKENDS, IMPLEMENTATIONS, as_written, compute_dtype, plain_operators, register

Running = tuple[Tensor, Tensor, Tensor]
"""Mean and variance of batches so far, (C,), and their number."""


def why_not_triton_batch_norm(x: Tensor) -> str | None:
    """Say why the Triton kernels cannot take tokens x (B, N, C); None where they can."""
    if not x.is_cuda:
        return f'expected CUDA tensors, got {x.device.type}'
    from mila_mm.ops.batch_norm.launch import MAX_ROWS
    from mila_mm.ops.triton import capability

    if (reason := capability.why_not_rows(x)) is not None:
        return reason
    rows = x.shape[0] * x.shape[1]
    return None if rows <= MAX_ROWS else f'expected at most {MAX_ROWS} tokens, got {rows}'


def _move(running: Running | None, mean: Tensor, variance: Tensor, rows: int, momentum: float) -> None:
    """Move running statistics towards those of a batch."""
    if running is not None:
        running_mean, running_var, batches = running
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * (rows / (rows - 1))).to(running_var.dtype), momentum)
        batches.add_(1)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, N, C), and statistics (3, C) in fp32 (fp64 for fp64): mean, rstd and variance."""
    running = None
    if running_mean is not None and running_var is not None and batches is not None:
        running = running_mean, running_var, batches
    if why_not_triton_batch_norm(x) is None:
        from mila_mm.ops.batch_norm import launch

        return launch.batch_norm_forward(x, weight, bias, running, momentum, eps, relu)
    y, mean, variance = batch_norm_reference(x, weight, bias, eps=eps, relu=relu)
    _move(running, mean, variance, x.shape[0] * x.shape[1], momentum)
    return y.contiguous(), torch.stack((mean, (variance + eps).rsqrt(), variance))


def _backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in the dtype of its input."""
    if why_not_triton_batch_norm(x) is None:
        from mila_mm.ops.batch_norm import launch

        return launch.batch_norm_backward(grad_y, x, weight, bias, statistics, relu)
    compute, rows = compute_dtype(x), x.shape[0] * x.shape[1]
    mean, rstd, _ = statistics
    with as_written(x):
        normal, scale, grad = (x.to(compute) - mean) * rstd, weight.to(compute), grad_y.to(compute)
        if relu:
            grad = torch.where(normal * scale + bias.to(compute) <= 0, 0, grad)
        grad_bias, grad_weight = grad.sum((0, 1)), (grad * normal).sum((0, 1))
        grad_x = (grad - grad_bias / rows - normal * (grad_weight / rows)) * (scale * rstd)
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _fake_forward(x, weight, bias, running_mean, running_var, batches, momentum, eps, relu):
    return x.new_empty(x.shape), x.new_empty((3, x.shape[2]), dtype=compute_dtype(x))


def _fake_backward(grad_y, x, weight, bias, statistics, relu):
    return tuple(t.new_empty(t.shape) for t in (x, weight, bias))


_PARAMETERS = 'Tensor x, Tensor weight, Tensor bias'
# Without autograd, which a registered op that writes to arguments cannot have: see BatchNormNode.
register(
    'batch_norm_forward',
    f'({_PARAMETERS}, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? batches, '
    'float momentum, float eps, bool relu) -> (Tensor, Tensor)',
    _forward,
    _fake_forward,
)
register(
    'batch_norm_backward',
    f'(Tensor grad_y, {_PARAMETERS}, Tensor statistics, bool relu) -> (Tensor, Tensor, Tensor)',
    _backward,
    _fake_backward,
    once="batch_norm: expected one differentiation, got a second; take backend='reference' for it",
)
_DIRECT = SimpleNamespace(**IMPLEMENTATIONS)


class BatchNormNode(torch.autograd.Function):
    """``BatchNormNode.apply(x, weight, bias, running, momentum, eps, relu)``, as :func:`batch_norm` without its checks.

    Kept for the backward are x and three numbers a channel; what the ReLU lets through it computes again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running: Running | None,
        momentum: float,
        eps: float,
        relu: bool,
    ) -> Tensor:
        """Compute (B, N, C)."""
        ops = torch.ops.mila_mm if is_in_torch_dispatch_mode() else _DIRECT
        y, statistics = ops.batch_norm_forward(x, weight, bias, *(running or (None,) * 3), momentum, eps, relu)
        if running is not None and ops is _DIRECT:
            increment_version(running)  # a kernel has written to them
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.relu = relu
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, weight and bias."""
        # With create_graph=True the registered op, which refuses to be differentiated again.
        registered = torch.is_grad_enabled() or is_in_torch_dispatch_mode()
        ops = torch.ops.mila_mm if registered else _DIRECT
        return *ops.batch_norm_backward(grad, *ctx.saved_tensors, ctx.relu), None, None, None, None


def _check(x: Tensor, weight: Tensor, bias: Tensor, running: Running | None, backend: str) -> None:
    """Raise ValueError for what :func:`batch_norm` cannot take, RuntimeError where Triton's kernels must and cannot."""
    if backend not in BACKENDS:
        raise ValueError(f'batch_norm: expected backend to be one of {", ".join(BACKENDS)}, got {backend!r}')
    if x.dim() != 3 or not x.is_floating_point():
        got = f'{tuple(x.shape)}, {x.dtype}'
        raise ValueError(f'batch_norm: expected x of shape (B, N, C) and a floating dtype, got {got}')
    if x.shape[0] * x.shape[1] < 2:
        raise ValueError(f'batch_norm: expected more than one value a channel, got x of shape {tuple(x.shape)}')
    vectors = [('weight', weight), ('bias', bias)]
    vectors += [('running[0]', running[0]), ('running[1]', running[1])] if running is not None else []
    for name, vector in vectors:
        if tuple(vector.shape) != (x.shape[2],):
            raise ValueError(f'batch_norm: expected {name} of shape {(x.shape[2],)}, got {tuple(vector.shape)}')
    if running is not None and (running[2].dtype != torch.int64 or running[2].numel() != 1):
        raise ValueError(f'batch_norm: expected running[2] to be one int64, got {running[2]!r}')
    if backend == 'triton' and (reason := why_not_triton_batch_norm(x)) is not None:
        raise RuntimeError(f"batch_norm: backend='triton' cannot run here: {reason}; take backend='auto'")


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    relu: bool = False,
    running: Running | None = None,
    momentum: float = 0.1,
    backend: str = 'auto',
) -> Tensor:
    """BatchNorm by the statistics of its batch, as ``torch.nn.BatchNorm2d`` in training mode, and ReLU; differentiable
    once.

    The forward reads x twice and writes y, the backward reads x and the gradient twice and writes that of x; the ReLU
    takes no pass of its own. Statistics and sums are in fp32 (fp64 for fp64), by Welford's way and in fixed order: the
    same bits in every run.

    Args:
        x: (B, N, C), tokens of any float dtype and strides; at least two for each channel.
        weight: (C,), as bias of any float dtype.
        bias: (C,).
        eps: Added to the variance.
        relu: Whether a ReLU follows.
        running: ``running_mean`` and ``running_var`` (C,) and ``num_batches_tracked`` of a BatchNorm, contiguous, which
            are updated in place; None for none.
        momentum: Share of this batch in the running statistics, of the variance that over N - 1.
        backend: As for :func:`cpe_norm`.

    Returns:
        (B, N, C) contiguous in x's dtype, under autocast too.

    Raises:
        ValueError: Shapes or options that do not fit; the message says expected and got.
        RuntimeError: ``backend='triton'`` where the Triton kernels cannot run.
    """
    _check(x, weight, bias, running, backend)
    if plain_operators(x, backend) or torch.compiler.is_compiling():
        y, mean, variance = batch_norm_reference(x, weight, bias, eps=eps, relu=relu)
        _move(running, mean.detach(), variance.detach(), x.shape[0] * x.shape[1], momentum)
        return y
    return BatchNormNode.apply(x, weight, bias, running, momentum, eps, relu)
