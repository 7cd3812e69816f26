"""The gated operator against the paper's formulas, its forms against one another, and its numerics."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mila_mm.ops import gated_linear_attention, gated_linear_attention_reference
from mila_mm.ops.gated import scan

LENGTHS = [1, 2, 63, 500]
BOTH = pytest.mark.parametrize(
    'function', [gated_linear_attention, gated_linear_attention_reference], ids=['op', 'reference']
)


def draw(tokens, channels=6, heads=2, states=3, batch=2, seed=0, dtype=torch.float64):
    """q, k, v, delta, a, D with what a model would give: positive keys and queries, positive delta, negative a."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64).to(dtype)

    return [
        uniform(batch, tokens, heads * states),
        uniform(batch, tokens, heads * states),
        uniform(batch, tokens, channels) - 0.5,
        uniform(batch, tokens, channels) + 0.1,
        -0.1 - uniform(states, channels),
        uniform(channels),
    ]


def gradients(y, leaves, seed=1):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True, materialize_grads=True)


@pytest.fixture
def small_segments(monkeypatch):
    """Let even short sequences have many segments."""
    monkeypatch.setattr(scan, '_STEP_ELEMENTS', {'cpu': 1, 'cuda': 1})


def equation_11(x, w_b, w_c, w_1, w_2, a, d):
    """Mamba's selective SSM as printed, on one sequence x (N, C), with nothing of the package."""
    h = torch.zeros_like(a)  # d x C
    rows = []
    for x_i in x.split(1):  # 1 x C
        delta = torch.log(1 + torch.exp(x_i @ w_1 @ w_2))
        h = torch.exp(a * delta) * h + (x_i @ w_b).t() @ (delta * x_i)
        rows.append((x_i @ w_c) @ h / 1 + d * x_i)
    return torch.cat(rows)


@pytest.mark.parametrize('chunk_size', [1, 7, 64])
@pytest.mark.parametrize('tokens', LENGTHS)
@pytest.mark.parametrize('borders', ['one segment', 'many segments'])
def test_mambas_parametrisation_equals_equation_11(tokens, chunk_size, borders, request):
    if borders == 'many segments':
        request.getfixturevalue('small_segments')
    torch.manual_seed(0)
    channels, states, hidden = 4, 3, 2
    shapes = [(tokens, channels), (channels, states), (channels, states), (channels, hidden), (hidden, channels)]
    leaves = [torch.randn(s, dtype=torch.float64) for s in shapes]
    leaves += [-torch.rand(states, channels, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)]
    for leaf in leaves:
        leaf.requires_grad_()
    x, w_b, w_c, w_1, w_2, a, d = leaves
    expected = equation_11(*leaves)
    delta = F.softplus(x @ w_1 @ w_2)[None]
    got = gated_linear_attention(
        (x @ w_c)[None],
        (x @ w_b)[None],
        x[None],
        input_gate=delta,
        forget_gate=(delta, a),
        shortcut=d,
        normalize=False,
        chunk_size=chunk_size,
    )[0]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    for name, mine, theirs in zip(
        ['x', 'W_B', 'W_C', 'W_1', 'W_2', 'A', 'D'], gradients(got, leaves), gradients(expected, leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f'{name}: {m}')


@pytest.mark.parametrize(('tokens', 'fast'), [(1, False), (2, False), (9, False), (63, True), (500, True)])
@pytest.mark.parametrize('normalize', [False, True])
def test_gradcheck(tokens, fast, normalize, small_segments):
    leaves = [t.requires_grad_() for t in draw(tokens, channels=4, heads=2, states=2, batch=1)]

    def function(q, k, v, delta, a, d):
        return gated_linear_attention(
            q,
            k,
            v,
            num_heads=2,
            input_gate=delta,
            forget_gate=(delta, a),
            shortcut=d,
            normalize=normalize,
            chunk_size=2,
        )

    assert torch.autograd.gradcheck(function, leaves, fast_mode=fast)


def weighted_sums(q, k, v, heads, causal):
    """Linear attention by its N x N weights."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = q @ k.transpose(-2, -1)
    weights = weights.tril() if causal else weights
    return (weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2)


@BOTH
@pytest.mark.parametrize('tokens', LENGTHS)
@pytest.mark.parametrize('causal', [False, True], ids=['global', 'causal'])
@pytest.mark.parametrize('gates', ['absent', 'trivial'])
def test_without_gates_it_is_linear_attention(function, tokens, causal, gates):
    q, k, v, *_ = leaves = [t.requires_grad_() for t in draw(tokens)[:3]]
    options = {}
    if gates == 'trivial':
        options = dict(input_gate=torch.ones_like(v), shortcut=v.new_zeros(v.shape[-1]))
        if causal:
            options['forget_gate'] = torch.zeros_like(v), -v.new_ones(3, v.shape[-1])
    got = function(q, k, v, num_heads=2, causal=causal, eps=0.0, **options)
    expected = weighted_sums(q, k, v, 2, causal)
    torch.testing.assert_close(got, expected)
    for mine, theirs in zip(gradients(got, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_the_last_token_of_the_causal_form_sees_what_the_global_one_does():
    q, k, v, *_ = draw(130)
    every, before = (gated_linear_attention(q, k, v, num_heads=2, causal=causal) for causal in (False, True))
    torch.testing.assert_close(every[:, -1], before[:, -1])
    assert not torch.allclose(every[:, 0], before[:, 0])


@settings(deadline=None, max_examples=25)
@given(
    data=st.data(),
    tokens=st.integers(1, 40),
    heads=st.integers(1, 3),
    states=st.integers(1, 4),
    chunk_size=st.integers(1, 50),
)
def test_any_combination_equals_the_reference(data, tokens, heads, states, chunk_size):
    forgets, normalize, gated, shortcut, passed, norm_q, norm_k = (data.draw(st.booleans()) for _ in range(7))
    causal = None if forgets else data.draw(st.booleans())

    def run(function, **more):
        q, k, v, delta, a, d = leaves = [t.requires_grad_() for t in draw(tokens, 2 * heads, heads, states)]
        y = function(
            q,
            k,
            v,
            num_heads=heads,
            normalize=normalize,
            causal=causal,
            input_gate=delta if gated else None,
            forget_gate=(delta, a) if forgets else None,
            shortcut=d if shortcut else None,
            x=delta * v if passed else None,
            norm_q=q * q if norm_q else None,
            norm_k=k + 1 if norm_k else None,
            **more,
        )
        return y, *gradients(y, leaves)

    for mine, theirs in zip(
        run(gated_linear_attention, chunk_size=chunk_size), run(gated_linear_attention_reference), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


TINY, NEARLY_ONE = math.log(1e-6), math.log1p(-1e-6)


def extreme_gates(kind, tokens, channels):
    """Logarithms of gates from 1e-6 to 1 - 1e-6 for a = -1, (1, tokens, channels), fp64."""
    g = torch.Generator().manual_seed(3)
    if kind == 'least':
        logs = torch.full((1, tokens, channels), TINY, dtype=torch.float64)
    elif kind == 'most':
        logs = torch.full((1, tokens, channels), NEARLY_ONE, dtype=torch.float64)
    elif kind == 'in turn':
        logs = torch.tensor([TINY, NEARLY_ONE], dtype=torch.float64).repeat(tokens // 2)[None, :, None]
        logs = logs.expand(1, tokens, channels).contiguous()
    else:
        logs = F.logsigmoid(
            torch.empty(1, tokens, channels, dtype=torch.float64).uniform_(-13.8155, 13.8155, generator=g)
        )
    return logs


@pytest.mark.parametrize('kind', ['least', 'most', 'in turn', 'at random'])
@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_extreme_gates_over_4096_tokens(kind, normalize, dtype):
    q, k, v, *_ = draw(4096, channels=4, heads=1, states=4, batch=1)
    delta = -extreme_gates(kind, 4096, 4)
    a = -torch.ones(4, 4, dtype=torch.float64)
    # What the 16 bits lose of the inputs is not the operator's.
    low = [t.to(dtype) for t in (q, k, v)] + [delta.float(), a.float()]
    exact = [t.double().requires_grad_() for t in low]
    low = [t.requires_grad_() for t in low]
    with torch.autocast('cpu', torch.bfloat16 if dtype == torch.float32 else dtype, enabled=dtype != torch.float32):
        got = gated_linear_attention(*low[:3], forget_gate=tuple(low[3:]), normalize=normalize)
    expected = gated_linear_attention(*exact[:3], forget_gate=tuple(exact[3:]), normalize=normalize)
    assert got.dtype == torch.float32 and got.isfinite().all()
    scale = expected.abs().max()
    torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=1e-5)
    for name, mine, theirs in zip(
        ['q', 'k', 'v', 'delta', 'a'], gradients(got, low), gradients(expected, exact), strict=True
    ):
        assert mine.isfinite().all(), name
        scale = theirs.abs().max() + 1e-30
        tolerance = 1e-4 if mine.dtype == torch.float32 else 1e-2  # the gradient itself is rounded to 16 bits
        assert ((mine.double() - theirs).abs().max() / scale).item() < tolerance, name


def test_the_fp64_scan_behind_the_extremes_equals_the_recurrence():
    q, k, v, *_ = draw(4096, channels=2, heads=1, states=2, batch=1)
    gate = -extreme_gates('at random', 4096, 2), -torch.ones(2, 2, dtype=torch.float64)
    torch.testing.assert_close(
        gated_linear_attention(q, k, v, forget_gate=gate), gated_linear_attention_reference(q, k, v, forget_gate=gate)
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_in_16_bits_out_and_fp32_inside(dtype):
    q, k, v, delta, a, d = (t.to(dtype) for t in draw(300))
    for gate in (None, (delta, a)):
        y = gated_linear_attention(q, k, v, num_heads=2, forget_gate=gate, shortcut=d)
        expected = gated_linear_attention(
            *(t.double() for t in (q, k, v)),
            num_heads=2,
            shortcut=d.double(),
            forget_gate=None if gate is None else tuple(t.double() for t in gate),
        )
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(num_heads=4), r'expected num_heads to divide the widths 6 and 6, got 4'),
        (dict(causal=False), 'expected causal to be True or None with a forget gate, got False'),
        (dict(forget_gate=(torch.zeros(2, 5, 6), torch.zeros(6, 3))), r'of shapes \(2, 5, 6\) and \(3, 6\), got'),
        (dict(input_gate=torch.zeros(2, 5, 1)), r'expected input_gate of the shape of v, \(2, 5, 6\), got \(2, 5, 1\)'),
        (dict(shortcut=torch.zeros(5)), r'expected shortcut of shape \(6,\), got \(5,\)'),
        (dict(norm_q=torch.zeros(2, 5, 3)), 'expected norm_q and norm_k of the shape of q'),
        (dict(k=torch.zeros(2, 4, 6)), r'expected q and k of one shape \(2, 5, heads \* d\)'),
        (dict(v=torch.zeros(2, 0, 6)), 'with N above 0'),
        (dict(chunk_size=0), 'expected chunk_size above 0, got 0'),
        (dict(backend='cuda'), "expected backend to be one of auto, reference, got 'cuda'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_mistakes_are_named(change, message):
    q, k, v, delta, a, _ = draw(5)
    options = dict(q=q, k=k, v=v, num_heads=2, forget_gate=(delta, a)) | change
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(options.pop('q'), options.pop('k'), options.pop('v'), **options)
