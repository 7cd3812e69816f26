"""The recurrence, token by token: the specification of ``gated_linear_attention``."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int = 1,
    input_gate: Tensor | None = None,
    forget_gate: tuple[Tensor, Tensor] | None = None,
    shortcut: Tensor | None = None,
    x: Tensor | None = None,
    normalize: bool = True,
    norm_q: Tensor | None = None,
    norm_k: Tensor | None = None,
    causal: bool | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Evaluate the formula one token after the other, differentiable to any order.

    The specification of :func:`mila_mm.ops.gated_linear_attention`, which see for the arguments. It computes in fp64
    where an input is fp64 and in fp32 otherwise, also under autocast. For each head, with S (d, C / heads) and Z (d)
    starting at 0 (equations 11 and 12 of arXiv 2405.16605)::

        S_i = A_i * S_(i-1) + k_i^T (g_i * v_i),     Z_i = Z_(i-1) + k_i
        y_i = q_i S_i / (q_i . Z_i + i eps) + D * x_i

    where g is the input gate, A_i = exp(a * delta_i) the forget gate and D the shortcut. What is absent is 1, or 0 for
    the shortcut; without ``normalize`` the division is left out; if not causal, S_i and Z_i are those of the last
    token for every i, and i is N in front of eps.

    Returns:
        (B, N, C) in v's dtype; under autocast in fp32.
    """
    gates = () if forget_gate is None else forget_gate
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in (q, k, v, *gates)) else torch.float32
    causal = forget_gate is not None if causal is None else causal
    out_dtype = dtype if torch.is_autocast_enabled(v.device.type) else v.dtype
    with torch.autocast(v.device.type, enabled=False):
        q, k, values = (t.to(dtype).unflatten(-1, (num_heads, -1)) for t in (q, k, v))
        norm_q, norm_k = (
            heads if t is None else t.to(dtype).unflatten(-1, (num_heads, -1))
            for t, heads in ((norm_q, q), (norm_k, k))
        )
        if input_gate is not None:
            values = values * input_gate.to(dtype).unflatten(-1, (num_heads, -1))
        if forget_gate is not None:
            delta = forget_gate[0].to(dtype).unflatten(-1, (num_heads, -1))  # (B, N, heads, C / heads)
            rate = forget_gate[1].to(dtype).unflatten(-1, (num_heads, -1)).transpose(0, 1)  # (heads, d, C / heads)

        batch, tokens, _, width = values.shape
        state = values.new_zeros(batch, num_heads, q.shape[-1], width)
        norm = values.new_zeros(batch, num_heads, q.shape[-1])
        states, norms = [], []
        for i in range(tokens):
            if forget_gate is not None:
                state = torch.exp(rate * delta[:, i, :, None]) * state
            state = state + k[:, i, :, :, None] * values[:, i, :, None]
            norm = norm + norm_k[:, i]
            states.append(state)
            norms.append(norm)
        ys = []
        for i in range(tokens):
            last = i if causal else tokens - 1
            y = (q[:, i, :, None] @ states[last]).squeeze(-2)
            if normalize:
                y = y / ((norm_q[:, i] * norms[last]).sum(-1, keepdim=True) + (last + 1) * eps)
            ys.append(y)
        out = torch.stack(ys, dim=1).flatten(2)
        if shortcut is not None:
            out = out + shortcut.to(dtype) * (v if x is None else x).to(dtype)
    return out.to(out_dtype)
