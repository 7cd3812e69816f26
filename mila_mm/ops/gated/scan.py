"""The recurrence with a forget gate for each state and channel, by chunks: forward and backward.

Computes S_i = A_i * S_(i-1) + k_i^T v_i and y_i = q_i S_i with A_i = exp(a * delta_i), where A_i and S_i are d x C: 32
times the tokens, so only a segment of the sequence ever exists at once.

A segment is ``chunks`` neighbouring chunks of ``length`` tokens. The chunks walk in step, position by position, first
from zero, which gives what each adds; then one short recurrence carries the states from chunk to chunk; then they walk
again from the right states. The decay over a chunk is exp(a * sum of delta). Decays are only ever multiplied, never
divided by, and their logarithms are at most 0: nothing overflows, whatever the gates, and what underflows is zero.

The backward keeps the states at the starts of the chunks, d / length of the size of v, and recomputes the others. It
walks the adjoint G_i = q_i^T dy_i + A_(i+1) * G_(i+1) in the same way from the end::

    dq_i = S_i dy_i,   dk_i = G_i v_i,   dv_i = k_i G_i,   W_i = G_i * A_i * S_(i-1),
    ddelta_i = sum over states of a * W_i,   da = sum over tokens of delta_i * W_i

Inside, tokens are the last axis: (length, ..., X), X = batch x chunks, so that every elementwise step is one long
contiguous loop. State tensors are (d, heads, C / heads, X).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LENGTH = 56
"""Most tokens of a chunk. Longer ones spare memory, shorter ones steps."""
_STEP_ELEMENTS = {'cpu': 3 * 2**16, 'cuda': 2**20}
"""Elements of a state tensor that keep the device busy and, on a CPU, in its caches."""
_LEAST_CHUNKS = 4


@dataclass(frozen=True)
class Plan:
    """How the tokens are cut.

    Attributes:
        batch: Sequences.
        tokens: Tokens of a sequence.
        length: Tokens of a chunk.
        chunks: Chunks of a segment.
        segments: Segments of a sequence; the last one may be filled up with zeros.
        filled: Chunks of a sequence that hold tokens.
        heads: Heads.
        width: Channels of v in one head.
        states: Channels d of q and k in one head.
    """

    batch: int
    tokens: int
    length: int
    chunks: int
    segments: int
    filled: int
    heads: int
    width: int
    states: int

    @property
    def columns(self) -> int:
        """X, the tokens that walk in step."""
        return self.batch * self.chunks

    def cut(self, x: Tensor, segment: int) -> Tensor:
        """(B, N, D) -> (length, D, X) of one segment, contiguous; zeros behind the end."""
        size = self.length * self.chunks
        part = x[:, segment * size : (segment + 1) * size]
        if part.shape[1] < size:
            part = torch.nn.functional.pad(part, (0, 0, 0, size - part.shape[1]))
        return part.unflatten(1, (self.chunks, self.length)).permute(2, 3, 0, 1).flatten(2)

    def joined(self, parts: list[Tensor]) -> Tensor:
        """The segments' (length, D, X), D of any number of axes, as (B, N, D), dense: the inverse of :meth:`cut`."""
        rows = [p.reshape(self.length, -1, self.batch, self.chunks).permute(2, 3, 0, 1).flatten(1, 2) for p in parts]
        return torch.cat(rows, dim=1)[:, : self.tokens].contiguous()

    def keep(self, found: Tensor, starts: Tensor, segment: int) -> None:
        """What the chunks of a segment find, (d, heads, width, B, chunks), into ``starts``."""
        first = segment * self.chunks
        size = min(self.chunks, self.filled - first)
        starts[..., first : first + size] = found[..., :size]

    def kept(self, starts: Tensor, segment: int) -> Tensor:
        """(d, heads, width, X): what the chunks of a segment found. Of those without tokens, which add nothing, 0."""
        first = segment * self.chunks
        size = min(self.chunks, self.filled - first)
        found = starts[..., first : first + size]
        return torch.nn.functional.pad(found, (0, self.chunks - size)).flatten(-2)

    def channels(self, x: Tensor) -> Tensor:
        """(length, C, X) as (length, heads, width, X): broadcasts over the states."""
        return x.unflatten(1, (self.heads, self.width))

    def keys(self, x: Tensor) -> Tensor:
        """(length, heads * d, X) as (length, d, heads, 1, X): broadcasts over the channels of a head."""
        return x.unflatten(1, (self.heads, self.states)).transpose(1, 2).unsqueeze(3)


def chunk_lengths(tokens: int, length: int) -> tuple[int, int]:
    """Tokens of a chunk, near the square root of few ones, and how many chunks that makes.

    Of symbolic sizes it asks nothing, so that a compiled graph does not depend on how many tokens there are.
    """
    length = torch.sym_min(length, 8 + tokens // 64)
    return length, -(-tokens // length)


def _plan(q: Tensor, v: Tensor, num_heads: int, length: int) -> Plan:
    batch, tokens, channels = v.shape
    states = q.shape[-1] // num_heads
    length, filled = chunk_lengths(tokens, length)
    step = max(batch * states * channels, 1)
    target = _STEP_ELEMENTS['cpu' if v.device.type == 'cpu' else 'cuda']
    chunks = min(max(target // step, _LEAST_CHUNKS), filled)
    segments = -(-filled // chunks)
    chunks = -(-filled // segments)  # evenly, so that the last segment is not mostly filling
    return Plan(batch, tokens, length, chunks, segments, filled, num_heads, channels // num_heads, states)


def states_shape(q: Tensor, v: Tensor, num_heads: int, length: int) -> tuple[int, ...]:
    """Shape of the states at the starts of the chunks: (d, heads, C / heads, B, chunks of a sequence)."""
    batch, tokens, channels = v.shape
    return q.shape[-1] // num_heads, num_heads, channels // num_heads, batch, chunk_lengths(tokens, length)[1]


def _decays(rate: Tensor, delta: Tensor, out: Tensor) -> None:
    """A = exp(a * delta) of one position into ``out`` (d, heads, width, X)."""
    torch.mul(rate, delta, out=out).exp_()


def _carry(local: Tensor, decay: Tensor, state: Tensor, order: Iterator[int], out: Tensor) -> Tensor:
    """Carry a state (d, heads, width, B) over the chunks in ``order``.

    Args:
        local: (d, heads, width, B, chunks), what each chunk adds.
        decay: Of the same shape, what each chunk leaves of what it found.
        state: What the first chunk finds.
        order: The chunks, first to last or last to first.
        out: Of the shape of ``local``; receives what each chunk finds.

    Returns:
        What the last chunk leaves.
    """
    for chunk in order:
        out[..., chunk] = state
        state = torch.addcmul(local[..., chunk], decay[..., chunk], state)
    return state


def scan_forward(
    q: Tensor, k: Tensor, v: Tensor, delta: Tensor, rate: Tensor, num_heads: int, length: int = LENGTH
) -> tuple[Tensor, Tensor]:
    """Run the recurrence.

    Args:
        q: (B, N, heads * d), fp32 or fp64; all others of this dtype.
        k: (B, N, heads * d).
        v: (B, N, C).
        delta: (B, N, C).
        rate: a, (d, C), at most 0 where delta is at least 0.
        num_heads: Heads.
        length: Most tokens of a chunk.

    Returns:
        y (B, N, C), and the states at the starts of the chunks for the backward.
    """
    plan = _plan(q, v, num_heads, length)
    rate = rate.view(plan.states, plan.heads, plan.width, 1)
    shape = plan.states, plan.heads, plan.width, plan.columns
    decays = v.new_empty(plan.length, *shape)
    products = v.new_empty(shape)
    starts = v.new_empty(states_shape(q, v, num_heads, length))
    state = v.new_zeros(*shape[:3], plan.batch)
    parts = []
    for segment in range(plan.segments):
        queries, keys = (plan.keys(plan.cut(t, segment)) for t in (q, k))
        values, deltas = (plan.channels(plan.cut(t, segment)) for t in (v, delta))
        walking = v.new_zeros(shape)
        for i in range(plan.length):
            _decays(rate, deltas[i], decays[i])
            walking.mul_(decays[i]).addcmul_(keys[i], values[i])
        chunk_decay = (rate * deltas.sum(0)).exp_().unflatten(-1, (plan.batch, plan.chunks))
        local = walking.unflatten(-1, (plan.batch, plan.chunks))
        found = torch.empty_like(local)
        state = _carry(local, chunk_decay, state, iter(range(plan.chunks)), found)
        plan.keep(found, starts, segment)
        walking = found.flatten(-2)
        y = v.new_empty(plan.length, *shape[1:])
        for i in range(plan.length):
            walking.mul_(decays[i]).addcmul_(keys[i], values[i])
            torch.sum(torch.mul(walking, queries[i], out=products), 0, out=y[i])
        parts.append(y)
    return plan.joined(parts), starts


def scan_backward(
    grad_y: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    delta: Tensor,
    rate: Tensor,
    starts: Tensor,
    num_heads: int,
    length: int = LENGTH,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate :func:`scan_forward`.

    Args:
        grad_y: (B, N, C).
        q: As in the forward, like all up to ``rate``.
        k: See there.
        v: See there.
        delta: See there.
        rate: See there.
        starts: Second result of the forward.
        num_heads: Heads.
        length: As in the forward.

    Returns:
        Gradients of q, k, v, delta and rate.
    """
    plan = _plan(q, v, num_heads, length)
    shape = plan.states, plan.heads, plan.width, plan.columns
    decays, weights = (v.new_empty(plan.length, *shape) for _ in range(2))
    state = v.new_zeros(*shape[:3], plan.batch)
    grad_rate = torch.zeros_like(rate)
    parts: list[tuple[Tensor, ...]] = []
    for segment in reversed(range(plan.segments)):
        cuts = [plan.cut(t, segment) for t in (q, k, v, delta, grad_y)]
        grad_q = _recompute(plan, cuts, rate, plan.kept(starts, segment), decays, weights)
        state, found = _adjoint_starts(plan, cuts, rate, decays, state)
        grads = _walk_back(plan, cuts, rate, found, decays, weights, grad_rate)
        parts.insert(0, (grad_q, *grads))
    grad_q, grad_k, grad_v, grad_delta = (plan.joined(list(p)) for p in zip(*parts, strict=True))
    return grad_q, grad_k, grad_v, grad_delta, grad_rate


def _recompute(plan: Plan, cuts: list[Tensor], rate: Tensor, state: Tensor, decays: Tensor, weights: Tensor) -> Tensor:
    """Walk forward again; fill ``decays`` with A_i and ``weights`` with A_i * S_(i-1). Returns the gradient of q."""
    keys = plan.keys(cuts[1])
    values, deltas, grads = (plan.channels(cuts[i]) for i in (2, 3, 4))
    rate = rate.view(plan.states, plan.heads, plan.width, 1)
    walking, products = torch.empty_like(state), torch.empty_like(state)
    grad_q = state.new_empty(plan.length, plan.heads, plan.states, plan.columns)
    for i in range(plan.length):
        _decays(rate, deltas[i], decays[i])
        torch.mul(decays[i], state, out=weights[i])
        state = torch.addcmul(weights[i], keys[i], values[i], out=walking)
        torch.sum(torch.mul(state, grads[i], out=products), 2, out=grad_q[i].transpose(0, 1))
    return grad_q


def _adjoint_starts(
    plan: Plan, cuts: list[Tensor], rate: Tensor, decays: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """From A_(i+1) * G_(i+1) behind the segment to that before it, and to what each chunk finds at its end."""
    queries, deltas, grads = plan.keys(cuts[0]), plan.channels(cuts[3]), plan.channels(cuts[4])
    rate = rate.view(plan.states, plan.heads, plan.width, 1)
    walking = torch.zeros_like(decays[0])
    for i in reversed(range(plan.length)):
        walking.addcmul_(queries[i], grads[i]).mul_(decays[i])
    chunk_decay = (rate * deltas.sum(0)).exp_().unflatten(-1, (plan.batch, plan.chunks))
    local = walking.unflatten(-1, (plan.batch, plan.chunks))
    found = torch.empty_like(local)
    state = _carry(local, chunk_decay, state, reversed(range(plan.chunks)), found)
    return state, found.flatten(-2)


def _walk_back(
    plan: Plan, cuts: list[Tensor], rate: Tensor, walking: Tensor, decays: Tensor, weights: Tensor, grad_rate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Walk the adjoint from what each chunk finds at its end; adds to ``grad_rate``. Gradients of k, v and delta."""
    queries, keys = plan.keys(cuts[0]), plan.keys(cuts[1])
    values, deltas, grads = (plan.channels(cuts[i]) for i in (2, 3, 4))
    products = torch.empty_like(walking)
    grad_k = walking.new_empty(plan.length, plan.heads, plan.states, plan.columns)
    grad_v, grad_delta = (torch.empty_like(cuts[2]) for _ in range(2))
    rate = rate.view(plan.states, plan.heads, plan.width, 1)
    weighted = torch.zeros_like(walking)  # sum over the positions of delta * W
    for i in reversed(range(plan.length)):
        walking.addcmul_(queries[i], grads[i])
        torch.sum(torch.mul(walking, values[i], out=products), 2, out=grad_k[i].transpose(0, 1))
        torch.sum(torch.mul(walking, keys[i], out=products), 0, out=plan.channels(grad_v)[i])
        weight = weights[i].mul_(walking)
        weighted.addcmul_(weight, deltas[i])
        torch.sum(weight.mul_(rate), 0, out=plan.channels(grad_delta)[i])
        walking.mul_(decays[i])
    grad_rate += weighted.sum(-1).flatten(1)
    return grad_k, grad_v, grad_delta
