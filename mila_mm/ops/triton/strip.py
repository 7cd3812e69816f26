"""Device functions of depthwise 3x3 stencils that walk down a strip of a map, row by row.

A program owns some channels of a strip of columns and a run of rows. Its threads hold two neighbouring columns each, so
four loads of a row serve two tokens; a row is loaded once and added to the sums of the three rows that it is next to,
of which two wait for more; the nine weights stay in registers. A number is then loaded twice from L1 where a tile
that gathers the neighbours of each token loads it six times, and the weights not once a token but once a run. Two rows
at a time: what is loaded is then used at once, since 16-bit numbers kept from step to step would be packed anew.

Blocks are (GROUPS, CHANNELS): pairs of columns, and channels. ``a, b, c, d`` are the columns -1, 0, 1 and 2 of a pair.
"""

import triton
import triton.language as tl

from mila_mm.ops.triton.common import widen


@triton.jit
def strip_place(blocks, width, rows_per_run, height, GROUPS: tl.constexpr):
    """Block of channels, first column, first row, rows and image of a program.

    Grid: blocks of channels * strips, runs of rows, batch. Neighbours share the lines that hold both their channels.
    """
    program = tl.program_id(0)
    first_row = tl.program_id(1) * rows_per_run
    count = tl.minimum(rows_per_run, height - first_row)
    return program % blocks, program // blocks * (2 * GROUPS), first_row, count, tl.program_id(2).to(tl.int64)


@triton.jit
def strip_masks(first_column, width, channel_live, GROUPS: tl.constexpr):
    """Which of the columns -1 to 2 of each pair exist, (GROUPS, CHANNELS) each."""
    column = first_column + 2 * tl.arange(0, GROUPS)[:, None]
    live = channel_live[None, :]
    left = live & (column >= 1) & (column - 1 < width)
    return left, live & (column < width), live & (column + 1 < width), live & (column + 2 < width)


@triton.jit
def load_strip(row_ptr, offset, token_stride, row_live, left, middle, right, beyond):
    """A row in fp32, columns -1 to 2 of each pair; zero outside of the map."""
    a = tl.load(row_ptr + (offset - token_stride), mask=left & row_live, other=0.0)
    b = tl.load(row_ptr + offset, mask=middle & row_live, other=0.0)
    c = tl.load(row_ptr + (offset + token_stride), mask=right & row_live, other=0.0)
    d = tl.load(row_ptr + (offset + 2 * token_stride), mask=beyond & row_live, other=0.0)
    return widen(a), widen(b), widen(c), widen(d)


@triton.jit
def load_weights(weight_ptr, channel, channel_live, FLIPPED: tl.constexpr, RESIDUAL: tl.constexpr):
    """The nine weights (1, CHANNELS) of a (C, 1, 3, 3) weight in fp32, counted from the end where ``FLIPPED``.

    ``RESIDUAL``: with 1 added to the middle one, which adds what is convolved to the result.
    """
    first: tl.constexpr = 8 if FLIPPED else 0
    step: tl.constexpr = -1 if FLIPPED else 1
    weight_ptr += channel * 9 + first
    w0 = tl.load(weight_ptr, mask=channel_live, other=0.0).to(tl.float32)[None, :]
    w1 = tl.load(weight_ptr + step, mask=channel_live, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(weight_ptr + 2 * step, mask=channel_live, other=0.0).to(tl.float32)[None, :]
    w3 = tl.load(weight_ptr + 3 * step, mask=channel_live, other=0.0).to(tl.float32)[None, :]
    w4 = tl.load(weight_ptr + 4 * step, mask=channel_live, other=0.0).to(tl.float32)[None, :]
    w5 = tl.load(weight_ptr + 5 * step, mask=channel_live, other=0.0).to(tl.float32)[None, :]
    w6 = tl.load(weight_ptr + 6 * step, mask=channel_live, other=0.0).to(tl.float32)[None, :]
    w7 = tl.load(weight_ptr + 7 * step, mask=channel_live, other=0.0).to(tl.float32)[None, :]
    w8 = tl.load(weight_ptr + 8 * step, mask=channel_live, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        w4 += 1.0
    return w0, w1, w2, w3, w4, w5, w6, w7, w8


@triton.jit
def add_row(first, second, a, b, c, d, w0, w1, w2):
    """``first`` and ``second``, the sums of a pair's two columns, plus what a row adds through three weights."""
    first += a * w0
    second += b * w0
    first += b * w1
    second += c * w1
    first += c * w2
    second += d * w2
    return first, second


@triton.jit
def add_two_rows(sums, start, upper, lower, weights):
    """Take in two rows r and r + 1: the complete sums of the rows r - 1 and r, and what waits for more.

    ``sums`` are those of row r - 1, to which row r is missing, and of row r, to which r and r + 1 are, two columns
    each; the third and fourth result are the same two rows down. ``start`` is what a sum begins with.
    """
    w0, w1, w2, w3, w4, w5, w6, w7, w8 = weights
    above = add_row(sums[0], sums[1], *upper, w6, w7, w8)
    own = add_row(sums[2], sums[3], *upper, w3, w4, w5)
    own = add_row(own[0], own[1], *lower, w6, w7, w8)
    below = add_row(start, start, *upper, w0, w1, w2)
    below = add_row(below[0], below[1], *lower, w3, w4, w5)
    last = add_row(start, start, *lower, w0, w1, w2)
    return above, own, (below[0], below[1], last[0], last[1])


@triton.jit
def add_products(sum0, sum1, sum2, first, second, a, b, c, d):
    """Products of x at a pair's two columns with a row of g, to the sums of the three weights of one row.

    dw_t = sum of x_m g_(m - t): the weight to the left of the middle meets g to the right of x.
    """
    sum0 += first * c
    sum1 += first * b
    sum2 += first * a
    sum0 += second * d
    sum1 += second * c
    sum2 += second * b
    return sum0, sum1, sum2


@triton.jit
def add_all_products(sums, upper, lower, x0, x1, x2, x3):
    """Products of two rows r and r + 1 of g with x, at a pair's two columns, at the rows r - 1 to r + 2."""
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = sums
    s0, s1, s2 = add_products(s0, s1, s2, *x0, *upper)
    s3, s4, s5 = add_products(s3, s4, s5, *x1, *upper)
    s6, s7, s8 = add_products(s6, s7, s8, *x2, *upper)
    s0, s1, s2 = add_products(s0, s1, s2, *x1, *lower)
    s3, s4, s5 = add_products(s3, s4, s5, *x2, *lower)
    s6, s7, s8 = add_products(s6, s7, s8, *x3, *lower)
    return s0, s1, s2, s3, s4, s5, s6, s7, s8, s9


@triton.jit
def load_pair(row_ptr, offset, token_stride, row_live, middle, right):
    """A row in fp32 at a pair's own two columns; zero outside of the map and where not ``row_live``."""
    first = tl.load(row_ptr + offset, mask=middle & row_live, other=0.0)
    return widen(first), widen(tl.load(row_ptr + (offset + token_stride), mask=right & row_live, other=0.0))


@triton.jit
def add_own(sums, upper, lower, begun, upper_live, lower_live):
    """g of two rows at a pair's own columns, where these are of the run, to the sum of g."""
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = sums
    s9 += tl.where(begun & upper_live, upper[1] + upper[2], 0.0)
    s9 += tl.where(lower_live, lower[1] + lower[2], 0.0)
    return s0, s1, s2, s3, s4, s5, s6, s7, s8, s9


@triton.jit
def store_sum(ptr, products, index: tl.constexpr, channels, channel, channel_live):
    """Store the sum over tokens of one weight's products as row ``index`` of (10, channels)."""
    tl.store(ptr + index * channels + channel, tl.sum(products, axis=0), mask=channel_live)


@triton.jit
def store_sums(parts_ptr, blocks, channels, channel, channel_live, sums):
    """Store a program's sums as one of the parts (batch * runs * strips, 10, channels)."""
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9 = sums
    strips = tl.num_programs(0) // blocks
    part = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    parts_ptr += (part * strips + tl.program_id(0) // blocks) * (10 * channels)
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
