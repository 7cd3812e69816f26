"""Kernels around the depthwise 3x3 convolutions of a block, on tokens in NHWC order.

With c(x)_n = sum_t w_t x_{n+t} over the nine taps t, and c^T its transpose, for each channel::

    cpe_norm:  x'_n = x_n + c(x)_n + b         y_n = gamma h_n + beta       h_n = (x'_n - mean_n) rstd_n
    dwc_silu:  p_n = c(x)_n + b                u_n = silu(p_n)

    g_n = dx'_n + rstd_n (gamma dy_n - mean(gamma dy_n) - h_n mean(gamma dy_n h_n))      (cpe_norm; means over channels)
    g_n = du_n silu'(p_n)                                                                (dwc_silu)
    dx_m = c^T(g)_m (+ g_m for cpe_norm)       dw_t = sum_m x_m g_{m-t}     db = sum_m g_m

======================  ====================  ==============================================
kernel                  reads                 writes
======================  ====================  ==============================================
cpe_norm                x (halo)              x', y, mean, rstd
dwc_silu                x (halo)              u
silu_backward           x (halo), du          g
stencil_backward        x, g (halo)           dx, parts of dw and db
======================  ====================  ==============================================

All arithmetic is in fp32. x' is rounded to its dtype before the norm, so that forward and backward see the same number.
The sums over tokens take two stages of fixed order, as those of the attention do.
"""

import triton
import triton.language as tl

from mila_mm.ops.attention.lepe_kernels import store_sum
from mila_mm.ops.triton.common import (
    image_offset,
    joined,
    load_row,
    load_tap,
    next_tile,
    sigmoid,
    stencil,
    tile_mask,
    tile_place,
    tile_tokens,
    widen,
)

SIZES = [
    'height',
    'width',
    'tiles',
    'tiles_across',
    'blocks',
    'tiles_per_split',
    'x_batch_stride',
    'grad_y_batch_stride',
]


@triton.jit(do_not_specialize=SIZES)
def cpe_norm_kernel(
    x_ptr, taps_ptr, bias_ptr, gamma_ptr, beta_ptr, out_ptr, y_ptr, mean_ptr, rstd_ptr,
    x_batch_stride, x_token_stride, height, width, eps,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """x' and its LayerNorm y for a tile of tokens with all their channels. Grid: tiles across, tiles down, batch."""
    _, first_row, first_column, first, batch, _ = tile_place(1, width, ROWS, COLUMNS)
    local, channels, mask = tile_mask(first_row, first_column, height, width, CHANNELS, PADDED, ROWS, COLUMNS)
    channel = tl.arange(0, PADDED)
    channel_live = channel < CHANNELS
    x_ptr += image_offset(batch, x_batch_stride, ALIGNED) + first * x_token_stride
    first += batch * height * width

    bias = tl.load(bias_ptr + channel, mask=channel_live, other=0.0).to(tl.float32)
    total = stencil(
        bias[None, :], x_ptr, x_token_stride, taps_ptr, CHANNELS, first_row, first_column, height, width,
        channel, channel_live, False, ROWS, COLUMNS, PADDED,
    )  # fmt: skip
    total += widen(tl.load(x_ptr + local * x_token_stride + channels, mask=mask, other=0.0))
    out = total.to(out_ptr.dtype.element_ty)
    offset = local * CHANNELS + channels
    tl.store(out_ptr + first * CHANNELS + offset, out, mask=mask)

    value = widen(out)
    mean = tl.sum(tl.where(mask, value, 0.0), axis=1) / CHANNELS
    centred = tl.where(mask, value - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / CHANNELS + eps)
    row, column = tile_tokens(ROWS, COLUMNS)
    live = (first_row + row < height) & (first_column + column < width)
    tl.store(mean_ptr + first + row * width + column, mean, mask=live)
    tl.store(rstd_ptr + first + row * width + column, rstd, mask=live)
    gamma = tl.load(gamma_ptr + channel, mask=channel_live, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + channel, mask=channel_live, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * gamma[None, :] + beta[None, :]
    tl.store(y_ptr + first * CHANNELS + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def before_silu(
    x_ptr, taps_ptr, bias_ptr, x_batch_stride, x_token_stride, channels, height, width, blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """p at one tile of tokens and one block of channels, then: image, first token, offsets in the tile, channels, mask.

    Grid: tiles across * channel blocks, tiles down, batch.
    """
    block, first_row, first_column, first, batch, _ = tile_place(blocks, width, ROWS, COLUMNS)
    local, index, mask = tile_mask(first_row, first_column, height, width, CHANNELS, CHANNELS, ROWS, COLUMNS)
    first_channel = block * CHANNELS
    channel_live = first_channel + tl.arange(0, CHANNELS) < channels
    x_ptr += image_offset(batch, x_batch_stride, ALIGNED) + first * x_token_stride + first_channel
    channel = first_channel + index
    bias = tl.load(bias_ptr + channel, mask=channel_live[None, :], other=0.0).to(tl.float32)
    total = stencil(
        bias, x_ptr, x_token_stride, taps_ptr + block * (9 * CHANNELS), CHANNELS, first_row, first_column, height,
        width, tl.arange(0, CHANNELS), channel_live, False, ROWS, COLUMNS, CHANNELS,
    )  # fmt: skip
    return total, batch, first, local, channel, mask & channel_live[None, :]


@triton.jit(do_not_specialize=SIZES)
def dwc_silu_kernel(
    x_ptr, taps_ptr, bias_ptr, y_ptr, x_batch_stride, x_token_stride, channels, height, width, blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr, ACCURATE: tl.constexpr,
):  # fmt: skip
    """u = silu(p). Grid: tiles across * channel blocks, tiles down, batch."""
    total, batch, first, local, channel, mask = before_silu(
        x_ptr, taps_ptr, bias_ptr, x_batch_stride, x_token_stride, channels, height, width, blocks,
        ROWS, COLUMNS, CHANNELS, ALIGNED,
    )  # fmt: skip
    y = total * sigmoid(total, ACCURATE)
    y_ptr += (batch * height * width + first) * channels
    tl.store(y_ptr + local * channels + channel, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def silu_backward_kernel(
    grad_y_ptr, x_ptr, taps_ptr, bias_ptr, grad_ptr, grad_y_batch_stride, grad_y_token_stride,
    x_batch_stride, x_token_stride, channels, height, width, blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr, ACCURATE: tl.constexpr,
):  # fmt: skip
    """g = du silu'(p), with p computed again. Grid: tiles across * channel blocks, tiles down, batch."""
    total, batch, first, local, channel, mask = before_silu(
        x_ptr, taps_ptr, bias_ptr, x_batch_stride, x_token_stride, channels, height, width, blocks,
        ROWS, COLUMNS, CHANNELS, ALIGNED,
    )  # fmt: skip
    grad_y_ptr += image_offset(batch, grad_y_batch_stride, ALIGNED) + first * grad_y_token_stride
    grad = widen(tl.load(grad_y_ptr + local * grad_y_token_stride + channel, mask=mask, other=0.0))
    part = sigmoid(total, ACCURATE)
    grad = grad * part * (1.0 + total * (1.0 - part))
    grad_ptr += (batch * height * width + first) * channels
    tl.store(grad_ptr + local * channels + channel, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pull_column(
    upper, lower, above, middle, below, upper_x, lower_x, index, grad_ptr, channels, taps_ptr, row, first_row,
    first_column, height, width, channel, channel_live, RIGHT: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """What g in one column of neighbours, at the tokens n - t of three taps t, adds.

    To c^T(g) in ``upper`` and ``lower``, the even and the odd rows, and to g x of the taps ``above``, ``middle`` and
    ``below``. Also returns g at the two rows themselves.
    """
    column = index % COLUMNS - RIGHT
    live = (first_column + column >= 0) & (first_column + column < width)
    place = (column * channels, live, first_row, height, channel, channel_live)
    w0 = load_tap(taps_ptr, CHANNELS, channel, channel_live, 1 + RIGHT, False)
    w1 = load_tap(taps_ptr, CHANNELS, channel, channel_live, 4 + RIGHT, False)
    w2 = load_tap(taps_ptr, CHANNELS, channel, channel_live, 7 + RIGHT, False)
    grad = load_row(grad_ptr, width * channels, row - 1, *place)
    upper += grad * w2
    below += grad * upper_x
    upper_grad = load_row(grad_ptr, width * channels, row, *place)
    upper += upper_grad * w1
    middle += upper_grad * upper_x
    lower += upper_grad * w2
    below += upper_grad * lower_x
    lower_grad = load_row(grad_ptr, width * channels, row + 1, *place)
    upper += lower_grad * w0
    above += lower_grad * upper_x
    lower += lower_grad * w1
    middle += lower_grad * lower_x
    grad = load_row(grad_ptr, width * channels, row + 2, *place)
    lower += grad * w0
    above += grad * lower_x
    return upper, lower, above, middle, below, upper_grad, lower_grad


@triton.jit(do_not_specialize=SIZES)
def stencil_backward_kernel(
    grad_ptr, x_ptr, taps_ptr, grad_x_ptr, parts_ptr, x_batch_stride, x_token_stride, channels,
    height, width, tiles, tiles_across, tiles_per_split,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dx, and parts (batch * splits, 10, channels) of dw (rows 0 to 8) and db (row 9), over a run of tiles.

    g at a token's nine neighbours serves all three, so it is loaded once, and for two rows at a time. Grid: channel
    blocks, splits, batch. g and dx are contiguous.
    """
    block = tl.program_id(0)
    index = tl.arange(0, ROWS // 2 * COLUMNS)
    row = index // COLUMNS * 2
    channel = tl.arange(0, CHANNELS)
    channel_live = block * CHANNELS + channel < channels
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += image_offset(batch, x_batch_stride, ALIGNED) + block * CHANNELS
    grad_ptr += batch * height * width * channels + block * CHANNELS
    grad_x_ptr += batch * height * width * channels + block * CHANNELS
    taps_ptr += block * (9 * CHANNELS)

    zero = tl.zeros((ROWS // 2 * COLUMNS, CHANNELS), tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    first_tile = tl.program_id(1) * tiles_per_split
    down, across = first_tile // tiles_across, first_tile % tiles_across
    for _ in tl.range(first_tile, tl.minimum(first_tile + tiles_per_split, tiles), num_stages=1):
        first_row, first_column = down * ROWS, across * COLUMNS
        first = (first_row * width + first_column).to(tl.int64)
        column = index % COLUMNS
        live = first_column + column < width
        place = (column * x_token_stride, live, first_row, height, channel, channel_live)
        upper_x = load_row(x_ptr + first * x_token_stride, width * x_token_stride, row, *place)
        lower_x = load_row(x_ptr + first * x_token_stride, width * x_token_stride, row + 1, *place)
        place = (
            upper_x,
            lower_x,
            index,
            grad_ptr + first * channels,
            channels,
            taps_ptr,
            row,
            first_row,
            first_column,
            height,
            width,
            channel,
            channel_live,
        )
        upper, lower, s1, s4, s7, upper_grad, lower_grad = pull_column(
            zero, zero, s1, s4, s7, *place, 0, COLUMNS, CHANNELS
        )  # fmt: skip
        s9 += upper_grad + lower_grad
        if RESIDUAL:
            upper += upper_grad
            lower += lower_grad
        upper, lower, s0, s3, s6, upper_grad, lower_grad = pull_column(
            upper, lower, s0, s3, s6, *place, -1, COLUMNS, CHANNELS
        )  # fmt: skip
        upper, lower, s2, s5, s8, upper_grad, lower_grad = pull_column(
            upper, lower, s2, s5, s8, *place, 1, COLUMNS, CHANNELS
        )  # fmt: skip
        local, inner, mask = tile_mask(first_row, first_column, height, width, CHANNELS, CHANNELS, ROWS, COLUMNS)
        target = grad_x_ptr + first * channels + local * channels + inner
        total = joined(upper, lower, ROWS // 2 * COLUMNS, CHANNELS)
        tl.store(target, total.to(grad_x_ptr.dtype.element_ty), mask=mask & channel_live[None, :])
        down, across = next_tile(down, across, tiles_across)

    part = batch * tl.num_programs(1) + tl.program_id(1)
    channel += block * CHANNELS
    parts_ptr += part * 10 * channels
    store_sum(parts_ptr, s0, 0, channels, channel, channel_live)
    store_sum(parts_ptr, s1, 1, channels, channel, channel_live)
    store_sum(parts_ptr, s2, 2, channels, channel, channel_live)
    store_sum(parts_ptr, s3, 3, channels, channel, channel_live)
    store_sum(parts_ptr, s4, 4, channels, channel, channel_live)
    store_sum(parts_ptr, s5, 5, channels, channel, channel_live)
    store_sum(parts_ptr, s6, 6, channels, channel, channel_live)
    store_sum(parts_ptr, s7, 7, channels, channel, channel_live)
    store_sum(parts_ptr, s8, 8, channels, channel, channel_live)
    store_sum(parts_ptr, s9, 9, channels, channel, channel_live)
