"""Gradients of the depthwise 3x3 weights: sums over all tokens of all images, in two fixed-order stages."""

import triton
import triton.language as tl

from mila_mm.ops.triton.common import image_offset
from mila_mm.ops.triton.strip import (
    add_all_products,
    add_own,
    load_pair,
    load_strip,
    store_sums,
    strip_masks,
    strip_place,
)

SIZES = ['height', 'width', 'blocks', 'rows_per_run', 'parts', 'v_batch_stride', 'grad_out_batch_stride']


@triton.jit(do_not_specialize=SIZES)
def lepe_backward_kernel(
    grad_out_ptr, v_ptr, parts_ptr, grad_out_batch_stride, grad_out_token_stride, v_batch_stride, v_token_stride,
    channels, height, width, blocks, rows_per_run,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Parts (batch * runs * strips, 10, channels) of dw_t = sum of do_n v_{n+t} (rows 0 to 8) and of db (row 9).

    Grid: see `strip_place`. The sums stay in registers, a product per pair of columns and channel, until the run ends:
    reducing over tokens weight by weight and row by row would cost more instructions than the products themselves.
    """
    block, first_column, first_row, count, batch = strip_place(blocks, width, rows_per_run, height, GROUPS)
    index = tl.arange(0, CHANNELS)
    channel = block * CHANNELS + index
    live = channel < channels
    masks = strip_masks(first_column, width, live, GROUPS)
    pair = 2 * tl.arange(0, GROUPS)[:, None]
    offset = pair * grad_out_token_stride + index[None, :]
    v_offset = pair * v_token_stride + index[None, :]
    last_row = first_row + count
    place = (first_row - 1).to(tl.int64) * width + first_column
    v_ptr += image_offset(batch, v_batch_stride, ALIGNED) + (place + width) * v_token_stride + block * CHANNELS
    grad_out_ptr += image_offset(batch, grad_out_batch_stride, ALIGNED) + block * CHANNELS
    grad_out_ptr += place * grad_out_token_stride

    zero = tl.zeros((GROUPS, CHANNELS), tl.float32)
    sums = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    # v is zero outside of the run, so that each product counts in one run.
    v0, v1 = (zero, zero), (zero, zero)
    for row in tl.range(first_row - 1, last_row + 1, 2, num_stages=1):
        inside = (row >= 0) & (row < height)
        upper = load_strip(grad_out_ptr, offset, grad_out_token_stride, inside, *masks)
        grad_out_ptr += width * grad_out_token_stride
        inside = (row < last_row) & (row + 1 < height)
        lower = load_strip(grad_out_ptr, offset, grad_out_token_stride, inside, *masks)
        grad_out_ptr += width * grad_out_token_stride
        v2 = load_pair(v_ptr, v_offset, v_token_stride, row + 1 < last_row, masks[1], masks[2])
        v_ptr += width * v_token_stride
        v3 = load_pair(v_ptr, v_offset, v_token_stride, row + 2 < last_row, masks[1], masks[2])
        v_ptr += width * v_token_stride
        sums = add_all_products(sums, upper, lower, v0, v1, v2, v3)
        sums = add_own(sums, upper, lower, row >= first_row, row < last_row, row + 1 < last_row)
        v0, v1 = v2, v3
    store_sums(parts_ptr, blocks, channels, channel, live, sums)


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
