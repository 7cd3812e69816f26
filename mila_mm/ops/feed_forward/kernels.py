"""Kernels of the MLP; h = x W1^T + b1, a = gelu(h) = h Phi(h), y = shortcut + scale (a W2^T + b2).

======================  ====================  ==============================================
kernel                  reads                 writes
======================  ====================  ==============================================
mlp                     x (, shortcut)        y
gelu_backward           h, da                 a, dh, parts of db1
hidden_backward         x, dy                 a, dh, parts of db1
======================  ====================  ==============================================

`mlp` takes the hidden units chunk by chunk: neither h nor a is in memory. The backward computes h again with an
ordinary matrix product; `gelu_backward` then turns h into a and da into dh = da (Phi(h) + h phi(h)) where they are.
`hidden_backward` takes these two products as well: h and da are not in memory either.
"""

import triton
import triton.language as tl

from mila_mm.ops.triton.common import image_offset, power_of_2, widen

SIZES = ['tokens', 'rows', 'rows_per_split', 'x_batch_stride', 'shortcut_batch_stride']


@triton.jit
def normal_cdf(x):
    """The distribution function Phi of the normal distribution."""
    return 0.5 + 0.5 * tl.erf(x * 0.70710678118654752440)


@triton.jit
def add_product(total, a, b, LOW: tl.constexpr, DTYPE: tl.constexpr):
    """``total`` + a b with an fp32 sum: operands of 16 bits where ``LOW``, else fp32, as the interpreter needs it."""
    if LOW:
        return tl.dot(a.to(DTYPE), b.to(DTYPE), total)
    return tl.dot(widen(a), widen(b), total, input_precision='ieee')


@triton.jit(do_not_specialize=SIZES)
def mlp_kernel(
    x_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr, shortcut_ptr, scale_ptr, y_ptr,
    x_batch_stride, x_token_stride, shortcut_batch_stride, shortcut_token_stride, tokens, hidden,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_SHORTCUT: tl.constexpr, HAS_SCALE: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """y for a block of tokens of one image. Grid: blocks, 1, batch.

    fc1_weight (hidden, CHANNELS) and fc2_weight (CHANNELS, hidden) are contiguous, and of x's dtype where ``LOW``.
    """
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    local = tl.arange(0, BLOCK)
    channel = tl.arange(0, PADDED)
    live = channel < CHANNELS
    mask = (first + local < tokens)[:, None] & live[None, :]
    x_ptr += image_offset(batch, x_batch_stride, ALIGNED) + first * x_token_stride
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + local[:, None] * x_token_stride + channel[None, :], mask=mask, other=0.0)

    total = tl.zeros((BLOCK, PADDED), tl.float32)
    for begin in tl.range(0, hidden, CHUNK, num_stages=STAGES):
        unit = begin + tl.arange(0, CHUNK)
        unit_live = unit < hidden
        weight = tl.load(
            fc1_weight_ptr + unit[:, None] * CHANNELS + channel[None, :],
            mask=unit_live[:, None] & live[None, :],
            other=0.0,
        )
        h = add_product(tl.zeros((BLOCK, CHUNK), tl.float32), x, tl.trans(weight), LOW, dtype)
        h += tl.load(fc1_bias_ptr + unit, mask=unit_live, other=0.0).to(tl.float32)[None, :]
        weight = tl.load(
            fc2_weight_ptr + channel[:, None] * hidden + unit[None, :],
            mask=live[:, None] & unit_live[None, :],
            other=0.0,
        )
        total = add_product(total, h * normal_cdf(h), tl.trans(weight), LOW, dtype)

    total += tl.load(fc2_bias_ptr + channel, mask=live, other=0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        total *= tl.load(scale_ptr + batch).to(tl.float32)
    if HAS_SHORTCUT:
        shortcut_ptr += image_offset(batch, shortcut_batch_stride, ALIGNED) + first * shortcut_token_stride
        other = shortcut_ptr + local[:, None] * shortcut_token_stride + channel[None, :]
        total += widen(tl.load(other, mask=mask, other=0.0))
    target = y_ptr + (batch * tokens + first) * CHANNELS + local[:, None] * CHANNELS + channel[None, :]
    tl.store(target, total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_slope(h, phi):
    """The derivative of the GELU, of which ``phi`` is the distribution function at ``h``."""
    return phi + h * (power_of_2(h * h * -0.72134752044448170368) * 0.39894228040143267794)


@triton.jit(do_not_specialize=SIZES)
def gelu_backward_kernel(
    h_ptr, grad_ptr, parts_ptr, hidden, rows, rows_per_split, BLOCK: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """In place: h (rows, hidden) to gelu(h), its gradient to that of h; and parts (splits, hidden) of that one's sum.

    Grid: blocks of hidden units, splits.
    """
    unit = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    live = unit < hidden
    first = tl.program_id(1).to(tl.int64) * rows_per_split
    count = tl.minimum(rows_per_split, rows - first).to(tl.int32)
    h_ptr += first * hidden
    grad_ptr += first * hidden
    total = tl.zeros((BLOCK, CHANNELS), tl.float32)
    for begin in tl.range(0, count, BLOCK, num_stages=1):
        row = begin + tl.arange(0, BLOCK)
        mask = (row < count)[:, None] & live[None, :]
        offset = row[:, None] * hidden + unit[None, :]
        h = widen(tl.load(h_ptr + offset, mask=mask, other=0.0))
        grad = widen(tl.load(grad_ptr + offset, mask=mask, other=0.0))
        phi = normal_cdf(h)
        grad *= gelu_slope(h, phi)
        total += grad
        tl.store(h_ptr + offset, (h * phi).to(h_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_ptr + offset, grad.to(grad_ptr.dtype.element_ty), mask=mask)
    tl.store(parts_ptr + tl.program_id(1).to(tl.int64) * hidden + unit, tl.sum(total, axis=0), mask=live)


@triton.jit(do_not_specialize=SIZES)
def hidden_backward_kernel(
    x_ptr, grad_ptr, fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, activated_ptr, grad_hidden_ptr, parts_ptr,
    hidden, rows, rows_per_split,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """From x and the gradient of y, both (rows, CHANNELS): gelu(h) and the gradient of h, (rows, hidden).

    And parts (splits, hidden) of the sum of the latter. All matrices are contiguous. Grid: chunks of hidden units,
    splits.
    """
    unit = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    unit_live = unit < hidden
    channel = tl.arange(0, PADDED)
    live = channel < CHANNELS
    first = tl.program_id(1).to(tl.int64) * rows_per_split
    count = tl.minimum(rows_per_split, rows - first).to(tl.int32)
    x_ptr += first * CHANNELS
    grad_ptr += first * CHANNELS
    activated_ptr += first * hidden
    grad_hidden_ptr += first * hidden
    dtype = x_ptr.dtype.element_ty
    source, weight_live = unit[:, None] * CHANNELS + channel[None, :], unit_live[:, None] & live[None, :]
    fc1 = tl.load(fc1_weight_ptr + source, mask=weight_live, other=0.0)
    source, weight_live = channel[:, None] * hidden + unit[None, :], live[:, None] & unit_live[None, :]
    fc2 = tl.load(fc2_weight_ptr + source, mask=weight_live, other=0.0)
    bias = tl.load(fc1_bias_ptr + unit, mask=unit_live, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK, CHUNK), tl.float32)
    for begin in tl.range(0, count, BLOCK, num_stages=1):
        row = begin + tl.arange(0, BLOCK)
        row_live = (row < count)[:, None]
        offset = row[:, None] * CHANNELS + channel[None, :]
        x = tl.load(x_ptr + offset, mask=row_live & live[None, :], other=0.0)
        grad = tl.load(grad_ptr + offset, mask=row_live & live[None, :], other=0.0)
        h = add_product(tl.zeros((BLOCK, CHUNK), tl.float32), x, tl.trans(fc1), LOW, dtype) + bias[None, :]
        of_h = add_product(tl.zeros((BLOCK, CHUNK), tl.float32), grad, fc2, LOW, dtype)
        phi = normal_cdf(h)
        of_h *= gelu_slope(h, phi)
        total += of_h
        offset = row[:, None] * hidden + unit[None, :]
        mask = row_live & unit_live[None, :]
        tl.store(activated_ptr + offset, (h * phi).to(dtype), mask=mask)
        tl.store(grad_hidden_ptr + offset, of_h.to(dtype), mask=mask)
    tl.store(parts_ptr + tl.program_id(1).to(tl.int64) * hidden + unit, tl.sum(total, axis=0), mask=unit_live)
