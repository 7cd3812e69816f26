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
norm_backward           x', dy, dx'           g, parts of dgamma and dbeta
dwc_silu                x (halo)              u
silu_backward           x (halo), du          g
stencil_backward        x, g (halo)           dx, parts of dw and db
======================  ====================  ==============================================

All arithmetic is in fp32. x' is rounded to its dtype before the norm, so that forward and backward see the same number.
The sums over tokens take two stages of fixed order, as those of the attention do.
"""

import triton
import triton.language as tl

from .common import image_offset, sigmoid, stencil, tile_tokens
from .lepe_kernels import store_sum

SIZES = ['height', 'width', 'tokens', 'tiles', 'tiles_across', 'splits', 'tokens_per_split', 'tiles_per_split',
         'x_batch_stride', 'grad_out_batch_stride', 'grad_y_batch_stride', 'out_batch_stride']


@triton.jit(do_not_specialize=SIZES)
def cpe_norm_kernel(
    x_ptr, taps_ptr, bias_ptr, gamma_ptr, beta_ptr, out_ptr, y_ptr, mean_ptr, rstd_ptr,
    x_batch_stride, x_token_stride, height, width, tiles, tiles_across, eps,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):
    """x' and its LayerNorm y for a tile of tokens with all their channels. Grid: batch * tiles."""
    program = tl.program_id(0)
    tile = program % tiles
    batch = (program // tiles).to(tl.int64)
    first_row, first_column, row, column, live = tile_tokens(tile, tiles_across, height, width, ROWS, COLUMNS)
    first_token = first_row * width + first_column
    local = row * width + column - first_token
    channel = tl.arange(0, PADDED)
    channel_live = channel < CHANNELS
    mask = live[:, None] & channel_live[None, :]
    x_ptr += image_offset(batch, x_batch_stride, ALIGNED) + first_token.to(tl.int64) * x_token_stride
    first = batch * height * width + first_token

    total = stencil(
        x_ptr, taps_ptr, x_token_stride, CHANNELS, row, column, first_token, height, width, channel, channel_live,
        False, ROWS * COLUMNS, PADDED,
    )
    x = tl.load(x_ptr + local[:, None] * x_token_stride + channel[None, :], mask=mask, other=0.0)
    total += x.to(tl.float32) + tl.load(bias_ptr + channel, mask=channel_live, other=0.0).to(tl.float32)[None, :]
    out = total.to(out_ptr.dtype.element_ty)
    offset = local[:, None] * CHANNELS + channel[None, :]
    tl.store(out_ptr + first * CHANNELS + offset, out, mask=mask)

    value = out.to(tl.float32)
    mean = tl.sum(tl.where(mask, value, 0.0), axis=1) / CHANNELS
    centred = tl.where(mask, value - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / CHANNELS + eps)
    tl.store(mean_ptr + first + local, mean, mask=live)
    tl.store(rstd_ptr + first + local, rstd, mask=live)
    gamma = tl.load(gamma_ptr + channel, mask=channel_live, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + channel, mask=channel_live, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * gamma[None, :] + beta[None, :]
    tl.store(y_ptr + first * CHANNELS + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def norm_backward_kernel(
    grad_out_ptr, grad_y_ptr, out_ptr, mean_ptr, rstd_ptr, gamma_ptr, grad_ptr, gamma_parts_ptr, beta_parts_ptr,
    grad_out_batch_stride, grad_out_token_stride, grad_y_batch_stride, grad_y_token_stride,
    out_batch_stride, out_token_stride, tokens, splits, tokens_per_split,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):
    """Gradient g of x' from both its uses, and parts (batch * splits, CHANNELS) of dgamma and dbeta.

    Grid: batch * splits, each a run of tokens of one image.
    """
    program = tl.program_id(0).to(tl.int64)
    batch = program // splits
    first = program % splits * tokens_per_split
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
    for begin in tl.range(0, count.to(tl.int32), BLOCK, num_stages=1):
        local = begin + tl.arange(0, BLOCK)
        live = local < count
        mask = live[:, None] & channel_live[None, :]
        grad_y = tl.load(
            grad_y_ptr + local[:, None] * grad_y_token_stride + channel[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        out = tl.load(out_ptr + local[:, None] * out_token_stride + channel[None, :], mask=mask, other=0.0)
        mean = tl.load(mean_ptr + first + local, mask=live, other=0.0)
        rstd = tl.load(rstd_ptr + first + local, mask=live, other=0.0)
        normal = tl.where(mask, (out.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)
        beta_sum += grad_y
        gamma_sum += grad_y * normal
        inner = grad_y * gamma[None, :]
        constant = tl.sum(inner, axis=1) / CHANNELS
        slope = tl.sum(inner * normal, axis=1) / CHANNELS
        inner = (inner - constant[:, None] - normal * slope[:, None]) * rstd[:, None]
        grad = tl.load(grad_out_ptr + local[:, None] * grad_out_token_stride + channel[None, :], mask=mask, other=0.0)
        inner += grad.to(tl.float32)
        target = grad_ptr + first * CHANNELS + local[:, None] * CHANNELS + channel[None, :]
        tl.store(target, inner.to(grad_ptr.dtype.element_ty), mask=mask)

    tl.store(gamma_parts_ptr + program * CHANNELS + channel, tl.sum(gamma_sum, axis=0), mask=channel_live)
    tl.store(beta_parts_ptr + program * CHANNELS + channel, tl.sum(beta_sum, axis=0), mask=channel_live)


@triton.jit
def before_silu(
    x_ptr, taps_ptr, bias_ptr, x_batch_stride, x_token_stride, channels, height, width, tiles, tiles_across,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr,
):
    """p at one tile of tokens and one block of channels, then: image, first token, offsets in the tile, channels, mask.

    Program number: batch * tiles * channel blocks, channel blocks fastest.
    """
    program = tl.program_id(0)
    blocks = (channels + CHANNELS - 1) // CHANNELS
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    channel_live = channel < channels
    tile = program // blocks % tiles
    batch = (program // blocks // tiles).to(tl.int64)
    first_row, first_column, row, column, live = tile_tokens(tile, tiles_across, height, width, ROWS, COLUMNS)
    first_token = first_row * width + first_column
    total = stencil(
        x_ptr + image_offset(batch, x_batch_stride, ALIGNED) + first_token.to(tl.int64) * x_token_stride, taps_ptr,
        x_token_stride, channels, row, column, first_token, height, width, channel, channel_live,
        False, ROWS * COLUMNS, CHANNELS,
    )
    total += tl.load(bias_ptr + channel, mask=channel_live, other=0.0).to(tl.float32)[None, :]
    local = row * width + column - first_token
    return total, batch, first_token.to(tl.int64), local, channel, live[:, None] & channel_live[None, :]


@triton.jit(do_not_specialize=SIZES)
def dwc_silu_kernel(
    x_ptr, taps_ptr, bias_ptr, y_ptr, x_batch_stride, x_token_stride, channels, height, width, tiles, tiles_across,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr, ACCURATE: tl.constexpr,
):
    """u = silu(p). Grid: batch * tiles * channel blocks."""
    total, batch, first, local, channel, mask = before_silu(
        x_ptr, taps_ptr, bias_ptr, x_batch_stride, x_token_stride, channels, height, width, tiles, tiles_across,
        ROWS, COLUMNS, CHANNELS, ALIGNED,
    )
    y = total * sigmoid(total, ACCURATE)
    y_ptr += (batch * height * width + first) * channels
    tl.store(y_ptr + local[:, None] * channels + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def silu_backward_kernel(
    grad_y_ptr, x_ptr, taps_ptr, bias_ptr, grad_ptr, grad_y_batch_stride, grad_y_token_stride,
    x_batch_stride, x_token_stride, channels, height, width, tiles, tiles_across,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr, ACCURATE: tl.constexpr,
):
    """g = du silu'(p), with p computed again. Grid: batch * tiles * channel blocks."""
    total, batch, first, local, channel, mask = before_silu(
        x_ptr, taps_ptr, bias_ptr, x_batch_stride, x_token_stride, channels, height, width, tiles, tiles_across,
        ROWS, COLUMNS, CHANNELS, ALIGNED,
    )
    grad_y_ptr += image_offset(batch, grad_y_batch_stride, ALIGNED) + first * grad_y_token_stride
    grad = tl.load(grad_y_ptr + local[:, None] * grad_y_token_stride + channel[None, :], mask=mask, other=0.0)
    part = sigmoid(total, ACCURATE)
    grad = grad.to(tl.float32) * part * (1.0 + total * (1.0 - part))
    grad_ptr += (batch * height * width + first) * channels
    tl.store(grad_ptr + local[:, None] * channels + channel[None, :], grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def pull(
    total, products, grad_ptr, taps_ptr, x, row, column, live, first_token, height, width, channels, channel,
    channel_live, TAP: tl.constexpr,
):
    """``total`` + g w and ``products`` + g x for the gradient g at the tokens n - t of tap t; and g."""
    near_row = row - (TAP // 3 - 1)
    near_column = column - (TAP % 3 - 1)
    live = live & (near_row >= 0) & (near_row < height) & (near_column >= 0) & (near_column < width)
    offset = (near_row * width + near_column - first_token) * channels
    mask = live[:, None] & channel_live[None, :]
    grad = tl.load(grad_ptr + offset[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(taps_ptr + TAP * channels + channel, mask=channel_live, other=0.0)
    return total + grad * weight[None, :], products + grad * x, grad


@triton.jit(do_not_specialize=SIZES)
def stencil_backward_kernel(
    grad_ptr, x_ptr, taps_ptr, grad_x_ptr, parts_ptr, x_batch_stride, x_token_stride, channels,
    height, width, tiles, tiles_across, splits, tiles_per_split,
    RESIDUAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr,
):
    """dx, and parts (batch * splits, 10, channels) of dw (rows 0 to 8) and db (row 9), over a run of tiles.

    g at a token's nine neighbours serves all three, so it is loaded once. Grid: batch * splits * channel blocks,
    channel blocks fastest. g and dx are contiguous.
    """
    program = tl.program_id(0)
    blocks = (channels + CHANNELS - 1) // CHANNELS
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    channel_live = channel < channels
    part = (program // blocks).to(tl.int64)
    batch = part // splits
    x_ptr += image_offset(batch, x_batch_stride, ALIGNED)
    grad_ptr += batch * height * width * channels
    grad_x_ptr += batch * height * width * channels

    zero = tl.zeros((ROWS * COLUMNS, CHANNELS), tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    first_tile = program // blocks % splits * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tiles)
    for tile in tl.range(first_tile, last_tile, num_stages=1):
        first_row, first_column, row, column, live = tile_tokens(tile, tiles_across, height, width, ROWS, COLUMNS)
        first_token = first_row * width + first_column
        first = first_token.to(tl.int64)
        local = row * width + column - first_token
        mask = live[:, None] & channel_live[None, :]
        x = tl.load(
            x_ptr + first * x_token_stride + local[:, None] * x_token_stride + channel[None, :], mask=mask, other=0.0
        ).to(tl.float32)
        place = (
            grad_ptr + first * channels, taps_ptr, x,
            row, column, live, first_token, height, width, channels, channel, channel_live,
        )
        total, s4, grad = pull(zero, s4, *place, 4)
        s9 += grad
        if RESIDUAL:
            total += grad
        total, s0, _ = pull(total, s0, *place, 0)
        total, s1, _ = pull(total, s1, *place, 1)
        total, s2, _ = pull(total, s2, *place, 2)
        total, s3, _ = pull(total, s3, *place, 3)
        total, s5, _ = pull(total, s5, *place, 5)
        total, s6, _ = pull(total, s6, *place, 6)
        total, s7, _ = pull(total, s7, *place, 7)
        total, s8, _ = pull(total, s8, *place, 8)
        target = grad_x_ptr + first * channels + local[:, None] * channels + channel[None, :]
        tl.store(target, total.to(grad_x_ptr.dtype.element_ty), mask=mask)

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
