"""The attention op on the CPU: its specification, its closed form, its registration and its dispatch."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mila_mm.ops import mila_attention, mila_attention_reference, rope_tables
from mila_mm.ops.attention import closed_form
from mila_mm.ops.rope import rope_grid

# batch, height, width, channels, heads: odd; a head across the halves of RoPE; one row, one column, one token; wide
SHAPES = [
    (2, 7, 11, 64, 2),
    (1, 5, 9, 96, 3),
    (1, 1, 13, 64, 2),
    (1, 13, 1, 64, 4),
    (1, 1, 1, 32, 1),
    (3, 4, 16, 32, 2),
]


def draw(batch, height, width, channels, dtype=torch.float64, mean=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = (batch, height * width)
    activation = (*tokens, channels)
    shapes = [(*tokens, 2 * channels), activation, (channels, 1, 3, 3), (channels,), activation]
    tensors = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    tensors[0] += mean
    return [t.to(dtype) for t in tensors]


def run(function, inputs, spatial_shape, heads, grad=None, **options):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves[:4], spatial_shape, heads, leaves[4], **options)
    y.backward(torch.ones_like(y) if grad is None else grad)
    return y.detach(), [leaf.grad for leaf in leaves]


def by_the_formula(qk, v, weight, bias, height, width, heads, gate):
    """The formula token by token in Python floats: slow, and independent of everything in the package."""
    n, c = v.shape
    d, k = c // heads, c // 4
    f = [[x + 1 if x > 0 else math.exp(x) for x in row] for row in qk.tolist()]
    rotated = []
    for token in range(n):
        row, column = divmod(token, width)
        out = []
        for half in (f[token][:c], f[token][c:]):
            turned = list(half)
            for j in range(c // 2):
                angle = row * 10000 ** (-j / k) if j < k else column * 10000 ** (-(j - k) / k)
                a, b = half[2 * j], half[2 * j + 1]
                turned[2 * j] = a * math.cos(angle) - b * math.sin(angle)
                turned[2 * j + 1] = b * math.cos(angle) + a * math.sin(angle)
            out.append(turned)
        rotated.append(out)
    y = torch.zeros(n, c, dtype=torch.float64)
    for token in range(n):
        row, column = divmod(token, width)
        for channel in range(c):
            head = range(channel // d * d, channel // d * d + d)
            z = 1 / (sum(f[token][i] * sum(f[m][c + i] for m in range(n)) / n for i in head) + 1e-6)
            total = (
                sum(sum(rotated[token][0][i] * rotated[m][1][i] for i in head) * v[m, channel] for m in range(n))
                / n
                * z
            )
            total += bias[channel]
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= row + dy < height and 0 <= column + dx < width:
                        total += weight[channel, 0, dy + 1, dx + 1] * v[(row + dy) * width + column + dx, channel]
            g = gate[token, channel].item()
            y[token, channel] = total * g / (1 + math.exp(-g))
    return y


@pytest.mark.parametrize('function', [mila_attention, mila_attention_reference], ids=['op', 'reference'])
@pytest.mark.parametrize('shape', [(3, 5, 16, 2), (4, 2, 12, 3), (1, 1, 8, 1)], ids=str)
def test_equals_the_formula(shape, function):
    height, width, channels, heads = shape
    inputs = draw(1, height, width, channels)
    expected = by_the_formula(inputs[0][0], inputs[1][0], inputs[2], inputs[3], height, width, heads, inputs[4][0])
    got = function(*inputs[:4], (height, width), heads, inputs[4])[0]
    # The tables are fp32 on purpose, so agreement ends there.
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize('with_gate', [True, False], ids=['gate', 'no_gate'])
@pytest.mark.parametrize('with_lepe', [True, False], ids=['lepe', 'no_lepe'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_closed_form_equals_autograd_of_the_reference(shape, with_lepe, with_gate):
    batch, height, width, channels, heads = shape
    qk, v, weight, bias, gate = draw(batch, height, width, channels)
    grad = torch.randn(v.shape, dtype=v.dtype, generator=torch.Generator().manual_seed(5))
    results = []
    for function in (mila_attention, mila_attention_reference):
        given_ = [qk, v, *((weight, bias) if with_lepe else ()), *((gate,) if with_gate else ())]
        leaves = [t.clone().requires_grad_() for t in given_]
        lepe = leaves[2:4] if with_lepe else (None, None)
        y = function(leaves[0], leaves[1], *lepe, (height, width), heads, leaves[-1] if with_gate else None)
        results.append((y.detach(), torch.autograd.grad(y, leaves, grad)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('function', [mila_attention, mila_attention_reference], ids=['op', 'reference'])
def test_gradcheck(function):
    inputs = [t.requires_grad_() for t in draw(1, 2, 3, 32)]
    assert torch.autograd.gradcheck(lambda *t: function(*t[:4], (2, 3), 2, t[4]), inputs, fast_mode=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('mean', [0.0, -6.0, -20.0, 30.0])
@pytest.mark.parametrize('function', [mila_attention, mila_attention_reference], ids=['op', 'reference'])
def test_low_precision_stays_at_the_rounding_of_the_output(function, dtype, mean):
    inputs = draw(2, 9, 14, 64, dtype, mean)
    grad = torch.randn(2, 126, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    y, grads = run(function, inputs, (9, 14), 2, grad)
    exact_y, exact = run(mila_attention_reference, [t.double() for t in inputs], (9, 14), 2, grad.double())
    limits = {torch.float32: (2e-6, 2e-5), torch.bfloat16: (3e-3, 6e-3), torch.float16: (5e-4, 1e-3)}[dtype]
    tiniest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for got, expected, limit in zip((y, *grads), (exact_y, *exact), (limits[0], *[limits[1]] * 5), strict=True):
        error = (got.double() - expected).square().mean().sqrt()
        bound = limit * expected.square().mean().sqrt() + tiniest
        assert got.dtype == dtype and error <= bound, f'{error:.1e} > {bound:.1e}'


def test_fp16_where_every_feature_underflows():
    inputs = draw(1, 4, 4, 32, torch.float16)
    inputs[0].fill_(-20)
    y, grads = run(mila_attention, inputs, (4, 4), 1)
    assert y.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_a_nan_image_leaves_the_others_alone():
    inputs = draw(3, 5, 6, 32, torch.float32)
    clean = mila_attention(*inputs[:4], (5, 6), 2, inputs[4])
    inputs[1][1] = float('nan')
    y = mila_attention(*inputs[:4], (5, 6), 2, inputs[4])
    assert torch.equal(y[[0, 2]], clean[[0, 2]]) and y[1].isnan().any()


@settings(deadline=None, max_examples=20)
@given(heads=st.sampled_from([1, 2, 3]), mean=st.floats(-3, 3), seed=st.integers(0, 99))
def test_one_token_attends_to_itself_alone(heads, mean, seed):
    qk, v, *_ = draw(2, 1, 1, 16 * heads, mean=mean, seed=seed)
    torch.testing.assert_close(mila_attention(qk, v, None, None, (1, 1), heads, eps=0.0), v)


@settings(deadline=None, max_examples=20)
@given(height=st.integers(1, 9), width=st.integers(1, 9), factor=st.floats(-8, 8), seed=st.integers(0, 99))
def test_linear_in_the_values(height, width, factor, seed):
    inputs = draw(1, height, width, 32, seed=seed)
    other = torch.randn_like(inputs[1])

    def attend(v):
        return mila_attention(inputs[0], v, inputs[2], torch.zeros_like(inputs[3]), (height, width), 2)

    torch.testing.assert_close(attend(inputs[1] + factor * other), attend(inputs[1]) + factor * attend(other))


@pytest.mark.parametrize(
    'layout', ['sliced', 'channels_last', 'transposed_qk', 'expanded_grad', 'transposed_grad', 'offset']
)
def test_layouts(layout):
    batch, height, width, channels = 2, 5, 6, 32
    inputs = draw(batch, height, width, channels)
    grad = torch.randn(batch, 30, channels, dtype=torch.float64)
    expected_inputs = [t.clone() for t in inputs]
    if layout == 'sliced':
        inputs[0] = torch.cat([inputs[0], inputs[0]], dim=-1)[..., : 2 * channels]
    elif layout == 'channels_last':
        inputs[1] = inputs[1].transpose(1, 2).contiguous().transpose(1, 2)
        inputs[4] = inputs[4].transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == 'transposed_qk':
        inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == 'expanded_grad':
        grad = torch.ones((), dtype=torch.float64).expand(batch, 30, channels)
    elif layout == 'transposed_grad':
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        inputs[1] = torch.cat([inputs[1].flatten().new_zeros(1), inputs[1].flatten()])[1:].view(batch, 30, channels)
    results = []
    for tensors in (inputs, expected_inputs):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = mila_attention(*leaves[:4], (height, width), 2, leaves[4])
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_master_weights_keep_their_dtype():
    inputs = draw(1, 4, 5, 32, torch.bfloat16)
    inputs[2], inputs[3] = inputs[2].float(), inputs[3].float()
    y, grads = run(mila_attention, inputs, (4, 5), 1)
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]


@pytest.mark.parametrize('backend', ['auto', 'reference'])
def test_autocast_casts_activations_only(backend):
    inputs = draw(1, 4, 5, 32, torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y, grads = run(mila_attention, inputs, (4, 5), 1, backend=backend)
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)


def test_autocast_takes_mixed_dtypes():
    qk, v, _, _, gate = draw(1, 4, 5, 32, torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = mila_attention(qk.bfloat16(), v, None, None, (4, 5), 1, gate)
    assert y.dtype == torch.bfloat16


def test_rope_tables_grow_and_hold_the_definition():
    cos, sin = rope_tables(5, 32, 10000.0, torch.device('cpu'))
    again, _ = rope_tables(3, 32, 10000.0, torch.device('cpu'))
    assert again is cos and cos.dtype == torch.float32 and cos.shape[1] == 8
    longer, _ = rope_tables(1000, 32, 10000.0, torch.device('cpu'))
    assert longer.shape[0] >= 1000 and torch.equal(longer[: cos.shape[0]], cos)
    angle = torch.tensor([3 * 10000 ** (-i / 8) for i in range(8)], dtype=torch.float64)
    torch.testing.assert_close(cos[3].double(), angle.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[3].double(), angle.sin(), rtol=0, atol=1e-6)
    grid = rope_grid(4, 6, 32, 10000.0, torch.device('cpu'))
    assert torch.equal(grid[2 * 6 + 5, :8, 0], cos[2]) and torch.equal(grid[2 * 6 + 5, 8:, 1], sin[5])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(backend='cuda'), 'backend to be one of auto, triton, reference'),
        (dict(spatial_shape=(4, 6)), r'v of N = H \* W tokens for spatial_shape \(4, 6\), got 20'),
        (dict(spatial_shape=20), r'spatial_shape to be \(H, W\), got 20'),
        (dict(spatial_shape=(4.0, 5.0)), r'spatial_shape to be two integers, got \(4.0, 5.0\)'),
        (dict(spatial_shape=(-4, -5)), r'spatial_shape \(-4, -5\), got 20'),
        (dict(num_heads='2'), "num_heads to be an integer, got '2'"),
        (dict(v=torch.zeros(1, 32, 4, 5)), r'images \(B, C, H, W\) are v.flatten\(2\).transpose\(1, 2\), got'),
        (dict(qk=torch.zeros(1, 20, 64, device='meta')), 'qk and v on one device, got'),
        (dict(lepe_bias=torch.zeros(32, dtype=torch.long)), 'lepe_weight and lepe_bias of floating dtypes, got'),
        (dict(num_heads=3), 'num_heads to divide the width 32, got 3'),
        (dict(qk=torch.zeros(1, 20, 32)), r'qk of shape \(B, N, 2C\) = \(1, 20, 64\) to go with v, got \(1, 20, 32\)'),
        (dict(lepe_bias=None), 'lepe_weight and lepe_bias, or neither'),
        (dict(lepe_weight=torch.zeros(32, 3, 3)), r'lepe_weight of shape \(32, 1, 3, 3\)'),
        (dict(gate=torch.zeros(1, 20, 16)), 'gate of the shape of v'),
        (dict(gate=torch.zeros(1, 20, 32, dtype=torch.half)), 'gate of the dtype of v'),
        (dict(v=torch.zeros(1, 20, 32, dtype=torch.half)), 'qk and v both fp16, bf16, fp32 or fp64, got'),
    ],
    ids=lambda x: '' if isinstance(x, str) else next(iter(x)),
)
def test_a_wrong_argument_says_expected_and_got(change, message):
    qk, v, weight, bias, gate = draw(1, 4, 5, 32, torch.float32)
    arguments = dict(qk=qk, v=v, lepe_weight=weight, lepe_bias=bias, spatial_shape=(4, 5), num_heads=2, gate=gate)
    with pytest.raises(ValueError, match=message):
        mila_attention(**{**arguments, **change})


def test_triton_by_name_on_the_cpu_says_why_not():
    qk, v, *_ = draw(1, 4, 5, 32, torch.float32)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here: expected CUDA tensors, got cpu"):
        mila_attention(qk, v, None, None, (4, 5), 1, backend='triton')


@pytest.mark.parametrize('with_gate', [False, True])
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_a_large_map_taken_in_bands_is_the_same(dtype, with_gate, monkeypatch):
    """Batches, bands that end anywhere in a row, and qk, v, gate that are read in place."""
    channels, height, width = 24, 23, 31
    buffer = torch.randn(2, height * width, 4 * channels, dtype=torch.float64).to(dtype)
    qk, v, gate = buffer.split((2 * channels, channels, channels), dim=-1)
    lepe = torch.randn(channels, 1, 3, 3), torch.randn(channels)
    arguments = (qk, v, *lepe, gate if with_gate else None, height, width, 3, 1e-6, 10000.0)
    whole = closed_form.attention_forward(*arguments)
    monkeypatch.setattr(closed_form, 'BAND', 50 * channels)
    y, *sums = torch.ops.mila_mm.attention_forward(*arguments)
    assert y.dtype == dtype
    torch.testing.assert_close([y, *sums], list(whole))


def test_large_sums_do_not_drift():
    """At 64,000 tokens an fp32 result keeps the accuracy of a small one."""
    inputs = draw(1, 200, 320, 32, torch.float32)
    y = mila_attention(*inputs[:4], (200, 320), 1, inputs[4])
    exact = mila_attention_reference(*[t.double() for t in inputs[:4]], (200, 320), 1, inputs[4].double())
    assert (y - exact).square().mean().sqrt() / exact.square().mean().sqrt() < 1e-6


def test_gate_is_before_its_silu():
    qk, v, weight, bias, gate = draw(1, 4, 5, 32)
    torch.testing.assert_close(
        mila_attention(qk, v, weight, bias, (4, 5), 2, gate),
        mila_attention(qk, v, weight, bias, (4, 5), 2) * F.silu(gate),
    )
