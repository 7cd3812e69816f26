"""``gated_linear_attention``: the public function, the choice of a form, and the registered scan behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from mila_mm.ops.common import needs_plain_operators, register, transformed
from mila_mm.ops.gated import parallel
from mila_mm.ops.gated.reference import gated_linear_attention_reference
from mila_mm.ops.gated.scan import LENGTH, scan_backward, scan_forward, states_shape
from mila_mm.ops.gated.unrolled import scan_unrolled

BACKENDS = ('auto', 'reference')

_INPUTS = 'Tensor q, Tensor k, Tensor v, Tensor delta, Tensor rate'


def _fake_forward(q, k, v, delta, rate, num_heads, length):
    return v.new_empty(v.shape), v.new_empty(states_shape(q, v, num_heads, length))


def _fake_backward(grad_y, q, k, v, delta, rate, starts, num_heads, length):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, delta, rate))


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.options = inputs[5:]


def _differentiate(ctx, grad_y, _):
    if grad_y is None:
        return (None,) * 7
    return *torch.ops.mila_mm.gated_scan_backward(grad_y, *ctx.saved_tensors, *ctx.options), None, None


register(
    'gated_scan_forward',
    f'({_INPUTS}, int num_heads, int length) -> (Tensor, Tensor)',
    scan_forward,
    _fake_forward,
    differentiate=_differentiate,
    setup_context=_setup_context,
)
register(
    'gated_scan_backward',
    f'(Tensor grad_y, {_INPUTS}, Tensor starts, int num_heads, int length) -> (Tensor, Tensor, Tensor, Tensor, Tensor)',
    scan_backward,
    _fake_backward,
    once='gated_linear_attention: expected one differentiation of the scan, got a second; '
    "take backend='reference' for it",
)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    like_v: dict[str, Tensor | None],
    shortcut: Tensor | None,
    forget_gate: tuple[Tensor, Tensor] | None,
    norm: tuple[Tensor | None, Tensor | None],
    causal: bool | None,
    backend: str,
) -> None:
    """Raise ValueError, with what was expected and got, for arguments that do not fit together."""

    def fail(expected: str, got: object) -> None:
        raise ValueError(f'gated_linear_attention: expected {expected}, got {got}')

    if backend not in BACKENDS:
        fail(f'backend to be one of {", ".join(BACKENDS)}', repr(backend))
    if v.dim() != 3 or v.shape[1] == 0:
        fail('v of shape (B, N, C) with N above 0', tuple(v.shape))
    if q.dim() != 3 or q.shape[:2] != v.shape[:2] or k.shape != q.shape:
        fail(f'q and k of one shape ({v.shape[0]}, {v.shape[1]}, heads * d)', (tuple(q.shape), tuple(k.shape)))
    if num_heads < 1 or v.shape[-1] % num_heads or q.shape[-1] % num_heads:
        fail(f'num_heads to divide the widths {q.shape[-1]} and {v.shape[-1]}', num_heads)
    if not all(t.is_floating_point() for t in (q, k, v)):
        fail('floating dtypes', (q.dtype, k.dtype, v.dtype))
    for name, tensor in like_v.items():
        if tensor is not None and tensor.shape != v.shape:
            fail(f'{name} of the shape of v, {tuple(v.shape)}', tuple(tensor.shape))
    if shortcut is not None and shortcut.shape != v.shape[-1:]:
        fail(f'shortcut of shape ({v.shape[-1]},)', tuple(shortcut.shape))
    if any(t is not None and t.shape != q.shape for t in norm):
        fail(
            f'norm_q and norm_k of the shape of q, {tuple(q.shape)}',
            [None if t is None else tuple(t.shape) for t in norm],
        )
    if forget_gate is not None:
        expected = v.shape, (q.shape[-1] // num_heads, v.shape[-1])
        if len(forget_gate) != 2 or tuple(t.shape for t in forget_gate) != expected:
            fail(
                f'forget_gate to be (delta, a) of shapes {tuple(v.shape)} and {tuple(expected[1])}',
                [tuple(t.shape) for t in forget_gate],
            )
        if causal is False:
            fail('causal to be True or None with a forget gate', causal)


def _causal_sums(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, forget_gate: tuple[Tensor, Tensor] | None, chunk_size: int
) -> Tensor:
    """Compute q_i S_i (B, N, C) for every token i."""
    if forget_gate is None:
        return parallel.causal_sums(q, k, v, num_heads)
    delta, rate = (t.to(v.dtype) for t in forget_gate)
    scan = (q, k, v, delta, rate.contiguous(), num_heads, chunk_size)
    return scan_unrolled(*scan) if needs_plain_operators() else torch.ops.mila_mm.gated_scan_forward(*scan)[0]


def gated_linear_attention(
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
    chunk_size: int = LENGTH,
    backend: str = 'auto',
) -> Tensor:
    """Linear attention with the gates of Mamba, any of which may be absent.

    For each head, with the state S (d, C / heads) and the sum of keys Z (d), both 0 before the first token
    (equations 11 and 12 of arXiv 2405.16605)::

        S_i = A_i * S_(i-1) + k_i^T (g_i * v_i),     Z_i = Z_(i-1) + k_i
        y_i = q_i S_i / (q_i . Z_i + i eps) + D * x_i

    With ``forget_gate``, no normalisation and one head it is the selective state space model of Mamba, with all gates
    absent causal linear attention. Without a forget gate it may be global: the sums over all tokens in place of S_i
    and Z_i, N in place of i. A kernel function, elu + 1 say, and rotations are applied to q and k before.

    Without a forget gate the sums are matrix products; with one a scan by chunks runs the recurrence with memory linear
    in the tokens. fp16 and bf16 inputs are computed in fp32. Differentiable in every tensor argument; with a forget
    gate once, unless ``backend='reference'``.

    Args:
        q: (B, N, heads * d), any floating dtype, like all others.
        k: (B, N, heads * d).
        v: (B, N, C), C a multiple of ``num_heads``.
        num_heads: Heads.
        input_gate: g, (B, N, C). Mamba's is Delta.
        forget_gate: (delta, a) of shapes (B, N, C) and (d, C): the gate of state s and channel c is exp(a[s, c] *
            delta[i, c]), given by its logarithm so that neither 0 nor 1 is out of reach. Mamba's delta is Delta, its a
            negative; a * delta above 0 would be a gate above 1.
        shortcut: D, (C,).
        x: What the shortcut passes on, (B, N, C). Defaults to v.
        normalize: Whether to divide by q . Z.
        norm_q: What stands for q in the divisor, as with rotary embeddings; (B, N, heads * d). Defaults to q.
        norm_k: The same for k.
        causal: Whether token i sees only tokens up to i. Defaults to whether there is a forget gate, which needs it.
        eps: Added to the mean over tokens of q . k, the divisor.
        chunk_size: Most tokens of a chunk of the scan; the backward keeps a state of d x C for each chunk.
        backend: 'auto', or 'reference' for :func:`gated_linear_attention_reference`, token by token, which with a
            forget gate also serves ``torch.func``.

    Returns:
        (B, N, C) in v's dtype; under autocast in fp32, because without normalisation sums outgrow fp16.

    Raises:
        ValueError: Shapes, dtypes or options that do not fit; the message says expected and got.
    """
    _check(
        q, k, v, num_heads, {'input_gate': input_gate, 'x': x}, shortcut, forget_gate, (norm_q, norm_k), causal, backend
    )
    if chunk_size < 1:
        raise ValueError(f'gated_linear_attention: expected chunk_size above 0, got {chunk_size}')
    device = v.device.type
    if backend == 'reference' or (forget_gate is not None and transformed()):
        return gated_linear_attention_reference(
            q,
            k,
            v,
            num_heads=num_heads,
            input_gate=input_gate,
            forget_gate=forget_gate,
            shortcut=shortcut,
            x=x,
            normalize=normalize,
            norm_q=norm_q,
            norm_k=norm_k,
            causal=causal,
            eps=eps,
        )
    gates = () if forget_gate is None else forget_gate
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in (q, k, v, *gates)) else torch.float32
    autocast = device != 'meta' and torch.is_autocast_enabled(device)
    out_dtype = dtype if autocast else v.dtype
    # No autocast on meta tensors, which only have shapes.
    with torch.autocast('cpu' if v.is_meta else device, enabled=False):
        passed = v if x is None else x
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        norm_q, norm_k = (q if norm_q is None else norm_q.to(dtype)), (k if norm_k is None else norm_k.to(dtype))
        v = v if input_gate is None else v * input_gate.to(dtype)
        if forget_gate is None and not causal:
            y = parallel.global_attention(q, k, v, num_heads, normalize, norm_q, norm_k, eps)
        else:
            y = _causal_sums(q, k, v, num_heads, forget_gate, chunk_size)
            if normalize:
                divisor = parallel.causal_normalizer(norm_q, norm_k, num_heads, eps)
                y = (y.unflatten(-1, (num_heads, -1)) / divisor.unsqueeze(-1)).flatten(2)
        if shortcut is not None:
            y = y + shortcut.to(dtype) * passed.to(dtype)
    return y.to(out_dtype)
