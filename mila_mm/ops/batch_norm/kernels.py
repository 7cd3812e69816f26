"""Kernels of a BatchNorm in training mode and of the ReLU behind it, on tokens as rows.

    h_n = (x_n - mean) rstd     a_n = gamma h_n + beta     y_n = a_n, or ReLU(a_n)     means over rows, all in fp32
    z_n = dy_n, or dy_n where a_n > 0          dbeta = sum z_n          dgamma = sum z_n h_n
    dx_n = gamma rstd (z_n - dbeta / rows - h_n dgamma / rows)

======================  ====================  ==============================================
kernel                  reads                 writes
======================  ====================  ==============================================
batch_statistics        x                     parts of mean and of the squares around it
batch_moments           parts                 mean, rstd, variance
batch_norm              x                     y, and running statistics
batch_norm_sums         x, dy                 parts of dgamma and dbeta
batch_norm_backward     x, dy                 dx
======================  ====================  ==============================================

`column_reduce` (:mod:`mila_mm.ops.rows.kernels`) sums the parts of the gradients. Sums over rows take two stages of
fixed order. The squares are those around a mean from the first number on (Welford, Technometrics 4, 1962; parts are
joined as Chan, Golub and LeVeque do, 1979): a mean far from zero costs the variance no digits, and that of a constant
channel is 0.
"""

import triton
import triton.language as tl

from mila_mm.ops.triton.common import widen

SIZES = ['rows', 'rows_per_split', 'splits']


@triton.jit
def run_of_rows(channels, rows, rows_per_split, CHANNELS: tl.constexpr):
    """Channels of a program, which of them exist, its first row and how many it has. Grid: channel blocks, splits."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    first = tl.program_id(1) * rows_per_split
    return channel, channel < channels, first.to(tl.int64), tl.minimum(rows_per_split, rows - first)


@triton.jit
def load_vector(ptr, channel, live):
    """(1, CHANNELS) in fp32, zero behind the last channel."""
    return tl.load(ptr + channel, mask=live, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_rows(ptr, row, row_stride, channel, mask):
    """(BLOCK, CHANNELS) in fp32, zero where masked."""
    return widen(tl.load(ptr + row[:, None] * row_stride + channel[None, :], mask=mask, other=0.0))


@triton.jit
def join(mean, squares, counts, pivot, total):
    """Mean of parts, and squares around it, over axis 0: means and squares of (P, CHANNELS), counts (P, 1).

    ``pivot`` (1, CHANNELS), one of the means, is taken off first: equal ones then join without rounding.
    """
    joint = pivot + (tl.sum(counts * (mean - pivot), axis=0) / total)[None, :]
    away = mean - joint
    return joint, tl.sum(squares + counts * away * away, axis=0)[None, :]


@triton.jit(do_not_specialize=SIZES)
def batch_statistics_kernel(
    x_ptr, parts_ptr, row_stride, channels, rows, rows_per_split, BLOCK: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Parts (splits, 2, channels): mean of a run of rows, and sum of the squares around it. Grid: see `run_of_rows`.

    Each row of a block keeps a mean of its own, so that threads meet only at the end.
    """
    channel, live, first, count = run_of_rows(channels, rows, rows_per_split, CHANNELS)
    x_ptr += first * row_stride
    row = tl.arange(0, BLOCK)
    mean = tl.zeros((BLOCK, CHANNELS), tl.float32)
    squares = tl.zeros((BLOCK, CHANNELS), tl.float32)
    seen = 0.0
    for begin in tl.range(0, count, BLOCK, num_stages=1):
        mask = (begin + row < count)[:, None] & live[None, :]
        x = load_rows(x_ptr, begin + row, row_stride, channel, mask)
        seen += 1.0
        away = tl.where(mask, x - mean, 0.0)
        mean += away * (1.0 / seen)
        squares += away * (x - mean)
    counts = ((count - row + BLOCK - 1) // BLOCK).to(tl.float32)[:, None]
    counts = tl.where((row < count)[:, None], counts, 0.0)
    pivot = tl.sum(tl.where((row == 0)[:, None], mean, 0.0), axis=0)[None, :]
    joint, around = join(mean, squares, counts, pivot, count.to(tl.float32))
    target = parts_ptr + tl.program_id(1).to(tl.int64) * (2 * channels) + channel[None, :]
    tl.store(target, joint, mask=live[None, :])
    tl.store(target + channels, around, mask=live[None, :])


@triton.jit(do_not_specialize=SIZES)
def batch_moments_kernel(
    parts_ptr, statistics_ptr, channels, rows, rows_per_split, splits, eps,
    BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Statistics (3, channels): mean, rstd and variance of all rows, the latter over their number.

    Grid: channel blocks. Steps of ``BLOCK`` parts each are joined one after the other.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    live = channel < channels
    mean = load_vector(parts_ptr, channel, live)
    squares = tl.zeros((1, CHANNELS), tl.float32)
    seen = 0.0
    for begin in tl.range(0, splits, BLOCK, num_stages=1):
        part = begin + tl.arange(0, BLOCK)
        counts = tl.minimum(rows - part * rows_per_split, rows_per_split)
        counts = tl.where(part < splits, counts, 0).to(tl.float32)[:, None]
        mask = (part < splits)[:, None] & live[None, :]
        means = load_rows(parts_ptr, part, 2 * channels, channel, mask)
        pivot = load_vector(parts_ptr + begin * (2 * channels), channel, live)
        around = load_rows(parts_ptr + channels, part, 2 * channels, channel, mask)
        more = tl.sum(counts, axis=0)
        more = tl.sum(more, axis=0)
        joint, around = join(means, around, counts, pivot, more)
        away = joint - mean
        share = more / (seen + more)
        mean += away * share
        squares += around + away * away * (seen * share)
        seen += more
    variance = squares / rows
    target = statistics_ptr + channel[None, :]
    tl.store(target, mean, mask=live[None, :])
    tl.store(target + channels, 1.0 / tl.sqrt(variance + eps), mask=live[None, :])
    tl.store(target + 2 * channels, variance, mask=live[None, :])


@triton.jit
def load_norm(statistics_ptr, weight_ptr, bias_ptr, channels, channel, live):
    """mean, rstd, gamma and beta, (1, CHANNELS) each."""
    mean = load_vector(statistics_ptr, channel, live)
    rstd = load_vector(statistics_ptr + channels, channel, live)
    return mean, rstd, load_vector(weight_ptr, channel, live), load_vector(bias_ptr, channel, live)


@triton.jit
def update_running(ptr, value, momentum, channel, live):
    """Move a running statistic (channels,) towards ``value`` (1, CHANNELS)."""
    moved = (1.0 - momentum) * load_vector(ptr, channel, live) + momentum * value
    tl.store(ptr + channel[None, :], moved.to(ptr.dtype.element_ty), mask=live[None, :])


@triton.jit(do_not_specialize=SIZES)
def batch_norm_kernel(
    x_ptr, statistics_ptr, weight_ptr, bias_ptr, y_ptr, running_mean_ptr, running_var_ptr, batches_ptr,
    row_stride, channels, rows, rows_per_split, momentum,
    RELU: tl.constexpr, TRACKED: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y of a run of rows. Grid: see `run_of_rows`.

    ``TRACKED``: the programs of the first run move the running statistics, too, with the variance over rows - 1.
    """
    channel, live, first, count = run_of_rows(channels, rows, rows_per_split, CHANNELS)
    mean, rstd, gamma, beta = load_norm(statistics_ptr, weight_ptr, bias_ptr, channels, channel, live)
    scale = rstd * gamma
    x_ptr += first * row_stride
    y_ptr += first * channels
    for begin in tl.range(0, count, BLOCK, num_stages=1):
        row = begin + tl.arange(0, BLOCK)
        mask = (row < count)[:, None] & live[None, :]
        y = (load_rows(x_ptr, row, row_stride, channel, mask) - mean) * scale + beta
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)
        tl.store(y_ptr + row[:, None] * channels + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    if TRACKED:  # noqa: SIM102  a constant by itself: what is not tracked is not compiled
        if tl.program_id(1) == 0:
            update_running(running_mean_ptr, mean, momentum, channel, live)
            correction = rows.to(tl.float32) / (rows - 1).to(tl.float32)
            variance = load_vector(statistics_ptr + 2 * channels, channel, live)
            update_running(running_var_ptr, variance * correction, momentum, channel, live)
            if tl.program_id(0) == 0:
                tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit
def open_gradient(grad, centred, scale, beta, RELU: tl.constexpr):
    """z: dy, or dy where the norm's result is above zero; NaN there lets dy through."""
    if RELU:
        grad = tl.where(centred * scale + beta <= 0.0, 0.0, grad)
    return grad


@triton.jit(do_not_specialize=SIZES)
def batch_norm_sums_kernel(
    grad_y_ptr, x_ptr, statistics_ptr, weight_ptr, bias_ptr, parts_ptr,
    grad_y_row_stride, row_stride, channels, rows, rows_per_split,
    RELU: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Parts (splits, 2, channels) of dgamma and dbeta from a run of rows. Grid: see `run_of_rows`."""
    channel, live, first, count = run_of_rows(channels, rows, rows_per_split, CHANNELS)
    mean, rstd, gamma, beta = load_norm(statistics_ptr, weight_ptr, bias_ptr, channels, channel, live)
    scale = rstd * gamma
    grad_y_ptr += first * grad_y_row_stride
    x_ptr += first * row_stride
    of_gamma = tl.zeros((BLOCK, CHANNELS), tl.float32)
    of_beta = tl.zeros((BLOCK, CHANNELS), tl.float32)
    for begin in tl.range(0, count, BLOCK, num_stages=1):
        row = begin + tl.arange(0, BLOCK)
        mask = (row < count)[:, None] & live[None, :]
        centred = load_rows(x_ptr, row, row_stride, channel, mask) - mean
        grad = load_rows(grad_y_ptr, row, grad_y_row_stride, channel, mask)
        grad = open_gradient(grad, centred, scale, beta, RELU)
        of_gamma += grad * centred
        of_beta += grad
    target = parts_ptr + tl.program_id(1).to(tl.int64) * (2 * channels) + channel[None, :]
    tl.store(target, tl.sum(of_gamma, axis=0)[None, :] * rstd, mask=live[None, :])
    tl.store(target + channels, tl.sum(of_beta, axis=0)[None, :], mask=live[None, :])


@triton.jit(do_not_specialize=SIZES)
def batch_norm_backward_kernel(
    grad_y_ptr, x_ptr, statistics_ptr, weight_ptr, bias_ptr, grad_weight_ptr, grad_bias_ptr, grad_x_ptr,
    grad_y_row_stride, row_stride, channels, rows, rows_per_split,
    RELU: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx of a run of rows, from dgamma and dbeta (channels,) in fp32. Grid: see `run_of_rows`."""
    channel, live, first, count = run_of_rows(channels, rows, rows_per_split, CHANNELS)
    mean, rstd, gamma, beta = load_norm(statistics_ptr, weight_ptr, bias_ptr, channels, channel, live)
    scale = rstd * gamma
    slope = rstd * load_vector(grad_weight_ptr, channel, live) / rows
    constant = load_vector(grad_bias_ptr, channel, live) / rows
    grad_y_ptr += first * grad_y_row_stride
    x_ptr += first * row_stride
    grad_x_ptr += first * channels
    for begin in tl.range(0, count, BLOCK, num_stages=1):
        row = begin + tl.arange(0, BLOCK)
        mask = (row < count)[:, None] & live[None, :]
        centred = load_rows(x_ptr, row, row_stride, channel, mask) - mean
        grad = load_rows(grad_y_ptr, row, grad_y_row_stride, channel, mask)
        grad = open_gradient(grad, centred, scale, beta, RELU)
        grad = (grad - constant - centred * slope) * scale
        target = grad_x_ptr + row[:, None] * channels + channel[None, :]
        tl.store(target, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
