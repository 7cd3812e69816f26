"""The attention of the study: projections, gates and encodings around :func:`mila_mm.ops.gated_linear_attention`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mila_mm.nn.layers import DepthwiseConv
from mila_mm.ops import gated_linear_attention, mila_attention
from mila_mm.ops.attention.reference import feature_map, rotate
from mila_mm.ops.rope import grid_for
from mila_mm.study.model.design import Design

_ROPE_BASE = 10000.0


class Delta(nn.Module):
    """Delta = softplus(x W_1 W_2 + b), positive, in at least fp32.

    The bias, which Mamba's code has and the formula leaves out, sets where Delta starts: at 1, an open input gate, or
    for a forget gate as in Mamba log-uniformly over the channels from 0.001 to 0.1.
    """

    def __init__(self, dim: int, reduction: int, forgets: bool) -> None:
        super().__init__()
        hidden = max(dim // reduction, 1)
        self.forgets = forgets
        self.down = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(hidden, dim)
        self.reset_bias()

    def reset_bias(self) -> None:
        """Set the bias to its start."""
        with torch.no_grad():
            start = torch.ones_like(self.up.bias)
            if self.forgets:
                start.uniform_(math.log(1e-3), math.log(0.1)).exp_()
            self.up.bias.copy_(start + torch.log(-torch.expm1(-start)))  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        y = self.up(self.down(x))
        return F.softplus(y if y.dtype == torch.float64 else y.float())


class InputGate(nn.Module):
    """Delta as a factor of v: hooks see the gate's values as the output."""

    def forward(self, delta: Tensor) -> Tensor:
        """Return delta (B, N, C) itself."""
        return delta


class ForgetGate(nn.Module):
    """A = exp(a * Delta) for d states and C channels, with the learned a < 0 starting at -1, -2, .. -d as in Mamba."""

    def __init__(self, states: int, dim: int) -> None:
        super().__init__()
        start = torch.arange(1, states + 1, dtype=torch.get_default_dtype()).log()
        self.log_rate = nn.Parameter(start[:, None].repeat(1, dim))

    def forward(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pair (delta (B, N, C), a (d, C)) that the operator takes; A itself is never stored."""
        return delta, -self.log_rate.exp()

    def mean_gate(self, delta: Tensor) -> Tensor:
        """Average A over the d states: (B, N, C) from delta (B, N, C), one state at a time."""
        total = torch.zeros_like(delta)
        for rate in -self.log_rate.exp():
            total += torch.exp(rate * delta)
        return total / len(self.log_rate)


class StudyAttention(nn.Module):
    """Linear attention with every switch of the study inside of the operator.

    Args:
        dim: Width of the tokens and of v.
        qk_dim: Width of q, and of k, over all heads.
        project_v: Whether v is a projection of the tokens, as in a Transformer's block, or the tokens.
        attn_backend: For what :func:`mila_mm.ops.mila_attention` covers.
    """

    def __init__(
        self, dim: int, num_heads: int, qk_dim: int, design: Design, project_v: bool, attn_backend: str = 'auto'
    ) -> None:
        super().__init__()
        encodings = design.positional_encoding
        self.num_heads = num_heads
        self.qk_dim = qk_dim
        self.normalize = design.normalization
        self.rope = 'rope' in encodings
        self.backend = attn_backend
        # The part of the study that is MILA's has a kernel of its own.
        self.fused = self.rope and not design.gated and qk_dim == dim
        self.qk = nn.Linear(dim, 2 * qk_dim)
        self.v = nn.Linear(dim, dim) if project_v else None
        needs_delta = design.input_gate or design.forget_gate
        self.delta = Delta(dim, design.gate_reduction, design.forget_gate) if needs_delta else None
        self.input_gate = InputGate() if design.input_gate else None
        self.forget_gate = ForgetGate(qk_dim // num_heads, dim) if design.forget_gate else None
        self.shortcut = nn.Parameter(torch.ones(dim)) if design.shortcut else None
        self.lepe = DepthwiseConv(dim) if 'lepe' in encodings else None

    def forward(self, x: Tensor, height: int, width: int, gate: Tensor | None = None) -> Tensor:
        """Attend over x (B, H * W, C), times silu(gate) if there is one; returns (B, N, C)."""
        qk = self.qk(x)
        v = x if self.v is None else self.v(x)
        if self.fused:
            lepe = (None, None) if self.lepe is None else (self.lepe.weight, self.lepe.bias)
            return mila_attention(
                qk,
                v,
                *lepe,
                (height, width),
                self.num_heads,
                gate,
                eps=1e-6,
                rope_base=_ROPE_BASE,
                backend=self.backend,
            )
        q, k = feature_map(qk if qk.dtype == torch.float64 else qk.float()).split(self.qk_dim, dim=-1)
        norm_q, norm_k = q, k  # without rotation, as in MILA: rotated products may be negative
        if self.rope:
            grid = grid_for(q, height, width, self.qk_dim, _ROPE_BASE, q.dtype)
            q, k = rotate(q, grid), rotate(k, grid)
        delta = None if self.delta is None else self.delta(x)
        y = gated_linear_attention(
            q,
            k,
            v,
            num_heads=self.num_heads,
            input_gate=None if self.input_gate is None else self.input_gate(delta),
            forget_gate=None if self.forget_gate is None else self.forget_gate(delta),
            shortcut=self.shortcut,
            x=x,
            normalize=self.normalize,
            norm_q=norm_q,
            norm_k=norm_k,
        )
        if self.lepe is not None:
            y = y + self.lepe(v, height, width)
        return y if gate is None else y * F.silu(gate)
