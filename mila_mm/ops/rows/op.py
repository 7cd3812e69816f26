"""``column_sum``, the gradient of a bias, and ``layer_norm``, which writes what comes next reads: 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from mila_mm.ops.common import BACKENDS, as_written, autocast_dtype, compute_dtype, plain_operators, register
from mila_mm.ops.rows.reference import column_sum_reference, layer_norm_reference


def column_sum(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Sum over all tokens: the gradient of a Linear's bias from that of its result.

    PyTorch's own reduction over the rows of a tall matrix takes about 15 times as long as reading it. A plain function
    without autograd or registration, for the inside of an autograd.Function or a registered op. Where the kernel cannot
    run (no CUDA, fp64, a trace), PyTorch's sum in fp32 (fp64 for fp64) does; either is rounded once.

    Args:
        x: (..., C), any strides: half of a joint gradient is read in place.
        dtype: Of the result. Defaults to x's.

    Returns:
        (C,) contiguous; the same bits in every run, on every GPU, whatever the strides of x.
    """
    dtype = x.dtype if dtype is None else dtype
    if x.is_cuda and x.dtype != torch.float64:
        from mila_mm.ops.triton import capability

        if capability.why_not_rows(x) is None:
            from mila_mm.ops.rows import launch

            return launch.column_sum(x, dtype)
    if x.device.type == 'cpu' and dtype == x.dtype:
        return x.reshape(-1, x.shape[-1]).sum(0)  # PyTorch sums 16 bits in fp32 by itself
    return column_sum_reference(x, dtype)


def _norm_by_triton(x: Tensor) -> bool:
    """Whether the Triton kernels of the LayerNorm serve x (B, N, C)."""
    if not x.is_cuda:
        return False
    from mila_mm.ops.triton import capability

    if capability.why_not_stencil(x) is None:
        return True
    capability.warn_of_what_is_missing(x.device)
    return False


def _layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, N, C) of ``dtype``, mean and rstd (B, N) in fp32 (fp64 for fp64): what the backward takes."""
    if _norm_by_triton(x):
        from mila_mm.ops.rows import launch

        return launch.layer_norm_forward(x, weight, bias, eps, dtype)
    compute = compute_dtype(x)
    with as_written(x):
        y, mean, rstd = torch.native_layer_norm(x.to(compute), x.shape[-1:], weight.to(compute), bias.to(compute), eps)
    return y.to(dtype).contiguous(), mean.squeeze(-1).contiguous(), rstd.squeeze(-1).contiguous()


def _layer_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in the dtype of its input."""
    if _norm_by_triton(x):
        from mila_mm.ops.rows import launch

        return launch.layer_norm_backward(grad_y, x, mean, rstd, weight, bias, None, x.dtype)
    compute = mean.dtype
    with as_written(x):
        grads = torch.ops.aten.native_layer_norm_backward(
            grad_y.to(compute).contiguous(),
            x.to(compute),
            x.shape[-1:],
            mean.unsqueeze(-1),
            rstd.unsqueeze(-1),
            weight.to(compute),
            bias.to(compute),
            [True, True, True],
        )
    return tuple(grad.to(given.dtype).contiguous() for grad, given in zip(grads, (x, weight, bias), strict=True))


def _fake_layer_norm_forward(x, weight, bias, eps, dtype):
    compute = compute_dtype(x)
    statistics = x.new_empty(x.shape[:2], dtype=compute), x.new_empty(x.shape[:2], dtype=compute)
    return x.new_empty(x.shape, dtype=dtype), *statistics


def _fake_layer_norm_backward(grad_y, x, weight, bias, mean, rstd):
    return tuple(t.new_empty(t.shape) for t in (x, weight, bias))


def _layer_norm_context(ctx, inputs, output):
    """Keep the inputs and two numbers a token."""
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # of mean and rstd there are none, and none are to be made up
    ctx.save_for_backward(*inputs[:3], mean, rstd)


def _layer_norm_differentiate(ctx, grad_y, *_):
    return *torch.ops.mila_mm.layer_norm_backward(grad_y, *ctx.saved_tensors), None, None


_LAYER_NORM = 'Tensor x, Tensor weight, Tensor bias'
register(
    'layer_norm_forward',
    f'({_LAYER_NORM}, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)',
    _layer_norm_forward,
    _fake_layer_norm_forward,
    differentiate=_layer_norm_differentiate,
    setup_context=_layer_norm_context,
)
register(
    'layer_norm_backward',
    f'(Tensor grad_y, {_LAYER_NORM}, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)',
    _layer_norm_backward,
    _fake_layer_norm_backward,
    once="layer_norm: expected one differentiation, got a second; take backend='reference' for it",
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, backend: str = 'auto') -> Tensor:
    """LayerNorm over the channels of tokens that writes the dtype of autocast at once; differentiable once.

    PyTorch's under autocast returns fp32, which what follows casts: 6 bytes a number written and read for nothing.
    Statistics and sums are in fp32 (fp64 for fp64).

    Args:
        x: (B, N, C), any float dtype and strides.
        weight: (C,), as bias of any float dtype (fp32 master weights, say).
        bias: (C,).
        eps: Added to the variance.
        backend: As for :func:`cpe_norm`.

    Returns:
        (B, N, C) contiguous in x's dtype, under autocast in autocast's.

    Raises:
        ValueError: Shapes or options that do not fit; the message says expected and got.
        RuntimeError: ``backend='triton'`` where the Triton kernels cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f'layer_norm: expected backend to be one of {", ".join(BACKENDS)}, got {backend!r}')
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(
            f'layer_norm: expected x of shape (B, N, C) and a floating dtype, got {tuple(x.shape)}, {x.dtype}'
        )
    for name, vector in (('weight', weight), ('bias', bias)):
        if tuple(vector.shape) != (x.shape[2],):
            raise ValueError(f'layer_norm: expected {name} of shape {(x.shape[2],)}, got {tuple(vector.shape)}')
    if backend == 'triton':
        from mila_mm.ops.stencil.op import why_not_triton_stencil

        if (reason := why_not_triton_stencil(x)) is not None:
            raise RuntimeError(f"layer_norm: backend='triton' cannot run here: {reason}; take backend='auto'")
    low = autocast_dtype(x.device.type)
    dtype = x.dtype if low is None or x.dtype == torch.float64 else low
    if plain_operators(x, backend):
        return layer_norm_reference(x, weight, bias, eps=eps, dtype=dtype)
    return torch.ops.mila_mm.layer_norm_forward(x, weight, bias, eps, dtype)[0]
