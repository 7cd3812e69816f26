"""Forward and backward of ``mila_attention`` in closed form: the CPU kernel of the registered op.

The same mathematics as :mod:`mila_mm.ops.reference`, with few passes over memory and a backward that needs only what
the caller holds anyway (qk, v, gate) and, per head, a d x d state and a mean key. It runs on any device.

Notation, per batch and head, f = elu + 1, R_n the rotation at token n, N tokens::

    k^ = f(k), k~ = R k^, q^ = f(q), q~ = R q^        S = (1/N) sum_n k~_n^T v_n,   m = (1/N) sum_n k^_n
    z_n = 1 / (q^_n . m + eps),   P_n = z_n q~_n      o_n = P_n S + lepe(v)_n,      y_n = o_n silu(g_n)

and, from dy, with do = dy silu(g), r_n = do_n S^T and e_n = -z_n <P_n, r_n>::

    dq_n = (R_n^T z_n r_n + e_n m) f'(q_n)            dS = (1/N) sum_n P_n^T do_n,  dm = (1/N) sum_n e_n q^_n
    dk_n = (R_n^T (v_n dS^T) + dm) f'(k_n)            dv_n = k~_n dS + lepe^T(do)_n
    dg_n = dy_n o_n silu'(g_n)                        f'(x) = min(f(x), 1)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .rope import rope_grid


def _feature_map(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """elu + 1 as exp(min(x, 0)) + max(x, 0), and its slope, the first of the two; in new buffers of their own."""
    slope = x.clamp(max=0).to(dtype).exp_()
    return x.clamp(min=0).to(dtype).add_(slope), slope


def _rotate_(x: Tensor, grid: Tensor) -> Tensor:
    """Turn the pairs of x (B, N, halves, C) in place, in one pass: a pair times (cos + i sin) as a complex product."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    pairs.mul_(torch.view_as_complex(grid)[:, None])
    return x


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, heads, N, d), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _members(num_heads: int, like: Tensor) -> Tensor:
    """(heads, C) of ones where a channel belongs to a head: x @ it repeats, x @ its transpose sums, over a head.

    Both are one product instead of an elementwise walk in steps of d channels, which PyTorch does not vectorise well.
    """
    width = like.shape[-1] // num_heads
    return torch.eye(num_heads, dtype=like.dtype, device=like.device).repeat_interleave(width, dim=1)


def _normaliser(q: Tensor, key_mean: Tensor, eps: float) -> Tensor:
    """z = 1 / (q^ . m + eps), (B, N, heads), from q (B, N, C) and m (B, heads, d)."""
    members = _members(key_mean.shape[1], q)
    return (q @ (members * key_mean.flatten(1)[:, None]).transpose(1, 2)).add_(eps).reciprocal_()


def _lepe(v: Tensor, weight: Tensor | None, bias: Tensor | None, height: int, width: int) -> Tensor:
    """Depthwise 3x3 over the grid, or zeros without a weight: (B, N, C), contiguous, in memory of its own."""
    if weight is None:
        return torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    image = v.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    out = F.conv2d(image, weight.to(v.dtype), bias.to(v.dtype), padding=1, groups=v.shape[-1])
    return out.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def attention_forward(qk: Tensor, v: Tensor, lepe_weight: Tensor | None, lepe_bias: Tensor | None,
                      gate: Tensor | None, height: int, width: int, num_heads: int, eps: float,
                      rope_base: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y (B, N, C) in v's dtype, and in fp32 (fp64 for fp64 inputs) S (B, heads, d, d) and m (B, heads, d)."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    tokens, channels = v.shape[1:]
    features = _feature_map(qk, dtype)[0].unflatten(-1, (2, channels))
    values = v.to(dtype)
    key_mean = features[:, :, 1].mean(dim=1).unflatten(-1, (num_heads, -1))
    z = _normaliser(features[:, :, 0], key_mean, eps)
    _rotate_(features, rope_grid(height, width, channels, rope_base, v.device, dtype))
    state = _heads(features[:, :, 1], num_heads).transpose(-2, -1) @ _heads(values, num_heads)
    state /= tokens
    out = _lepe(values, lepe_weight, lepe_bias, height, width)
    # Onto what is there: the product of the heads lies in another order, and a copy of its own would cost a pass.
    attended = (_heads(features[:, :, 0], num_heads) @ state).transpose(1, 2)
    out.unflatten(-1, (num_heads, -1)).addcmul_(attended, (z @ _members(num_heads, values)).view(attended.shape))
    if gate is not None:
        out *= F.silu(gate.to(dtype))
    return out.to(v.dtype), state, key_mean


def attention_backward(grad_y: Tensor, qk: Tensor, v: Tensor, lepe_weight: Tensor | None, lepe_bias: Tensor | None,
                       gate: Tensor | None, state: Tensor, key_mean: Tensor, height: int, width: int, num_heads: int,
                       eps: float, rope_base: float) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None,
                                                              Tensor | None]:
    """Compute the gradients of qk (one buffer, (B, N, 2C)), v, lepe_weight, lepe_bias and gate, each in its dtype."""
    dtype = state.dtype
    tokens, channels = v.shape[1:]
    sizes = height, width, channels, rope_base, v.device, dtype
    values = v.to(dtype)
    features, slopes = _feature_map(qk, dtype)
    features = features.unflatten(-1, (2, channels))
    q = features[:, :, 0].contiguous()
    z = _normaliser(q, key_mean, eps)
    members = _members(num_heads, values)
    repeated_z = z @ members  # (B, N, C)
    _rotate_(features, rope_grid(*sizes))
    scaled = (features[:, :, 0] * repeated_z).unflatten(-1, (num_heads, -1))  # P, (B, N, heads, d)

    grad_gate, grad_out = None, grad_y.to(dtype)
    if gate is not None:
        out = _lepe(values, lepe_weight, lepe_bias, height, width)
        out.unflatten(-1, (num_heads, -1)).add_((scaled.transpose(1, 2) @ state).transpose(1, 2))
        grad_gate = torch.ops.aten.silu_backward(out.mul_(grad_out), gate.to(dtype)).to(gate.dtype)
        grad_out = grad_out * F.silu(gate.to(dtype))
    grad_out = grad_out.contiguous()

    grad_heads = _heads(grad_out, num_heads)
    r = (grad_heads @ state.transpose(-2, -1)).transpose(1, 2)  # (B, N, heads, d)
    products = torch.mul(scaled, r, out=torch.empty_like(scaled)).flatten(2)
    e = (products @ members.t()).mul_(z).neg_()  # (B, N, heads)
    grad_state = scaled.permute(0, 2, 3, 1) @ grad_heads / tokens
    grad_mean = (e.transpose(1, 2).unsqueeze(2) @ _heads(q, num_heads)).squeeze(2) / tokens  # (B, heads, d)

    grad_qk = torch.empty_like(features)
    torch.mul(r, repeated_z.view(r.shape), out=grad_qk[:, :, 0].unflatten(-1, (num_heads, -1)))
    grad_qk[:, :, 1].unflatten(-1, (num_heads, -1)).copy_(
        (_heads(values, num_heads) @ grad_state.transpose(-2, -1)).transpose(1, 2))
    _rotate_(grad_qk, rope_grid(*sizes, inverse=True))
    grad_qk[:, :, 0].addcmul_(e @ members, key_mean.flatten(1)[:, None])
    grad_qk[:, :, 1] += grad_mean.flatten(1)[:, None]
    grad_qk = grad_qk.flatten(2).mul_(slopes).to(qk.dtype)

    grad_v = (_heads(features[:, :, 1], num_heads) @ grad_state).transpose(1, 2)
    grad_weight = grad_bias = None
    if lepe_weight is not None:
        def image(x: Tensor) -> Tensor:
            return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)

        grad_image, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            image(grad_out), image(values), lepe_weight.to(dtype), [channels], [1, 1], [1, 1], [1, 1], False, [0, 0],
            channels, [True, True, True])
        grad_v = grad_image.permute(0, 2, 3, 1).flatten(1, 2).unflatten(-1, (num_heads, -1)).add_(grad_v)
        grad_weight, grad_bias = grad_weight.to(lepe_weight.dtype), grad_bias.to(lepe_bias.dtype)
    return grad_qk, grad_v.flatten(2).to(v.dtype), grad_weight, grad_bias, grad_gate
