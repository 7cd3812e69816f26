"""Gradients of the depthwise 3x3 weights: sums over all tokens of all images, in two fixed-order stages."""

import triton
import triton.language as tl

from .common import image_offset, tile_tokens

SIZES = ['height', 'width', 'tiles', 'tiles_across', 'splits', 'tiles_per_split', 'parts', 'v_batch_stride',
         'grad_out_batch_stride']


@triton.jit
def shifted_product(
    v_ptr, v_token_stride, grad_out, row, column, live, first_token, height, width, channel, channel_live,
    DOWN: tl.constexpr, RIGHT: tl.constexpr,
):
    """do_n * v_{n + (DOWN, RIGHT)} at the tokens of a tile, zero where the neighbour lies outside the map."""
    near_row = row + DOWN
    near_column = column + RIGHT
    live = live & (near_row >= 0) & (near_row < height) & (near_column >= 0) & (near_column < width)
    offset = (near_row * width + near_column - first_token) * v_token_stride
    mask = live[:, None] & channel_live[None, :]
    return grad_out * tl.load(v_ptr + offset[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_sum(ptr, products, index: tl.constexpr, channels, channel, channel_live):
    """Store the sum over tokens of one tap's products as row ``index`` of (10, channels)."""
    tl.store(ptr + index * channels + channel, tl.sum(products, axis=0), mask=channel_live)


@triton.jit(do_not_specialize=SIZES)
def lepe_backward_kernel(
    grad_out_ptr, v_ptr, parts_ptr,
    grad_out_batch_stride, grad_out_token_stride, v_batch_stride, v_token_stride,
    height, width, channels, tiles, tiles_across, splits, tiles_per_split,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr,
):
    """Parts of dw_t = sum of do_n v_{n+t} (rows 0 to 8) and db = sum of do_n (row 9) over a run of tiles.

    Grid: batch * splits * channel blocks, channel blocks fastest. Writes parts (batch * splits, 10, channels).
    The nine sums stay in registers, a product per token and channel, until the run ends: reducing over tokens tap by
    tap and tile by tile would cost more instructions than the products themselves.
    """
    program = tl.program_id(0)
    blocks = (channels + CHANNELS - 1) // CHANNELS
    block = program % blocks
    part = (program // blocks).to(tl.int64)
    split = program // blocks % splits
    batch = part // splits
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    channel_live = channel < channels
    v_ptr += image_offset(batch, v_batch_stride, ALIGNED)
    grad_out_ptr += image_offset(batch, grad_out_batch_stride, ALIGNED)

    zero = tl.zeros((ROWS * COLUMNS, CHANNELS), tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    first_tile = split * tiles_per_split
    for tile in tl.range(first_tile, tl.minimum(first_tile + tiles_per_split, tiles), num_stages=1):
        first_row, first_column, row, column, live = tile_tokens(tile, tiles_across, height, width, ROWS, COLUMNS)
        first_token = first_row * width + first_column
        local = row * width + column - first_token
        x = grad_out_ptr + first_token.to(tl.int64) * grad_out_token_stride
        grad_out = tl.load(
            x + local[:, None] * grad_out_token_stride + channel[None, :],
            mask=live[:, None] & channel_live[None, :],
            other=0.0,
        ).to(tl.float32)
        x = v_ptr + first_token.to(tl.int64) * v_token_stride
        place = (row, column, live, first_token, height, width, channel, channel_live)
        s0 += shifted_product(x, v_token_stride, grad_out, *place, -1, -1)
        s1 += shifted_product(x, v_token_stride, grad_out, *place, -1, 0)
        s2 += shifted_product(x, v_token_stride, grad_out, *place, -1, 1)
        s3 += shifted_product(x, v_token_stride, grad_out, *place, 0, -1)
        s4 += shifted_product(x, v_token_stride, grad_out, *place, 0, 0)
        s5 += shifted_product(x, v_token_stride, grad_out, *place, 0, 1)
        s6 += shifted_product(x, v_token_stride, grad_out, *place, 1, -1)
        s7 += shifted_product(x, v_token_stride, grad_out, *place, 1, 0)
        s8 += shifted_product(x, v_token_stride, grad_out, *place, 1, 1)
        s9 += grad_out

    parts_ptr += part * (10 * channels)
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


@triton.jit(do_not_specialize=SIZES)
def lepe_reduce_kernel(
    parts_ptr, grad_weight_ptr, grad_bias_ptr, channels, parts, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Sum (parts, 10, channels) over the parts into (channels, 9) and (channels,). Grid: 10 * channel blocks."""
    program = tl.program_id(0)
    row = program % 10
    channel = program // 10 * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < channels
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for begin in tl.range(0, parts, ROWS, num_stages=1):
        part = begin + tl.arange(0, ROWS)
        offset = ((part.to(tl.int64) * 10 + row) * channels)[:, None] + channel[None, :]
        total += tl.load(parts_ptr + offset, mask=(part < parts)[:, None] & live[None, :], other=0.0)
    result = tl.sum(total, axis=0)
    if row == 9:
        tl.store(grad_bias_ptr + channel, result.to(grad_bias_ptr.dtype.element_ty), mask=live)
    else:
        tl.store(grad_weight_ptr + channel * 9 + row, result.to(grad_weight_ptr.dtype.element_ty), mask=live)
