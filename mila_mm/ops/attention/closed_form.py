"""Forward and backward of ``mila_attention`` in closed form: the CPU kernel of the registered op.

The same mathematics as :mod:`mila_mm.ops.attention.reference`, with few passes over memory and a backward that needs
only what the caller holds anyway (qk, v, gate) and, per head, a d x d state and a mean key. It runs on any device. An
infinity or a NaN stays in its image, but not in its head as it does there: sums over heads are products with zeros for
the others.

Notation, per batch and head, f = elu + 1, R_n the rotation at token n, N tokens::

    k^ = f(k), k~ = R k^, q^ = f(q), q~ = R q^        S = (1/N) sum_n k~_n^T v_n,   m = (1/N) sum_n k^_n
    z_n = 1 / (q^_n . m + eps)                        o_n = z_n q~_n S + lepe(v)_n, y_n = o_n silu(g_n)

and, from dy, with do = dy silu(g), r_n = z_n do_n S^T and e_n = -z_n <q~_n, r_n>::

    dq_n = (R_n^T r_n + e_n m) f'(q_n)                dS = (1/N) sum_n q~_n^T z_n do_n,  dm = (1/N) sum_n e_n q^_n
    dk_n = (R_n^T (v_n dS^T) + dm) f'(k_n)            dv_n = k~_n dS + lepe^T(do)_n
    dg_n = dy_n o_n silu'(g_n)                        f'(x) = min(f(x), 1)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mila_mm.ops.common import compute_dtype, to_image
from mila_mm.ops.rope import rope_grid, to_device

NO_SECOND_ORDER = "mila_attention: expected one differentiation, got a second; take backend='reference' for it"
Options = tuple[int, int, int, float, float]  # height, width, num_heads, eps, rope_base
BAND = 2**18
"""Elements of v that large maps are taken by, where nothing is kept for a backward: what is computed between input and
result then stays in a core's cache, in memory that is not asked for anew, and time grows with the tokens alone."""


def _feature_map(x: Tensor, dtype: torch.dtype) -> Tensor:
    """elu + 1 as exp(min(x, 0)) + max(x, 0), in a new contiguous buffer."""
    x = x.contiguous()  # the rotation sees pairs of adjacent channels as complex numbers
    return x.clamp(max=0).to(dtype).exp_().add_(x.clamp(min=0))


def _rotate(x: Tensor, grid: Tensor, out: Tensor | None = None) -> Tensor:
    """Turn the pairs of x (B, N, halves, C), in one pass: a pair times (cos + i sin) as a complex product."""
    out = torch.empty_like(x) if out is None else out
    pairs, turned = (torch.view_as_complex(t.unflatten(-1, (-1, 2))) for t in (x, out))
    torch.mul(pairs, torch.view_as_complex(grid)[:, None], out=turned)
    return out


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, d), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b for each head, or out += a @ b; (B, heads, ..) each, strided as they come."""
    # Image by image: batch and heads of such a view are not one axis, and a matmul of the four would copy both.
    for x, y, z in zip(a, b, out, strict=True):
        z.baddbmm_(x, y, beta=int(add))


@lru_cache(maxsize=64)
def _members(num_heads: int, channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(heads, C) of ones where a channel belongs to a head: x @ its transpose sums x over each head.

    One product instead of an elementwise walk in steps of d channels, which PyTorch does not vectorise well.
    """
    with torch.inference_mode(False):
        members = torch.eye(num_heads, dtype=dtype, device='cpu').repeat_interleave(channels // num_heads, dim=1)
        return to_device(members, device)


def _spread(key_mean: Tensor) -> Tensor:
    """m (B, heads, d) as (B, heads, C), zero where a channel belongs to another head."""
    batch, num_heads, d = key_mean.shape
    return _members(num_heads, num_heads * d, key_mean.dtype, key_mean.device) * key_mean.view(batch, 1, num_heads * d)


def _normaliser(q: Tensor, key_mean: Tensor, eps: float) -> Tensor:
    """z = 1 / (q^ . m + eps), (B, N, heads), from q^ (B, N, C) and m (B, heads, d)."""
    return (q @ _spread(key_mean).transpose(1, 2)).add_(eps).reciprocal_()


def _over_heads(z: Tensor) -> Tensor:
    """(B, N, heads) -> (B, heads, N, 1), a view."""
    return z.transpose(1, 2).unsqueeze(-1)


def _lepe(v: Tensor, weight: Tensor | None, bias: Tensor | None, height: int, width: int) -> Tensor:
    """Depthwise 3x3 over the grid, or zeros without a weight: (B, N, C), contiguous, in memory of its own."""
    if weight is None:
        return torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    bias = None if bias is None else bias.to(v.dtype)
    out = F.conv2d(to_image(v, height, width), weight.to(v.dtype), bias, padding=1, groups=v.shape[-1])
    return out.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _attend(
    features: Tensor, values: Tensor, lepe_weight: Tensor | None, lepe_bias: Tensor | None, options: Options, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute o (B, N, C) before its gate, S, m and z from f(qk) (B, N, 2, C), which is left alone only if ``keep``."""
    height, width, num_heads, eps, rope_base = options
    tokens, channels = values.shape[1:]
    key_mean = features[:, :, 1].mean(dim=1).unflatten(-1, (num_heads, -1))
    z = _normaliser(features[:, :, 0], key_mean, eps)
    grid = rope_grid(height, width, channels, rope_base, values.device, values.dtype)
    rotated = _rotate(features, grid, out=None if keep else features)
    rotated_q, rotated_k = (_heads(rotated[:, :, i], num_heads) for i in (0, 1))
    state = rotated_k.transpose(-2, -1) @ _heads(values, num_heads)
    state /= tokens
    out = _lepe(values, lepe_weight, lepe_bias, height, width)
    _multiply(rotated_q.mul_(_over_heads(z)), state, _heads(out, num_heads), add=True)
    return out, state, key_mean, z


def _differentiate(
    grad_y: Tensor,
    features: Tensor,
    values: Tensor,
    lepe_weight: Tensor | None,
    lepe_bias: Tensor | None,
    gate: Tensor | None,
    out: Tensor | None,
    state: Tensor,
    key_mean: Tensor,
    z: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute all gradients in the dtype of ``values``; ``out`` is o, or None to compute it again where needed."""
    height, width, num_heads, _, rope_base = options
    tokens, channels = values.shape[1:]
    table = height, width, channels, rope_base, values.device, values.dtype
    members = _members(num_heads, channels, values.dtype, values.device)
    rotated = _rotate(features, rope_grid(*table))
    rotated_q, rotated_k = (_heads(rotated[:, :, i], num_heads) for i in (0, 1))

    grad_gate, grad_out = None, grad_y
    if gate is not None:
        if out is None:
            out = _lepe(values, lepe_weight, lepe_bias, height, width)
            _multiply(rotated_q * _over_heads(z), state, _heads(out, num_heads), add=True)
        grad_gate = torch.ops.aten.silu_backward(out * grad_y, gate)
        grad_out = F.silu(gate).mul_(grad_y)
    grad_out = grad_out.contiguous()

    scaled = _heads(grad_out, num_heads) * _over_heads(z)  # z do
    grad_qk = torch.empty_like(features)
    grad_q, grad_k = (_heads(grad_qk[:, :, i], num_heads) for i in (0, 1))
    _multiply(scaled, state.transpose(-2, -1), grad_q)  # r
    e = ((rotated[:, :, 0] * grad_qk[:, :, 0]) @ members.t()).mul_(z).neg_()  # (B, N, heads)
    grad_state = rotated_q.transpose(-2, -1) @ scaled / tokens
    _multiply(_heads(values, num_heads), grad_state.transpose(-2, -1), grad_k)
    _rotate(grad_qk, rope_grid(*table, inverse=True), out=grad_qk)
    grad_mean = (e.transpose(1, 2).unsqueeze(2) @ _heads(features[:, :, 0], num_heads)).flatten(1) / tokens  # (B, C)
    grad_qk[:, :, 0].baddbmm_(e, _spread(key_mean))
    grad_qk[:, :, 1] += grad_mean[:, None]

    grad_weight = grad_bias = None
    if lepe_weight is None:
        grad_v = torch.zeros_like(values, memory_format=torch.contiguous_format)
    else:
        grad_v, grad_weight, grad_bias = _lepe_gradients(grad_out, values, lepe_weight, height, width)
    _multiply(rotated_k, grad_state, _heads(grad_v, num_heads), add=True)
    # f'(x) = min(f(x), 1), into the memory of what is used up.
    grad_qk.mul_(torch.clamp(features, max=1, out=rotated))
    return grad_qk.flatten(2), grad_v, grad_weight, grad_bias, grad_gate


def _lepe_gradients(
    grad: Tensor, values: Tensor, weight: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of the values (B, N, C), weight and bias of the depthwise 3x3 convolution over the map."""
    channels = values.shape[-1]
    grad_image, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        to_image(grad, height, width), to_image(values, height, width), weight.to(values.dtype),
        [channels], [1, 1], [1, 1], [1, 1], False, [0, 0], channels, [True, True, True],
    )  # fmt: skip
    return grad_image.permute(0, 2, 3, 1).flatten(1, 2), grad_weight, grad_bias


def attention_forward(
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
    """Compute y (B, N, C) in v's dtype, and in fp32 (fp64 for fp64 inputs) S (B, heads, d, d) and m (B, heads, d)."""
    dtype = compute_dtype(v)
    options = height, width, num_heads, eps, rope_base
    if v.device.type == 'cpu' and v.shape[1] * v.shape[2] > 4 * BAND:
        return _attend_in_bands(qk, v, lepe_weight, lepe_bias, gate, options)
    features = _feature_map(qk, dtype).unflatten(-1, (2, v.shape[-1]))
    out, state, key_mean, _ = _attend(features, v.to(dtype), lepe_weight, lepe_bias, options, keep=False)
    if gate is not None:
        out *= F.silu(gate.to(dtype))
    return out.to(v.dtype), state, key_mean


def _attend_in_bands(
    qk: Tensor, v: Tensor, lepe_weight: Tensor | None, lepe_bias: Tensor | None, gate: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same y, S and m, some tokens at a time: all keys' sums first, then each query's result."""
    height, width, num_heads, eps, rope_base = options
    batch, tokens, channels = v.shape
    dtype, head_width = compute_dtype(v), channels // num_heads
    grid = rope_grid(height, width, channels, rope_base, v.device, dtype)
    step = max(1, BAND // channels)
    bands = [slice(first, first + step) for first in range(0, tokens, step)]

    state = torch.zeros(batch, num_heads, head_width, head_width, dtype=dtype, device=v.device)
    key_sum = state.new_zeros(batch, channels)
    for band in bands:
        keys = _feature_map(qk[:, band, channels:], dtype).unsqueeze(2)
        key_sum += keys.sum(dim=(1, 2))
        _rotate(keys, grid[band], out=keys)
        _multiply(_heads(keys[:, :, 0], num_heads).mT, _heads(v[:, band].to(dtype), num_heads), state, add=True)
    state /= tokens
    key_mean = (key_sum / tokens).unflatten(-1, (num_heads, -1))

    out = _lepe(v.to(dtype), lepe_weight, lepe_bias, height, width)
    for band in bands:
        queries = _feature_map(qk[:, band, :channels], dtype).unsqueeze(2)
        z = _normaliser(queries[:, :, 0], key_mean, eps)
        rotated = _heads(_rotate(queries, grid[band], out=queries)[:, :, 0], num_heads)
        part = out[:, band]
        _multiply(rotated.mul_(_over_heads(z)), state, _heads(part, num_heads), add=True)
        if gate is not None:
            part.mul_(F.silu(gate[:, band].to(dtype)))
    return out.to(v.dtype), state, key_mean


def attention_backward(
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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of qk (one buffer, (B, N, 2C)), v, lepe_weight, lepe_bias and gate, each in its dtype."""
    dtype = state.dtype
    features = _feature_map(qk, dtype).unflatten(-1, (2, v.shape[-1]))
    grad_qk, grad_v, grad_weight, grad_bias, grad_gate = _differentiate(
        grad_y.to(dtype),
        features,
        v.to(dtype),
        lepe_weight,
        lepe_bias,
        None if gate is None else gate.to(dtype),
        None,
        state,
        key_mean,
        _normaliser(features[:, :, 0], key_mean, eps),
        (height, width, num_heads, eps, rope_base),
    )
    return (
        grad_qk.to(qk.dtype),
        grad_v.to(v.dtype),
        _in_dtype_of(lepe_weight, grad_weight),
        _in_dtype_of(lepe_bias, grad_bias),
        _in_dtype_of(gate, grad_gate),
    )


def _in_dtype_of(given: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Return the gradient of what was given; None where nothing was."""
    return None if given is None or grad is None else grad.to(given.dtype)


class _FirstOrderOnly(torch.autograd.Function):
    """The identity of its first argument, which cannot be differentiated with respect to any of them."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(NO_SECOND_ORDER)


class ClosedFormAttention(torch.autograd.Function):
    """The same for eager training in fp32 or fp64, where memory is cheaper than time: on a CPU.

    It keeps f(qk) in place of qk, and o and z, so that the backward computes none of them again, for one more
    activation of the size of v.
    """

    @classmethod
    def attend(cls, qk: Tensor, *rest: Tensor | float | None) -> Tensor:
        """Compute y (B, N, C) from the arguments of the registered op."""
        # Nothing of qk is kept; a second differentiation finds it through this copy of none of its numbers.
        return cls.apply(qk[:, :0].clone(), qk, *rest)

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        qk: Tensor,
        v: Tensor,
        lepe_weight: Tensor | None,
        lepe_bias: Tensor | None,
        gate: Tensor | None,
        *options: Any,
    ) -> Tensor:
        """Compute y (B, N, C); ``source`` stands for qk where the gradients are differentiated."""
        features = _feature_map(qk, qk.dtype).unflatten(-1, (2, v.shape[-1]))
        out, *rest = _attend(features, v, lepe_weight, lepe_bias, options, keep=True)
        ctx.options = options
        kept = None if gate is None else out
        ctx.save_for_backward(source, features, v, lepe_weight, lepe_bias, gate, kept, *rest)
        return out if gate is None else F.silu(gate).mul_(out)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the five tensors."""
        # once: under activation checkpointing each access recomputes
        source, features, v, lepe_weight, lepe_bias, gate, out, state, key_mean, z = ctx.saved_tensors
        with torch.no_grad(), torch.autocast('cpu', enabled=False):
            grad_qk, grad_v, grad_weight, grad_bias, grad_gate = _differentiate(
                grad_y, features, v, lepe_weight, lepe_bias, gate, out, state, key_mean, z, ctx.options
            )
            grad_weight, grad_bias = _in_dtype_of(lepe_weight, grad_weight), _in_dtype_of(lepe_bias, grad_bias)
        grads: list[Tensor | None] = [grad_qk, grad_v, grad_weight, grad_bias, grad_gate]
        if torch.is_grad_enabled():  # create_graph=True
            sources = (grad_y, source, v, lepe_weight, lepe_bias, gate)
            grads = [None if grad is None else _FirstOrderOnly.apply(grad, *sources) for grad in grads]
        return None, *grads, *(None,) * len(ctx.options)
