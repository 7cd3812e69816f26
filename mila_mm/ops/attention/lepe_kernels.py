"""Gradients of the depthwise 3x3 weights: sums over all tokens of all images, in two fixed-order stages."""

import triton
import triton.language as tl

from mila_mm.ops.triton.common import image_offset, load_row, next_tile

SIZES = [
    'height',
    'width',
    'tiles',
    'tiles_across',
    'tiles_per_split',
    'parts',
    'v_batch_stride',
    'grad_out_batch_stride',
]


@triton.jit
def column_products(
    above, middle, below, upper, lower, index, v_ptr, v_token_stride, row_stride, row, first_row, first_column,
    height, width, channel, channel_live, RIGHT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add do_n v_{n+t} to the sums of the three taps t of one column, for pairs of rows with gradients of both."""
    column = index % COLUMNS + RIGHT
    live = (first_column + column >= 0) & (first_column + column < width)
    place = (column * v_token_stride, live, first_row, height, channel, channel_live)
    above += upper * load_row(v_ptr, row_stride, row - 1, *place)
    v = load_row(v_ptr, row_stride, row, *place)
    middle += upper * v
    above += lower * v
    v = load_row(v_ptr, row_stride, row + 1, *place)
    below += upper * v
    middle += lower * v
    below += lower * load_row(v_ptr, row_stride, row + 2, *place)
    return above, middle, below


@triton.jit
def store_sum(ptr, products, index: tl.constexpr, channels, channel, channel_live):
    """Store the sum over tokens of one tap's products as row ``index`` of (10, channels)."""
    tl.store(ptr + index * channels + channel, tl.sum(products, axis=0), mask=channel_live)


@triton.jit(do_not_specialize=SIZES)
def lepe_backward_kernel(
    grad_out_ptr, v_ptr, parts_ptr,
    grad_out_batch_stride, grad_out_token_stride, v_batch_stride, v_token_stride,
    height, width, channels, tiles, tiles_across, tiles_per_split,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Parts of dw_t = sum of do_n v_{n+t} (rows 0 to 8) and db = sum of do_n (row 9) over a run of tiles.

    Grid: channel blocks, splits, batch. Writes parts (batch * splits, 10, channels).
    The nine sums stay in registers, a product per token and channel, until the run ends: reducing over tokens tap by
    tap and tile by tile would cost more instructions than the products themselves. Two rows at a time, as
    :func:`stencil` does, share neighbours and sums.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    channel_live = channel < channels
    batch = tl.program_id(2).to(tl.int64)
    v_ptr += image_offset(batch, v_batch_stride, ALIGNED)
    grad_out_ptr += image_offset(batch, grad_out_batch_stride, ALIGNED)
    index = tl.arange(0, ROWS // 2 * COLUMNS)
    row = index // COLUMNS * 2
    grad_row_stride, v_row_stride = width * grad_out_token_stride, width * v_token_stride

    zero = tl.zeros((ROWS // 2 * COLUMNS, CHANNELS), tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    first_tile = tl.program_id(1) * tiles_per_split
    down, across = first_tile // tiles_across, first_tile % tiles_across
    for _ in tl.range(first_tile, tl.minimum(first_tile + tiles_per_split, tiles), num_stages=1):
        first_row, first_column = down * ROWS, across * COLUMNS
        first = (first_row * width + first_column).to(tl.int64)
        column = index % COLUMNS
        live = first_column + column < width
        x = grad_out_ptr + first * grad_out_token_stride
        place = (column * grad_out_token_stride, live, first_row, height, channel, channel_live)
        upper = load_row(x, grad_row_stride, row, *place)
        lower = load_row(x, grad_row_stride, row + 1, *place)
        x = v_ptr + first * v_token_stride
        place = (
            index,
            x,
            v_token_stride,
            v_row_stride,
            row,
            first_row,
            first_column,
            height,
            width,
            channel,
            channel_live,
        )
        s0, s3, s6 = column_products(s0, s3, s6, upper, lower, *place, -1, COLUMNS)
        s1, s4, s7 = column_products(s1, s4, s7, upper, lower, *place, 0, COLUMNS)
        s2, s5, s8 = column_products(s2, s5, s8, upper, lower, *place, 1, COLUMNS)
        s9 += upper + lower
        down, across = next_tile(down, across, tiles_across)

    part = batch * tl.num_programs(1) + tl.program_id(1)
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
):  # fmt: skip
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
