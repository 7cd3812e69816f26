"""``mlp``: fc1, GELU, fc2 and the sum with the shortcut as one op that keeps nothing of the hidden width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops.common import as_written, autocast_dtype, plain_operators, register
from mila_mm.ops.feed_forward.reference import mlp_reference
from mila_mm.ops.rows.op import column_sum


def _by_triton(x: Tensor, forward: bool) -> bool:
    """Whether kernels of ours serve tokens x (B, N, C) of 16 bits: the forward's only where it beats cuBLAS."""
    if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
        return False
    from mila_mm.ops.triton import capability, configs

    if forward and x.shape[-1] not in configs.MLP_WIDTHS:
        return False
    return capability.why_not_stencil(x, widest=configs.MAX_ROW) is None


def _mlp_forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    shortcut: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """shortcut + scale * mlp(x), (B, N, C) contiguous in shortcut's dtype, or x's."""
    scale = None if scale is None else scale.to(x.dtype)  # as the backward multiplies with it
    if _by_triton(x, True):
        from mila_mm.ops.feed_forward import launch

        return launch.mlp_forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, shortcut, scale)
    with as_written(x):
        y = F.linear(F.gelu(F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
        if shortcut is None:
            return (y if scale is None else y * scale[:, None, None]).contiguous()
        y = shortcut + y if scale is None else torch.addcmul(shortcut, y, scale[:, None, None])
        return y.to(shortcut.dtype).contiguous()


def _mlp_backward(
    grad_y: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and the four parameters, in their dtypes, from that of y; the shortcut's is grad_y itself.

    The hidden map is computed again; two buffers of its size live meanwhile, at most.
    """
    with as_written(x):
        grad = grad_y.to(x.dtype)
        grad = grad.contiguous() if scale is None else grad * scale.to(x.dtype)[:, None, None]
        rows, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        hidden = F.linear(rows, fc1_weight, fc1_bias)
        grad_hidden = grad @ fc2_weight
        if _by_triton(x, False):
            from mila_mm.ops.feed_forward import launch

            grad_fc1_bias = launch.gelu_backward_(hidden, grad_hidden, fc1_bias.dtype)
            activated = hidden
        else:
            activated = F.gelu(hidden)
            grad_hidden = torch.ops.aten.gelu_backward(grad_hidden, hidden)
            grad_fc1_bias = column_sum(grad_hidden, fc1_bias.dtype)
        grad_x = (grad_hidden @ fc1_weight).view(x.shape)
        grad_fc1_weight, grad_fc2_weight = grad_hidden.t() @ rows, grad.t() @ activated
        return grad_x, grad_fc1_weight, grad_fc1_bias, grad_fc2_weight, column_sum(grad, fc2_bias.dtype)


def _fake_mlp_forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, shortcut, scale):
    return x.new_empty(x.shape, dtype=x.dtype if shortcut is None else shortcut.dtype)


def _fake_mlp_backward(grad_y, x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, scale):
    return tuple(t.new_empty(t.shape) for t in (x, fc1_weight, fc1_bias, fc2_weight, fc2_bias))


def _context(ctx, inputs, output):
    """Keep the inputs but the shortcut: the gradient of that is the output's."""
    *tensors, shortcut, scale = inputs
    ctx.save_for_backward(*tensors, scale)
    ctx.has_shortcut = shortcut is not None


def _differentiate(ctx, grad_y):
    grads = torch.ops.mila_mm.mlp_backward(grad_y, *ctx.saved_tensors)
    return *grads, grad_y if ctx.has_shortcut else None, None


_MLP = 'Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor fc2_weight, Tensor fc2_bias'
register(
    'mlp_forward',
    f'({_MLP}, Tensor? shortcut, Tensor? scale) -> Tensor',
    _mlp_forward,
    _fake_mlp_forward,
    differentiate=_differentiate,
    setup_context=_context,
)
register(
    'mlp_backward',
    f'(Tensor grad_y, {_MLP}, Tensor? scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    _mlp_backward,
    _fake_mlp_backward,
    once="mlp: expected one differentiation, got a second; take backend='reference' for it",
)


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    shortcut: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    backend: str = 'auto',
) -> Tensor:
    """shortcut + scale * fc2(gelu(fc1(x))) as one op; differentiable once, keeps x and the parameters alone.

    GELU is the exact one, by erf. On a CUDA GPU, in 16 bits and at the widths of
    ``mila_mm.ops.triton.configs.MLP_WIDTHS``, a Triton kernel takes the hidden units chunk by chunk, with sums in fp32;
    elsewhere PyTorch's operators do. The backward computes the hidden map again.

    Args:
        x: (B, N, C), any float dtype and strides. Under autocast x and the parameters are cast to autocast's dtype.
        fc1_weight: (hidden, C), as all parameters of x's dtype.
        fc1_bias: (hidden,).
        fc2_weight: (C, hidden).
        fc2_bias: (C,).
        shortcut: (B, N, C), added; of any float dtype, which the result takes. None for none.
        scale: (B,), what each image's branch is multiplied with (stochastic depth); gets no gradient. None for 1.
        backend: 'auto', or 'reference' for :func:`mlp_reference`.

    Returns:
        (B, N, C) in the shortcut's dtype, without one in x's, under autocast in autocast's.

    Raises:
        ValueError: Shapes or options that do not fit; the message says expected and got.
    """
    if backend not in ('auto', 'reference'):
        raise ValueError(f'mlp: expected backend to be auto or reference, got {backend!r}')
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f'mlp: expected x of shape (B, N, C) and a floating dtype, got {tuple(x.shape)}, {x.dtype}')
    hidden, channels = fc1_weight.shape[0], x.shape[2]
    shapes = {
        'fc1_weight': (fc1_weight, (hidden, channels)),
        'fc1_bias': (fc1_bias, (hidden,)),
        'fc2_weight': (fc2_weight, (channels, hidden)),
        'fc2_bias': (fc2_bias, (channels,)),
        'shortcut': (shortcut, tuple(x.shape)),
        'scale': (scale, (x.shape[0],)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f'mlp: expected {name} of shape {shape}, got {tuple(tensor.shape)}')
    parameters: tuple[Tensor, ...] = (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if (low := autocast_dtype(x.device.type)) is not None and x.dtype != torch.float64:
        x, parameters = x.to(low), tuple(parameter.to(low) for parameter in parameters)
    if any(parameter.dtype != x.dtype for parameter in parameters):
        raise ValueError(f'mlp: expected parameters of dtype {x.dtype}, as x is, got {[p.dtype for p in parameters]}')
    if plain_operators(x, backend):
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = parameters
        return mlp_reference(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, shortcut, scale)
    return torch.ops.mila_mm.mlp_forward(x, *parameters, shortcut, scale)
