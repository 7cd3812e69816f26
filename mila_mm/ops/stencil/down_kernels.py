"""Kernels of the downsampling's middle: y = ReLU(c(ReLU(x)) + b), c a depthwise 3x3 convolution of stride 2.

An output at row r and column j sees rows 2r - 1 to 2r + 1 and columns 2j - 1 to 2j + 1; with z = dy where y > 0::

    dx_m = ReLU'(x_m) sum_t w_t z_n        dw_t = sum ReLU(x_m) z_n        db = sum z_n        over pairs m = 2n - 1 + t

======================  ====================  ==============================================
kernel                  reads                 writes
======================  ====================  ==============================================
relu_dwc_relu           x                     y
relu_dwc_relu_backward  x, y, dy              dx, parts of dw and db
======================  ====================  ==============================================

Both walk down strips (:mod:`mila_mm.ops.triton.strip`) whose columns are the output's. The backward goes by the 2 x 2
numbers of x at rows 2r, 2r + 1 and columns 2j, 2j + 1: the nine pairs that these form with z at rows r, r + 1 and
columns j, j + 1 are each weight's once, so every product is in one program.
"""

import triton
import triton.language as tl

from mila_mm.ops.triton.common import image_offset, widen
from mila_mm.ops.triton.strip import load_weights, store_sums, strip_place

SIZES = [
    'height',
    'width',
    'out_height',
    'out_width',
    'blocks',
    'rows_per_run',
    'x_batch_stride',
    'grad_y_batch_stride',
    'y_batch_stride',
]


@triton.jit
def rectified(ptr, mask):
    """ReLU of what lies there, in fp32; zero where nothing does, NaN where NaN does."""
    x = widen(tl.load(ptr, mask=mask, other=0.0))
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def add_strided_row(total, row_ptr, offset, token_stride, row_live, left, middle, right, w0, w1, w2):
    """``total`` plus what a row of ReLU(x) adds through three weights."""
    total += rectified(row_ptr + (offset - token_stride), left & row_live) * w0
    total += rectified(row_ptr + offset, middle & row_live) * w1
    total += rectified(row_ptr + (offset + token_stride), right & row_live) * w2
    return total


@triton.jit(do_not_specialize=SIZES)
def relu_dwc_relu_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, x_batch_stride, x_token_stride, channels, height, width,
    out_height, out_width, blocks, rows_per_run,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """y for a strip of the output. Grid: see `strip_place`."""
    COLUMNS: tl.constexpr = 2 * GROUPS
    block, first_column, first_row, count, batch = strip_place(blocks, out_width, rows_per_run, out_height, GROUPS)
    index = tl.arange(0, CHANNELS)
    channel = block * CHANNELS + index
    live = channel < channels
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = load_weights(weight_ptr, channel, live, False, False)
    bias = tl.load(bias_ptr + channel, mask=live, other=0.0).to(tl.float32)[None, :]
    column = tl.arange(0, COLUMNS)[:, None]
    middle = 2 * (first_column + column)  # of x
    left_live = live[None, :] & (middle >= 1) & (middle - 1 < width)
    middle_live, right_live = live[None, :] & (middle < width), live[None, :] & (middle + 1 < width)
    offset = 2 * column * x_token_stride + index[None, :]
    target = column * channels + index[None, :]
    stored = live[None, :] & (first_column + column < out_width)
    place = (2 * first_row - 1).to(tl.int64) * width + 2 * first_column
    x_ptr += image_offset(batch, x_batch_stride, ALIGNED) + block * CHANNELS + place * x_token_stride
    y_ptr += ((batch * out_height + first_row) * out_width + first_column) * channels + block * CHANNELS

    start = tl.zeros((COLUMNS, CHANNELS), tl.float32) + bias
    waiting = add_strided_row(
        start, x_ptr, offset, x_token_stride, first_row > 0, left_live, middle_live, right_live, w0, w1, w2
    )  # fmt: skip
    for row in tl.range(first_row, first_row + count, num_stages=1):
        x_ptr += width * x_token_stride
        total = add_strided_row(
            waiting, x_ptr, offset, x_token_stride, 2 * row < height, left_live, middle_live, right_live, w3, w4, w5
        )  # fmt: skip
        x_ptr += width * x_token_stride
        inside = 2 * row + 1 < height
        left = rectified(x_ptr + (offset - x_token_stride), left_live & inside)
        own = rectified(x_ptr + offset, middle_live & inside)
        right = rectified(x_ptr + (offset + x_token_stride), right_live & inside)
        total += left * w6
        total += own * w7
        total += right * w8
        waiting = start + left * w0
        waiting += own * w1
        waiting += right * w2
        y = tl.where(total < 0.0, 0.0, total)
        tl.store(y_ptr + target, y.to(y_ptr.dtype.element_ty), mask=stored)
        y_ptr += out_width * channels


@triton.jit
def load_open(grad_ptr, y_ptr, grad_offset, y_offset, mask):
    """z: dy where y > 0, in fp32; NaN where y is NaN lets dy through."""
    grad = widen(tl.load(grad_ptr + grad_offset, mask=mask, other=0.0))
    return tl.where(widen(tl.load(y_ptr + y_offset, mask=mask, other=0.0)) <= 0.0, 0.0, grad)


@triton.jit
def store_closed(ptr, grad, x, mask):
    """Store dx: ``grad`` where x > 0."""
    tl.store(ptr, tl.where(x <= 0.0, 0.0, grad).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_square(sums, z, z_next, below, below_next, x00, x01, x10, x11):
    """The products of 2 x 2 numbers of ReLU(x) with z, to the sums of the weights that join them, and z to its own."""
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = sums
    x00, x01 = tl.where(x00 < 0.0, 0.0, x00), tl.where(x01 < 0.0, 0.0, x01)
    x10, x11 = tl.where(x10 < 0.0, 0.0, x10), tl.where(x11 < 0.0, 0.0, x11)
    s4 += z * x00
    s5 += z * x01
    s3 += z_next * x01
    s7 += z * x10
    s1 += below * x10
    s8 += z * x11
    s6 += z_next * x11
    s2 += below * x11
    s0 += below_next * x11
    s9 += z
    return s0, s1, s2, s3, s4, s5, s6, s7, s8, s9


@triton.jit(do_not_specialize=SIZES)
def relu_dwc_relu_backward_kernel(
    grad_y_ptr, y_ptr, x_ptr, weight_ptr, grad_x_ptr, parts_ptr,
    grad_y_batch_stride, grad_y_token_stride, y_batch_stride, y_token_stride, x_batch_stride, x_token_stride, channels,
    height, width, out_height, out_width, blocks, rows_per_run,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dx, and parts (batch * runs * strips, 10, channels) of dw (rows 0 to 8) and db (row 9).

    Grid: as the forward's.
    """
    COLUMNS: tl.constexpr = 2 * GROUPS
    block, first_column, first_row, count, batch = strip_place(blocks, out_width, rows_per_run, out_height, GROUPS)
    index = tl.arange(0, CHANNELS)
    channel = block * CHANNELS + index
    live = channel < channels
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = load_weights(weight_ptr, channel, live, False, False)
    column = tl.arange(0, COLUMNS)[:, None]
    own_live = live[None, :] & (first_column + column < out_width)
    next_live = live[None, :] & (first_column + column + 1 < out_width)
    left_live = live[None, :] & (2 * (first_column + column) < width)
    right_live = live[None, :] & (2 * (first_column + column) + 1 < width)
    grad_offset, y_offset = column * grad_y_token_stride + index[None, :], column * y_token_stride + index[None, :]
    x_offset, target = 2 * column * x_token_stride + index[None, :], 2 * column * channels + index[None, :]
    place = first_row.to(tl.int64) * out_width + first_column
    grad_y_ptr += image_offset(batch, grad_y_batch_stride, ALIGNED) + place * grad_y_token_stride + block * CHANNELS
    y_ptr += image_offset(batch, y_batch_stride, ALIGNED) + place * y_token_stride + block * CHANNELS
    place = (2 * first_row).to(tl.int64) * width + 2 * first_column
    x_ptr += image_offset(batch, x_batch_stride, ALIGNED) + place * x_token_stride + block * CHANNELS
    grad_x_ptr += (batch * height * width + place) * channels + block * CHANNELS

    zero = tl.zeros((COLUMNS, CHANNELS), tl.float32)
    sums = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    z = load_open(grad_y_ptr, y_ptr, grad_offset, y_offset, own_live)
    z_next = load_open(grad_y_ptr, y_ptr, grad_offset + grad_y_token_stride, y_offset + y_token_stride, next_live)
    for row in tl.range(first_row, first_row + count, num_stages=1):
        grad_y_ptr += out_width * grad_y_token_stride
        y_ptr += out_width * y_token_stride
        inside = row + 1 < out_height
        below = load_open(grad_y_ptr, y_ptr, grad_offset, y_offset, own_live & inside)
        below_next = load_open(
            grad_y_ptr, y_ptr, grad_offset + grad_y_token_stride, y_offset + y_token_stride, next_live & inside
        )  # fmt: skip
        inside = 2 * row + 1 < height
        x00 = widen(tl.load(x_ptr + x_offset, mask=left_live, other=0.0))
        x01 = widen(tl.load(x_ptr + (x_offset + x_token_stride), mask=right_live, other=0.0))
        x_ptr += width * x_token_stride
        x10 = widen(tl.load(x_ptr + x_offset, mask=left_live & inside, other=0.0))
        x11 = widen(tl.load(x_ptr + (x_offset + x_token_stride), mask=right_live & inside, other=0.0))
        x_ptr += width * x_token_stride

        store_closed(grad_x_ptr + target, z * w4, x00, left_live)
        store_closed(grad_x_ptr + (target + channels), z * w5 + z_next * w3, x01, right_live)
        grad_x_ptr += width * channels
        store_closed(grad_x_ptr + target, z * w7 + below * w1, x10, left_live & inside)
        total = z * w8 + z_next * w6 + below * w2 + below_next * w0
        store_closed(grad_x_ptr + (target + channels), total, x11, right_live & inside)
        grad_x_ptr += width * channels

        sums = add_square(sums, z, z_next, below, below_next, x00, x01, x10, x11)
        z, z_next = below, below_next
    store_sums(parts_ptr, blocks, channels, channel, live, sums)
