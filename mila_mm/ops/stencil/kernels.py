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
  backward              x (halo), du          g
stencil_backward        x, g (halo)           dx, parts of dw and db
======================  ====================  ==============================================

All arithmetic is in fp32. x' is rounded to its dtype before the norm, so that forward and backward see the same number.
The sums over tokens take two stages of fixed order, as those of the attention do. All walk down strips, see
:mod:`mila_mm.ops.triton.strip`: at the step of row r the convolution at row r - 1 is complete.
"""

import triton
import triton.language as tl

from mila_mm.ops.triton.common import image_offset, sigmoid, widen
from mila_mm.ops.triton.strip import (
    add_all_products,
    add_own,
    add_two_rows,
    load_pair,
    load_strip,
    load_weights,
    store_sums,
    strip_masks,
    strip_place,
)

SIZES = ['height', 'width', 'blocks', 'rows_per_run', 'x_batch_stride', 'grad_y_batch_stride']


@triton.jit(do_not_specialize=SIZES)
def cpe_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, gamma_ptr, beta_ptr, out_ptr, y_ptr, mean_ptr, rstd_ptr,
    x_batch_stride, x_token_stride, height, width, rows_per_run, eps,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """x' and its LayerNorm y for a strip of tokens with all their channels. Grid: see `strip_place`."""
    _, first_column, first_row, count, batch = strip_place(1, width, rows_per_run, height, GROUPS)
    channel = tl.arange(0, PADDED)
    live = channel < CHANNELS
    weights = load_weights(weight_ptr, channel, live, False, True)
    bias = tl.load(bias_ptr + channel, mask=live, other=0.0).to(tl.float32)[None, :]
    gamma = tl.load(gamma_ptr + channel, mask=live, other=0.0).to(tl.float32)[None, :]
    beta = tl.load(beta_ptr + channel, mask=live, other=0.0).to(tl.float32)[None, :]
    masks = strip_masks(first_column, width, live, GROUPS)
    pair = 2 * tl.arange(0, GROUPS)
    offset = pair[:, None] * x_token_stride + channel[None, :]
    target = pair[:, None] * CHANNELS + channel[None, :]
    last_row = first_row + count
    x_ptr += image_offset(batch, x_batch_stride, ALIGNED) + first_column * x_token_stride
    x_ptr += (first_row - 1).to(tl.int64) * (width * x_token_stride)
    token = batch * height * width + (first_row - 2).to(tl.int64) * width + first_column

    zero = tl.zeros((GROUPS, PADDED), tl.float32)
    start = zero + bias
    sums = zero, zero, zero, zero
    for row in tl.range(first_row - 1, last_row + 1, 2, num_stages=1):
        upper = load_strip(x_ptr, offset, x_token_stride, (row >= 0) & (row < height), *masks)
        x_ptr += width * x_token_stride
        lower = load_strip(x_ptr, offset, x_token_stride, (row < last_row) & (row + 1 < height), *masks)
        x_ptr += width * x_token_stride
        above, own, sums = add_two_rows(sums, start, upper, lower, weights)
        for right in tl.static_range(2):
            mask, token_live = masks[1 + right], first_column + pair + right < width
            norm_and_store(
                above[right], out_ptr, y_ptr, mean_ptr, rstd_ptr, token + right, target, pair,
                mask & (row > first_row), token_live & (row > first_row), live, gamma, beta, eps, CHANNELS,
            )  # fmt: skip
            norm_and_store(
                own[right], out_ptr, y_ptr, mean_ptr, rstd_ptr, token + (width + right), target, pair,
                mask & (row >= first_row) & (row < last_row), token_live & (row >= first_row) & (row < last_row),
                live, gamma, beta, eps, CHANNELS,
            )  # fmt: skip
        token += 2 * width


@triton.jit
def norm_and_store(
    total, out_ptr, y_ptr, mean_ptr, rstd_ptr, token, target, pair, mask, token_live, channel_live, gamma, beta, eps,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Store x' = ``total`` of every second token from ``token`` on, its LayerNorm and the statistics."""
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * CHANNELS + target, out, mask=mask)
    value = tl.where(channel_live[None, :], widen(out), 0.0)
    mean = tl.sum(value, axis=1) / CHANNELS
    centred = tl.where(channel_live[None, :], value - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / CHANNELS + eps)
    tl.store(mean_ptr + token + pair, mean, mask=token_live)
    tl.store(rstd_ptr + token + pair, rstd, mask=token_live)
    y = centred * (rstd[:, None] * gamma) + beta
    tl.store(y_ptr + token * CHANNELS + target, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def dwc_silu_kernel(
    x_ptr, weight_ptr, bias_ptr, grad_y_ptr, y_ptr, x_batch_stride, x_token_stride,
    grad_y_batch_stride, grad_y_token_stride, channels, height, width, blocks, rows_per_run,
    BACKWARD: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr, ACCURATE: tl.constexpr,
):  # fmt: skip
    """u = silu(p), or ``BACKWARD`` g = du silu'(p) with p computed again, both into ``y``. Grid: see `strip_place`."""
    block, first_column, first_row, count, batch = strip_place(blocks, width, rows_per_run, height, GROUPS)
    index = tl.arange(0, CHANNELS)
    channel = block * CHANNELS + index
    live = channel < channels
    weights = load_weights(weight_ptr, channel, live, False, False)
    bias = tl.load(bias_ptr + channel, mask=live, other=0.0).to(tl.float32)[None, :]
    masks = strip_masks(first_column, width, live, GROUPS)
    pair = 2 * tl.arange(0, GROUPS)[:, None]
    offset = pair * x_token_stride + index[None, :]
    target = pair * channels + index[None, :]
    grad_offset = pair * grad_y_token_stride + index[None, :]
    last_row = first_row + count
    x_ptr += image_offset(batch, x_batch_stride, ALIGNED) + block * CHANNELS + first_column * x_token_stride
    x_ptr += (first_row - 1).to(tl.int64) * (width * x_token_stride)
    place = (first_row - 2).to(tl.int64) * width + first_column
    y_ptr += (batch * height * width + place) * channels + block * CHANNELS
    grad_y_ptr += image_offset(batch, grad_y_batch_stride, ALIGNED) + place * grad_y_token_stride + block * CHANNELS

    zero = tl.zeros((GROUPS, CHANNELS), tl.float32)
    start = zero + bias
    sums = zero, zero, zero, zero
    for row in tl.range(first_row - 1, last_row + 1, 2, num_stages=1):
        upper = load_strip(x_ptr, offset, x_token_stride, (row >= 0) & (row < height), *masks)
        x_ptr += width * x_token_stride
        lower = load_strip(x_ptr, offset, x_token_stride, (row < last_row) & (row + 1 < height), *masks)
        x_ptr += width * x_token_stride
        above, own, sums = add_two_rows(sums, start, upper, lower, weights)
        silu_and_store(
            above, grad_y_ptr, grad_offset, grad_y_token_stride, y_ptr, target, channels, row > first_row, masks,
            BACKWARD, ACCURATE,
        )  # fmt: skip
        y_ptr += width * channels
        grad_y_ptr += width * grad_y_token_stride
        silu_and_store(
            own, grad_y_ptr, grad_offset, grad_y_token_stride, y_ptr, target, channels,
            (row >= first_row) & (row < last_row), masks, BACKWARD, ACCURATE,
        )  # fmt: skip
        y_ptr += width * channels
        grad_y_ptr += width * grad_y_token_stride


@triton.jit
def silu_and_store(
    total, grad_ptr, grad_offset, grad_token_stride, y_ptr, target, channels, row_live, masks,
    BACKWARD: tl.constexpr, ACCURATE: tl.constexpr,
):  # fmt: skip
    """Store silu(p) of a row, or ``BACKWARD`` du silu'(p)."""
    if BACKWARD:
        grads = load_pair(grad_ptr, grad_offset, grad_token_stride, row_live, masks[1], masks[2])
    for right in tl.static_range(2):
        part = sigmoid(total[right], ACCURATE)
        y = total[right] * part
        if BACKWARD:
            y = grads[right] * (part + y * (1.0 - part))
        tl.store(y_ptr + (target + right * channels), y.to(y_ptr.dtype.element_ty), mask=masks[1 + right] & row_live)


@triton.jit(do_not_specialize=SIZES)
def stencil_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, grad_x_ptr, parts_ptr, x_batch_stride, x_token_stride, grad_x_token_stride, channels,
    height, width, blocks, rows_per_run,
    RESIDUAL: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dx, and parts (batch * runs * strips, 10, channels) of dw (rows 0 to 8) and db (row 9).

    A row of g serves all three. g is contiguous; so are images and rows of dx, whatever the distance of its tokens.
    Grid: see `strip_place`.
    """
    block, first_column, first_row, count, batch = strip_place(blocks, width, rows_per_run, height, GROUPS)
    index = tl.arange(0, CHANNELS)
    channel = block * CHANNELS + index
    live = channel < channels
    weights = load_weights(weight_ptr, channel, live, True, RESIDUAL)
    masks = strip_masks(first_column, width, live, GROUPS)
    pair = 2 * tl.arange(0, GROUPS)[:, None]
    offset = pair * channels + index[None, :]
    x_offset = pair * x_token_stride + index[None, :]
    target = pair * grad_x_token_stride + index[None, :]
    last_row = first_row + count
    place = (first_row - 1).to(tl.int64) * width + first_column
    x_ptr += image_offset(batch, x_batch_stride, ALIGNED) + (place + width) * x_token_stride + block * CHANNELS
    grad_ptr += (batch * height * width + place) * channels + block * CHANNELS
    grad_x_ptr += (batch * height * width + place - width) * grad_x_token_stride + block * CHANNELS

    zero = tl.zeros((GROUPS, CHANNELS), tl.float32)
    sums = zero, zero, zero, zero
    products = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    # x is zero outside of the run, so that each product counts in one run.
    x0, x1 = (zero, zero), (zero, zero)
    for row in tl.range(first_row - 1, last_row + 1, 2, num_stages=1):
        upper = load_strip(grad_ptr, offset, channels, (row >= 0) & (row < height), *masks)
        grad_ptr += width * channels
        lower = load_strip(grad_ptr, offset, channels, (row < last_row) & (row + 1 < height), *masks)
        grad_ptr += width * channels
        x2 = load_pair(x_ptr, x_offset, x_token_stride, row + 1 < last_row, masks[1], masks[2])
        x_ptr += width * x_token_stride
        x3 = load_pair(x_ptr, x_offset, x_token_stride, row + 2 < last_row, masks[1], masks[2])
        x_ptr += width * x_token_stride
        above, own, sums = add_two_rows(sums, zero, upper, lower, weights)
        products = add_all_products(products, upper, lower, x0, x1, x2, x3)
        products = add_own(products, upper, lower, row >= first_row, row < last_row, row + 1 < last_row)
        x0, x1 = x2, x3
        for right in tl.static_range(2):
            ptr = grad_x_ptr + (target + right * grad_x_token_stride)
            mask = masks[1 + right]
            tl.store(ptr, above[right].to(grad_x_ptr.dtype.element_ty), mask=mask & (row > first_row))
            mask = mask & (row >= first_row) & (row < last_row)
            tl.store(ptr + width * grad_x_token_stride, own[right].to(grad_x_ptr.dtype.element_ty), mask=mask)
        grad_x_ptr += 2 * width * grad_x_token_stride
    store_sums(parts_ptr, blocks, channels, channel, live, products)
