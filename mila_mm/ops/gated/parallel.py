"""The forms without a forget gate, where sums need no recurrence: global, and causal by chunks.

Plain differentiable PyTorch on any device. All tensors are in the dtype of the computation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk of the causal form: inside, a product of CHUNK x CHUNK; between, one d x d state each."""


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def global_attention(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, normalize: bool, norm_q: Tensor, norm_k: Tensor, eps: float
) -> Tensor:
    """Every token sees every other one: two products, cost linear in the tokens. Returns (B, N, C)."""
    tokens = v.shape[1]
    q, k, values = (_heads(t, num_heads) for t in (q, k, v))
    state = k.transpose(-2, -1) @ values
    if normalize:
        state = state / tokens
        norm_k = _heads(norm_k.mean(dim=1, keepdim=True), num_heads)
        q = q / (_heads(norm_q, num_heads) @ norm_k.transpose(-2, -1) + eps)
    return (q @ state).transpose(1, 2).flatten(2)


def causal_sums(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Compute y_i = q_i sum_(j <= i) k_j^T v_j with memory linear in the tokens. Returns (B, N, C)."""
    tokens = v.shape[1]
    length = min(CHUNK, tokens)
    chunks = -(-tokens // length)

    def split(x: Tensor) -> Tensor:
        """(B, N, C) -> (B, heads, chunks, length, d); tokens that fill the last chunk up are zeros."""
        return _heads(F.pad(x, (0, 0, 0, chunks * length - tokens)), num_heads).unflatten(2, (chunks, length))

    q, k, values = split(q), split(k), split(v)
    states = (k.transpose(-2, -1) @ values).cumsum(dim=2)
    before = F.pad(states, (0, 0, 0, 0, 1, -1))  # what a chunk finds: the sum up to the one before it
    y = (q @ k.transpose(-2, -1)).tril() @ values + q @ before
    return y.flatten(2, 3)[:, :, :tokens].transpose(1, 2).flatten(2)


def causal_normalizer(q: Tensor, k: Tensor, num_heads: int, eps: float) -> Tensor:
    """q_i . sum_(j <= i) k_j + i eps, per head: (B, N, heads)."""
    tokens = q.shape[1]
    products = (q * k.cumsum(dim=1)).unflatten(-1, (num_heads, -1)).sum(-1)
    counts = torch.arange(1, tokens + 1, dtype=q.dtype, device=q.device)
    return products + eps * counts[:, None]
