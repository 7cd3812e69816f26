"""Kernels that walk tokens as rows: sums of columns, and LayerNorm.

    y_n = gamma h_n + beta       h_n = (x_n - mean_n) rstd_n        means over channels, all in fp32
    g_n = rstd_n (gamma dy_n - mean(gamma dy_n) - h_n mean(gamma dy_n h_n)) (+ the gradient of another use of x)

======================  ====================  ==============================================
kernel                  reads                 writes
======================  ====================  ==============================================
column_parts            x                     parts of its sum over rows
column_reduce           parts                 their sum
layer_norm              x                     y, mean, rstd
norm_backward           x, dy (, dx)          g, parts of dgamma and dbeta (, of the sum of dx)
======================  ====================  ==============================================

Sums over rows take two stages of fixed order: parts of runs of rows, then their sum.
"""

import triton
import triton.language as tl

from mila_mm.ops.triton.common import image_offset, widen

SIZES = [
    'rows',
    'rows_per_split',
    'parts',
    'tokens',
    'tokens_per_split',
    'x_batch_stride',
    'grad_out_batch_stride',
    'grad_y_batch_stride',
    'out_batch_stride',
]


@triton.jit(do_not_specialize=SIZES)
def column_parts_kernel(
    x_ptr, parts_ptr, row_stride, channels, rows, rows_per_split,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The sum of a run of rows for a block of channels, in fp32. Grid: channel blocks, splits(, matrices).

    Each thread keeps sums of its own until the run ends. Several matrices lie one behind the other, and their parts.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < channels
    first = tl.program_id(1).to(tl.int64) * rows_per_split
    count = tl.minimum(rows_per_split, rows - first).to(tl.int32)
    matrix = tl.program_id(2).to(tl.int64)
    x_ptr += (matrix * rows + first) * row_stride
    total = tl.zeros((BLOCK, CHANNELS), tl.float32)
    for begin in tl.range(0, count, BLOCK, num_stages=1):
        row = begin + tl.arange(0, BLOCK)
        mask = (row < count)[:, None] & live[None, :]
        total += widen(tl.load(x_ptr + row[:, None] * row_stride + channel[None, :], mask=mask, other=0.0))
    part = matrix * tl.num_programs(1) + tl.program_id(1)
    tl.store(parts_ptr + part * channels + channel, tl.sum(total, axis=0), mask=live)


@triton.jit(do_not_specialize=SIZES)
def column_reduce_kernel(
    parts_ptr, first_ptr, second_ptr, channels, split_at, parts, BLOCK: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """The sum of parts (parts, channels); channels from ``split_at`` on go to the second result.

    Grid: channel blocks.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < channels
    total = tl.zeros((BLOCK, CHANNELS), tl.float32)
    for begin in tl.range(0, parts, BLOCK, num_stages=1):
        part = begin + tl.arange(0, BLOCK)
        offset = part.to(tl.int64)[:, None] * channels + channel[None, :]
        total += tl.load(parts_ptr + offset, mask=(part < parts)[:, None] & live[None, :], other=0.0)
    result = tl.sum(total, axis=0)
    tl.store(first_ptr + channel, result.to(first_ptr.dtype.element_ty), mask=live & (channel < split_at))
    rest = live & (channel >= split_at)
    tl.store(second_ptr + channel - split_at, result.to(second_ptr.dtype.element_ty), mask=rest)


@triton.jit(do_not_specialize=SIZES)
def layer_norm_kernel(
    x_ptr, gamma_ptr, beta_ptr, y_ptr, mean_ptr, rstd_ptr, x_batch_stride, x_token_stride, tokens, eps,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """y of a block of tokens with all their channels, and two numbers a token. Grid: blocks, 1, batch."""
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    local = tl.arange(0, BLOCK)
    live = first + local < tokens
    channel = tl.arange(0, PADDED)
    channel_live = channel < CHANNELS
    mask = live[:, None] & channel_live[None, :]
    x_ptr += image_offset(batch, x_batch_stride, ALIGNED) + first * x_token_stride
    first += batch * tokens
    x = widen(tl.load(x_ptr + local[:, None] * x_token_stride + channel[None, :], mask=mask, other=0.0))
    mean = tl.sum(x, axis=1) / CHANNELS
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / CHANNELS + eps)
    tl.store(mean_ptr + first + local, mean, mask=live)
    tl.store(rstd_ptr + first + local, rstd, mask=live)
    gamma = tl.load(gamma_ptr + channel, mask=channel_live, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + channel, mask=channel_live, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * gamma[None, :] + beta[None, :]
    target = y_ptr + first * CHANNELS + local[:, None] * CHANNELS + channel[None, :]
    tl.store(target, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def norm_backward_kernel(
    grad_out_ptr, grad_y_ptr, out_ptr, mean_ptr, rstd_ptr, gamma_ptr, scale_ptr, grad_ptr, parts_ptr,
    grad_out_batch_stride, grad_out_token_stride, grad_y_batch_stride, grad_y_token_stride,
    out_batch_stride, out_token_stride, tokens, tokens_per_split,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, RESIDUAL: tl.constexpr,
    SUMS: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Gradient of what went into a LayerNorm (``out``), and parts (batch * splits, SUMS, CHANNELS) of dgamma and dbeta.

    ``RESIDUAL``: plus ``grad_out``, the gradient from its other use. Where ``SUMS`` is 3 parts of its sum follow, times
    the image's ``scale`` if there is one: it is the gradient of the bias of what has been added to make ``out``. Grid:
    splits, 1, batch, each a run of tokens of one image.
    """
    batch = tl.program_id(2).to(tl.int64)
    program = batch * tl.num_programs(0) + tl.program_id(0)
    first = tl.program_id(0).to(tl.int64) * tokens_per_split
    count = tl.minimum(tokens_per_split, tokens - first)
    channel = tl.arange(0, PADDED)
    channel_live = channel < CHANNELS
    grad_out_ptr += image_offset(batch, grad_out_batch_stride, ALIGNED) + first * grad_out_token_stride
    grad_y_ptr += image_offset(batch, grad_y_batch_stride, ALIGNED) + first * grad_y_token_stride
    out_ptr += image_offset(batch, out_batch_stride, ALIGNED) + first * out_token_stride
    first += batch * tokens
    gamma = tl.load(gamma_ptr + channel, mask=channel_live, other=0.0).to(tl.float32)

    gamma_sum = tl.zeros((BLOCK, PADDED), tl.float32)
    beta_sum = tl.zeros((BLOCK, PADDED), tl.float32)
    other_sum = tl.zeros((BLOCK, PADDED), tl.float32)
    for begin in tl.range(0, count.to(tl.int32), BLOCK, num_stages=1):
        local = begin + tl.arange(0, BLOCK)
        live = local < count
        mask = live[:, None] & channel_live[None, :]
        grad_y = widen(
            tl.load(grad_y_ptr + local[:, None] * grad_y_token_stride + channel[None, :], mask=mask, other=0.0)
        )
        out = tl.load(out_ptr + local[:, None] * out_token_stride + channel[None, :], mask=mask, other=0.0)
        mean = tl.load(mean_ptr + first + local, mask=live, other=0.0)
        rstd = tl.load(rstd_ptr + first + local, mask=live, other=0.0)
        normal = tl.where(mask, (widen(out) - mean[:, None]) * rstd[:, None], 0.0)
        beta_sum += grad_y
        gamma_sum += grad_y * normal
        inner = grad_y * gamma[None, :]
        constant = tl.sum(inner, axis=1) / CHANNELS
        slope = tl.sum(inner * normal, axis=1) / CHANNELS
        inner = (inner - constant[:, None] - normal * slope[:, None]) * rstd[:, None]
        if RESIDUAL:
            source = grad_out_ptr + local[:, None] * grad_out_token_stride + channel[None, :]
            other = widen(tl.load(source, mask=mask, other=0.0))
            inner += other
            if SUMS == 3:
                other_sum += other
        target = grad_ptr + first * CHANNELS + local[:, None] * CHANNELS + channel[None, :]
        tl.store(target, inner.to(grad_ptr.dtype.element_ty), mask=mask)

    parts_ptr += program * (SUMS * CHANNELS) + channel
    tl.store(parts_ptr, tl.sum(gamma_sum, axis=0), mask=channel_live)
    tl.store(parts_ptr + CHANNELS, tl.sum(beta_sum, axis=0), mask=channel_live)
    if SUMS == 3:
        total = tl.sum(other_sum, axis=0)
        if HAS_SCALE:
            total *= tl.load(scale_ptr + batch).to(tl.float32)
        tl.store(parts_ptr + 2 * CHANNELS, total, mask=channel_live)
