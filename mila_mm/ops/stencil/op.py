"""``cpe_norm`` and ``dwc_silu``: what a block does between its matrix products, each in one pass, and their references.

Both are registered ops: Triton kernels on a CUDA GPU that can run them, PyTorch's own convolutions and norms elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mila_mm.ops.common import (
    BACKENDS,
    as_written,
    autocast_dtype,
    check_map,
    compute_dtype,
    plain_operators,
    register,
)
from mila_mm.ops.stencil.reference import cpe_norm_reference, depthwise, depthwise_backward, dwc_silu_reference

_NO_SECOND_ORDER = "{}: expected one differentiation, got a second; take backend='reference' for it"
_CPE_NORM = 'Tensor x, Tensor conv_weight, Tensor conv_bias, Tensor norm_weight, Tensor norm_bias'
_DWC_SILU = 'Tensor x, Tensor weight, Tensor bias'
_SIZE = 'SymInt height, SymInt width'


def why_not_triton_stencil(x: Tensor, spatial_shape: tuple[int, int] | None = None) -> str | None:
    """Return None where the Triton kernels can run on tokens x (B, N, C), else one line, 'expected ..., got ...'.

    Without a ``spatial_shape`` nothing is asked of the map, whose sides have a limit too (65,535 tokens).
    """
    if not x.is_cuda:
        return f'expected CUDA tensors, got {x.device.type}'
    from mila_mm.ops.triton import capability

    return capability.why_not_stencil(x, spatial_shape)


def _by_triton(x: Tensor, height: int, width: int) -> bool:
    """Whether the Triton kernels serve x (B, height * width, C)."""
    if not x.is_cuda:
        return False
    from mila_mm.ops.triton import capability

    if capability.why_not_stencil(x, (height, width)) is None:
        return True
    capability.warn_of_what_is_missing(x.device)
    return False


def _cpe_norm_forward(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    height: int,
    width: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _by_triton(x, height, width):
        from mila_mm.ops.stencil import launch

        return launch.cpe_norm_forward(x, conv_weight, conv_bias, norm_weight, norm_bias, height, width, eps, dtype)
    compute = compute_dtype(x)
    with as_written(x):
        wide = x.to(compute)
        out = (wide + depthwise(wide, conv_weight, conv_bias, height, width)).to(x.dtype)
        y, mean, rstd = torch.native_layer_norm(
            out.to(compute), x.shape[-1:], norm_weight.to(compute), norm_bias.to(compute), eps
        )
    # contiguous as the fake kernel says, whatever the strides of x
    statistics = mean.squeeze(-1).contiguous(), rstd.squeeze(-1).contiguous()
    return out.contiguous(), y.to(dtype).contiguous(), *statistics


def _cpe_norm_backward(
    grad_out: Tensor,
    grad_y: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _by_triton(x, height, width):
        from mila_mm.ops.stencil import launch

        return launch.cpe_norm_backward(
            grad_out, grad_y, x, conv_weight, conv_bias, norm_weight, norm_bias, out, mean, rstd, height, width
        )
    compute = mean.dtype
    with as_written(x):
        grad, grad_gamma, grad_beta = torch.ops.aten.native_layer_norm_backward(
            grad_y.to(compute).contiguous(),
            out.to(compute),
            x.shape[-1:],
            mean.unsqueeze(-1),
            rstd.unsqueeze(-1),
            norm_weight.to(compute),
            norm_bias.to(compute),
            [True, True, True],
        )
        grad = grad + grad_out.to(compute)
        grad_x, grad_weight, grad_bias = depthwise_backward(grad, x.to(compute), conv_weight, height, width)
        grad_x += grad
    grads = (grad_x, grad_weight, grad_bias, grad_gamma, grad_beta)
    inputs = (x, conv_weight, conv_bias, norm_weight, norm_bias)
    return tuple(grad.to(given.dtype).contiguous() for grad, given in zip(grads, inputs, strict=True))


def _dwc_silu_forward(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    if _by_triton(x, height, width):
        from mila_mm.ops.stencil import launch

        return launch.dwc_silu_forward(x, weight, bias, height, width)
    return dwc_silu_reference(x, weight, bias, (height, width)).contiguous()


def _dwc_silu_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    if _by_triton(x, height, width):
        from mila_mm.ops.stencil import launch

        return launch.dwc_silu_backward(grad_y, x, weight, bias, height, width)
    compute = compute_dtype(x)
    with as_written(x):
        wide = x.to(compute)
        grad = torch.ops.aten.silu_backward(grad_y.to(compute), depthwise(wide, weight, bias, height, width))
        grad_x, grad_weight, grad_bias = depthwise_backward(grad, wide, weight, height, width)
    grad_params = grad_weight.to(weight.dtype).contiguous(), grad_bias.to(bias.dtype).contiguous()
    return grad_x.to(x.dtype).contiguous(), *grad_params


def _fake_cpe_norm_forward(x, conv_weight, conv_bias, norm_weight, norm_bias, height, width, eps, dtype):
    statistics = x.shape[:2]
    compute = compute_dtype(x)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(statistics, dtype=compute),
        x.new_empty(statistics, dtype=compute),
    )


def _fake_cpe_norm_backward(
    grad_out, grad_y, x, conv_weight, conv_bias, norm_weight, norm_bias, out, mean, rstd, height, width
):
    return tuple(t.new_empty(t.shape) for t in (x, conv_weight, conv_bias, norm_weight, norm_bias))


def _fake_dwc_silu_forward(x, weight, bias, height, width):
    return x.new_empty(x.shape)


def _fake_dwc_silu_backward(grad_y, x, weight, bias, height, width):
    return tuple(t.new_empty(t.shape) for t in (x, weight, bias))


def _cpe_norm_context(ctx, inputs, output):
    """Keep the inputs, x' and two numbers a token."""
    out, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*inputs[:5], out, mean, rstd)
    ctx.size = inputs[5:7]


def _cpe_norm_differentiate(ctx, grad_out, grad_y, *_):
    saved = ctx.saved_tensors  # once: under activation checkpointing each access recomputes
    return *torch.ops.mila_mm.cpe_norm_backward(grad_out, grad_y, *saved, *ctx.size), *(None,) * 4


def _dwc_silu_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.size = inputs[3:]


def _dwc_silu_differentiate(ctx, grad_y):
    return *torch.ops.mila_mm.dwc_silu_backward(grad_y, *ctx.saved_tensors, *ctx.size), None, None


register(
    'cpe_norm_forward',
    f'({_CPE_NORM}, {_SIZE}, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)',
    _cpe_norm_forward,
    _fake_cpe_norm_forward,
    differentiate=_cpe_norm_differentiate,
    setup_context=_cpe_norm_context,
)
register(
    'cpe_norm_backward',
    f'(Tensor grad_out, Tensor grad_y, {_CPE_NORM}, Tensor out, Tensor mean, Tensor rstd, {_SIZE}) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    _cpe_norm_backward,
    _fake_cpe_norm_backward,
    once=_NO_SECOND_ORDER.format('cpe_norm'),
)
register(
    'dwc_silu_forward',
    f'({_DWC_SILU}, {_SIZE}) -> Tensor',
    _dwc_silu_forward,
    _fake_dwc_silu_forward,
    differentiate=_dwc_silu_differentiate,
    setup_context=_dwc_silu_context,
)
register(
    'dwc_silu_backward',
    f'(Tensor grad_y, {_DWC_SILU}, {_SIZE}) -> (Tensor, Tensor, Tensor)',
    _dwc_silu_backward,
    _fake_dwc_silu_backward,
    once=_NO_SECOND_ORDER.format('dwc_silu'),
)


def _check(
    name: str, x: Tensor, weight: Tensor, vectors: dict[str, Tensor], spatial_shape: tuple[int, int], backend: str
) -> None:
    """Raise ValueError or RuntimeError, with what was expected and got; messages are made only when needed."""
    if backend not in BACKENDS:
        raise ValueError(f'{name}: expected backend to be one of {", ".join(BACKENDS)}, got {backend!r}')
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f'{name}: expected x of shape (B, N, C) and a floating dtype, got {tuple(x.shape)}, {x.dtype}')
    check_map(name, 'x', x.shape[1], spatial_shape)
    channels = x.shape[2]
    if tuple(weight.shape) != (channels, 1, 3, 3):
        raise ValueError(f'{name}: expected a weight of shape {(channels, 1, 3, 3)}, got {tuple(weight.shape)}')
    for key, vector in vectors.items():
        if vector is None:
            raise ValueError(f'{name}: expected {key} of shape {(channels,)}, got None')
        if tuple(vector.shape) != (channels,):
            raise ValueError(f'{name}: expected {key} of shape {(channels,)}, got {tuple(vector.shape)}')
    if backend == 'triton' and (reason := why_not_triton_stencil(x, spatial_shape)) is not None:
        raise RuntimeError(f"{name}: backend='triton' cannot run here: {reason}; take backend='auto'")


def cpe_norm(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    spatial_shape: tuple[int, int],
    *,
    eps: float = 1e-5,
    backend: str = 'auto',
) -> tuple[Tensor, Tensor]:
    """x' = x + depthwise 3x3 convolution of x, and y = LayerNorm(x'), as one op; differentiable once.

    Statistics and sums are in fp32 (fp64 for fp64). The Triton kernels read x once and write x', y and two numbers a
    token; the backward reads x', dx', dy, and the gradient of x' and x once more.

    Args:
        x: (B, N, C), tokens row by row; any float dtype. Under autocast x and x' keep x's dtype.
        conv_weight: (C, 1, 3, 3); like the three below of any float dtype (fp32 master weights, say).
        conv_bias: (C,).
        norm_weight: (C,).
        norm_bias: (C,).
        spatial_shape: (H, W) with N = H * W.
        eps: Of the LayerNorm.
        backend: 'auto' takes the Triton kernels where they can run and PyTorch's own elsewhere; 'triton' raises where
            they cannot; 'reference' is :func:`cpe_norm_reference`.

    Returns:
        x' (B, N, C) in x's dtype and y (B, N, C) in x's dtype, under autocast in autocast's.

    Raises:
        ValueError: Shapes or options that do not fit; the message says expected and got.
        RuntimeError: ``backend='triton'`` where the Triton kernels cannot run.
    """
    vectors = {'conv_bias': conv_bias, 'norm_weight': norm_weight, 'norm_bias': norm_bias}
    _check('cpe_norm', x, conv_weight, vectors, spatial_shape, backend)
    low = autocast_dtype(x.device.type)
    dtype = x.dtype if low is None or x.dtype == torch.float64 else low
    tensors = (x, conv_weight, conv_bias, norm_weight, norm_bias)
    if plain_operators(x, backend):
        return cpe_norm_reference(*tensors, spatial_shape, eps=eps, dtype=dtype)
    return torch.ops.mila_mm.cpe_norm_forward(*tensors, *spatial_shape, eps, dtype)[:2]


def dwc_silu(
    x: Tensor, weight: Tensor, bias: Tensor, spatial_shape: tuple[int, int], *, backend: str = 'auto'
) -> Tensor:
    """SiLU of a depthwise 3x3 convolution as one op; differentiable once, keeps nothing but its inputs.

    Args:
        x: (B, N, C), tokens row by row; any float dtype, and any strides: half of a wider projection is read in
            place. Under autocast cast to autocast's dtype.
        weight: (C, 1, 3, 3), of any float dtype.
        bias: (C,), of any float dtype.
        spatial_shape: (H, W) with N = H * W.
        backend: As for :func:`cpe_norm`.

    Returns:
        (B, N, C) in x's dtype; under autocast in autocast's.

    Raises:
        ValueError: Shapes or options that do not fit; the message says expected and got.
        RuntimeError: ``backend='triton'`` where the Triton kernels cannot run.
    """
    _check('dwc_silu', x, weight, {'bias': bias}, spatial_shape, backend)
    if (low := autocast_dtype(x.device.type)) is not None and x.dtype != torch.float64:
        x = x.to(low)
    if plain_operators(x, backend):
        return dwc_silu_reference(x, weight, bias, spatial_shape)
    return torch.ops.mila_mm.dwc_silu_forward(x, weight, bias, *spatial_shape)
