"""The scan of :mod:`mila_mm.ops.gated.scan` from plain operators, without writing in place: for graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from mila_mm.ops.gated.scan import LENGTH, Plan, chunk_lengths


def scan_unrolled(
    q: Tensor, k: Tensor, v: Tensor, delta: Tensor, rate: Tensor, num_heads: int, length: int = LENGTH
) -> Tensor:
    """Run the recurrence by chunks that all walk at once; arguments and y (B, N, C) as in ``scan_forward``.

    A graph of it has two steps for each position in a chunk and one for each chunk, so it is for one number of tokens.
    """
    batch, tokens, channels = v.shape
    states = q.shape[-1] // num_heads
    length, chunks = chunk_lengths(tokens, length)
    plan = Plan(batch, tokens, length, chunks, 1, chunks, num_heads, channels // num_heads, states)
    rate = rate.view(states, num_heads, plan.width, 1)
    queries, keys = (plan.keys(plan.cut(t, 0)) for t in (q, k))
    values, deltas = (plan.channels(plan.cut(t, 0)) for t in (v, delta))
    decays = [torch.exp(rate * deltas[i]) for i in range(length)]

    walking = v.new_zeros(states, num_heads, plan.width, plan.columns)
    for i in range(length):
        walking = walking * decays[i] + keys[i] * values[i]
    local = walking.unflatten(-1, (batch, chunks))
    kept = torch.exp(rate * deltas.sum(0)).unflatten(-1, (batch, chunks))
    found = [v.new_zeros(local.shape[:-1])]
    for chunk in range(chunks - 1):
        found.append(local[..., chunk] + kept[..., chunk] * found[-1])
    walking = torch.stack(found, dim=-1).flatten(-2)
    ys = []
    for i in range(length):
        walking = walking * decays[i] + keys[i] * values[i]
        ys.append((walking * queries[i]).sum(0))
    return plan.joined([torch.stack(ys)])
