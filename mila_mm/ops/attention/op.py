"""``mila_attention``: the public function, the choice of a backend, and the registered op behind it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from mila_mm.ops.attention import closed_form
from mila_mm.ops.attention.reference import mila_attention_reference
from mila_mm.ops.common import (
    BACKENDS,
    as_written,
    autocast_dtype,
    check_map,
    plain_operators,
    register,
)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _kernels(qk: Tensor, v: Tensor, num_heads: int, spatial_shape: tuple[int, int]):
    """Return the module whose ``attention_forward`` and ``attention_backward`` serve these tensors."""
    if v.is_cuda:
        from mila_mm.ops.triton import capability

        if capability.why_not(qk, v, num_heads, spatial_shape) is None:
            from mila_mm.ops.attention import launch

            return launch
        capability.warn_of_what_is_missing(v.device)
    return closed_form


def why_not_triton(qk: Tensor, v: Tensor, num_heads: int, spatial_shape: tuple[int, int] | None = None) -> str | None:
    """Return None where the Triton kernels can run on these tensors, else one line with what was expected and got.

    Without a ``spatial_shape`` nothing is asked of the map, whose sides have a limit too (65,535 tokens).
    """
    if not v.is_cuda:
        return f'expected CUDA tensors, got {v.device.type}'
    from mila_mm.ops.triton import capability

    return capability.why_not(qk, v, num_heads, spatial_shape)


def _forward(
    qk: Tensor,
    v: Tensor,
    lepe_weight: Tensor | None,
    lepe_bias: Tensor | None,
    gate: Tensor | None,
    height: int,
    width: int,
    num_heads: int,
    eps: float,
    rope_base: float,
) -> tuple[Tensor, Tensor, Tensor]:
    with as_written(v):
        results = _kernels(qk, v, num_heads, (height, width)).attention_forward(
            qk, v, lepe_weight, lepe_bias, gate, height, width, num_heads, eps, rope_base
        )
    return tuple(x.contiguous() for x in results)  # as the fake kernel says, whatever the strides of the inputs


def _backward(
    grad_y: Tensor,
    qk: Tensor,
    v: Tensor,
    lepe_weight: Tensor | None,
    lepe_bias: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
    key_mean: Tensor,
    height: int,
    width: int,
    num_heads: int,
    eps: float,
    rope_base: float,
) -> tuple[Tensor, ...]:
    with as_written(v):
        grads = _kernels(qk, v, num_heads, (height, width)).attention_backward(
            grad_y, qk, v, lepe_weight, lepe_bias, gate, state, key_mean, height, width, num_heads, eps, rope_base
        )
    # An op returns tensors only: an empty one stands for the gradient of an input that was not given.
    return tuple(v.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _fake_forward(qk, v, lepe_weight, lepe_bias, gate, height, width, num_heads, eps, rope_base):
    batch, tokens, channels = v.shape
    d = channels // num_heads
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    return (
        v.new_empty(batch, tokens, channels),
        v.new_empty(batch, num_heads, d, d, dtype=dtype),
        v.new_empty(batch, num_heads, d, dtype=dtype),
    )


def _fake_backward(
    grad_y, qk, v, lepe_weight, lepe_bias, gate, state, key_mean, height, width, num_heads, eps, rope_base
):
    def like(x: Tensor | None) -> Tensor:
        return v.new_empty(0) if x is None else x.new_empty(x.shape)

    return like(qk), like(v), like(lepe_weight), like(lepe_bias), like(gate)


def _setup_context(ctx, inputs, output):
    """Keep what the backward needs: the inputs, the state and the key mean; nothing more of an activation's size."""
    _, state, key_mean = output
    ctx.mark_non_differentiable(state, key_mean)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], state, key_mean)
    ctx.options = inputs[5:]


def _differentiate(ctx, grad_y, *_):
    if grad_y is None:
        return (None,) * 10
    saved = ctx.saved_tensors  # once: under activation checkpointing each access recomputes
    grads = torch.ops.mila_mm.attention_backward(grad_y, *saved, *ctx.options)
    given = [x is not None for x in saved[:5]]
    return *(grad if there else None for grad, there in zip(grads, given, strict=True)), *(None,) * 5


_INPUTS = 'Tensor qk, Tensor v, Tensor? lepe_weight, Tensor? lepe_bias, Tensor? gate'
_OPTIONS = 'SymInt height, SymInt width, int num_heads, float eps, float rope_base'
register(
    'attention_forward',
    f'({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)',
    _forward,
    _fake_forward,
    differentiate=_differentiate,
    setup_context=_setup_context,
)
register(
    'attention_backward',
    f'(Tensor grad_y, {_INPUTS}, Tensor state, Tensor key_mean, {_OPTIONS}) '
    '-> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    _backward,
    _fake_backward,
    once=closed_form.NO_SECOND_ORDER,
)


def _fail(expected: str, got: object) -> None:
    """Messages are made only when needed: printing a size would pin it in a program compiled for any size."""
    raise ValueError(f'mila_attention: expected {expected}, got {got}')


def _check(qk: Tensor, v: Tensor, spatial_shape: tuple[int, int], num_heads: int, backend: str) -> None:
    """Raise ValueError, with what was expected and got, where these do not fit together."""
    if backend not in BACKENDS:
        _fail(f'backend to be one of {", ".join(BACKENDS)}', repr(backend))
    if v.dim() != 3:
        _fail('v of shape (B, N, C); images (B, C, H, W) are v.flatten(2).transpose(1, 2)', tuple(v.shape))
    batch, tokens, channels = v.shape
    check_map('mila_attention', 'v', tokens, spatial_shape)
    if qk.dim() != 3 or qk.shape[0] != batch or qk.shape[1] != tokens or qk.shape[2] != 2 * channels:
        _fail(f'qk of shape (B, N, 2C) = {(batch, tokens, 2 * channels)} to go with v', tuple(qk.shape))
    if channels % 4:
        _fail('a width C divisible by 4 (RoPE turns pairs of channels on two axes)', channels)
    if not isinstance(num_heads, int):
        _fail('num_heads to be an integer', repr(num_heads))
    if num_heads < 1 or channels % num_heads:
        _fail(f'num_heads to divide the width {channels}', num_heads)
    if qk.dtype != v.dtype or v.dtype not in _DTYPES:
        _fail('qk and v both fp16, bf16, fp32 or fp64', (qk.dtype, v.dtype))
    if qk.device != v.device:
        _fail('qk and v on one device', (qk.device, v.device))


def _check_rest(v: Tensor, lepe_weight: Tensor | None, lepe_bias: Tensor | None, gate: Tensor | None) -> None:
    """The same for what need not be given."""
    channels = v.shape[2]
    if (lepe_weight is None) != (lepe_bias is None):
        _fail('lepe_weight and lepe_bias, or neither', 'one of them')
    if lepe_weight is not None and tuple(lepe_weight.shape) != (channels, 1, 3, 3):
        _fail(f'lepe_weight of shape {(channels, 1, 3, 3)}', tuple(lepe_weight.shape))
    if lepe_bias is not None and tuple(lepe_bias.shape) != (channels,):
        _fail(f'lepe_bias of shape {(channels,)}', tuple(lepe_bias.shape))
    dtypes = [x.dtype for x in (lepe_weight, lepe_bias) if x is not None]
    if not all(dtype.is_floating_point for dtype in dtypes):
        _fail('lepe_weight and lepe_bias of floating dtypes', tuple(dtypes))
    if gate is not None and gate.shape != v.shape:
        _fail(f'gate of the shape of v, {tuple(v.shape)}', tuple(gate.shape))
    if gate is not None and gate.dtype != v.dtype:
        _fail(f'gate of the dtype of v, {v.dtype}', gate.dtype)


def _eager_on_cpu(v: Tensor) -> bool:
    """True where nothing has to see one op: plain tensors, and neither a compiler nor a mode that watches."""
    plain = v.device.type == 'cpu' and type(v) is Tensor and v.dtype in (torch.float32, torch.float64)
    watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return plain and torch.is_grad_enabled() and not watched


def mila_attention(
    qk: Tensor,
    v: Tensor,
    lepe_weight: Tensor | None,
    lepe_bias: Tensor | None,
    spatial_shape: tuple[int, int],
    num_heads: int,
    gate: Tensor | None = None,
    *,
    eps: float = 1e-6,
    rope_base: float = 10000.0,
    backend: str = 'auto',
) -> Tensor:
    """The attention of a MILA block: everything between the qk projection and the output projection.

    Computes ``(z * rope(f(q)) @ (rope(f(k))^T v / N) + lepe(v)) * silu(gate)`` per head with f = elu + 1 and
    z = 1 / (f(q) . mean f(k) + eps), the normaliser without RoPE (MILA, arXiv 2405.16605, section 4). For 16-bit inputs
    accumulation, RoPE tables and the normaliser are in fp32. Differentiable once in every tensor argument; for higher
    orders take ``backend='reference'``, as ``torch.func`` does by itself.

    Args:
        qk: (B, N, 2C), as it leaves the Linear, q first; fp16, bf16, fp32 or fp64. Under autocast, qk, v and gate are
            cast to autocast's dtype.
        v: (B, N, C), of qk's dtype.
        lepe_weight: (C, 1, 3, 3), the depthwise convolution on v; any floating dtype (fp32 master weights, say). None,
            with lepe_bias, for no LePE.
        lepe_bias: (C,), or None.
        spatial_shape: (H, W) with N = H * W, tokens row by row.
        num_heads: Heads; C must be a multiple of it, and of 4.
        gate: (B, N, C) before its SiLU, or None for no gate.
        eps: Added to the normaliser.
        rope_base: Base of RoPE's frequencies.
        backend: 'auto' takes the Triton kernels where they can run and the closed form of the reference elsewhere;
            'triton' raises where they cannot run; 'reference' is :func:`mila_attention_reference`.

    Returns:
        (B, N, C) in v's dtype; under autocast in autocast's.

    Raises:
        ValueError: Shapes, dtypes or options that do not fit; the message says expected and got.
        RuntimeError: ``backend='triton'`` where the Triton kernels cannot run.
    """
    device = v.device.type
    if (dtype := autocast_dtype(device)) is not None and v.dtype != torch.float64:
        qk, v, gate = qk.to(dtype), v.to(dtype), None if gate is None else gate.to(dtype)
    _check(qk, v, spatial_shape, num_heads, backend)
    _check_rest(v, lepe_weight, lepe_bias, gate)
    if backend == 'triton' and (reason := why_not_triton(qk, v, num_heads, spatial_shape)) is not None:
        raise RuntimeError(f"mila_attention: backend='triton' cannot run here: {reason}; take backend='auto'")
    # A trace, for ONNX or for counting operations, and torch.func need plain operators; other devices have no kernel.
    if plain_operators(v, backend):
        return mila_attention_reference(
            qk, v, lepe_weight, lepe_bias, spatial_shape, num_heads, gate, eps=eps, rope_base=rope_base
        )
    args = (qk, v, lepe_weight, lepe_bias, gate, *spatial_shape, num_heads, eps, rope_base)
    if _eager_on_cpu(v):
        return closed_form.ClosedFormAttention.attend(*args)
    return torch.ops.mila_mm.attention_forward(*args)[0]
