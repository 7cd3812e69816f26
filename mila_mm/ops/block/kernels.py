"""A block's sums over tokens: gradients of several matrices in one launch, and those of all other parameters in one.

======================  ====================  ==============================================
kernel                  reads                 writes
======================  ====================  ==============================================
weight_gradients        dy and x, thrice      (parts of) dy^T x
block_reduce            all parts             gradients of biases, norms and stencils
======================  ====================  ==============================================
"""

import triton
import triton.language as tl

from mila_mm.ops.feed_forward.kernels import add_product

SIZES = ['norm_parts', 'stencil_parts', 'lepe_parts', 'column_parts', 'hidden_parts']


@triton.jit(do_not_specialize=['rows', 'rows_per_split'])
def weight_gradients_kernel(
    grad1_ptr, grad2_ptr, grad3_ptr, x1_ptr, x2_ptr, x3_ptr, out_ptr,
    height1, width1, height2, width2, height3, width3, first, distance, rows, rows_per_split,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """grad^T x of three pairs grad (rows, height) and x (rows, width), contiguous, for a run of rows.

    The results (height, width) lie one behind the other from ``out_ptr + first`` on, those of each split ``distance``
    numbers behind those of the one before. A height of 0 is a pair less. Grid: blocks of all results, splits.
    """
    tile = tl.program_id(0)
    begin2 = tl.cdiv(height1, BLOCK) * tl.cdiv(width1, BLOCK)
    begin3 = begin2 + tl.cdiv(height2, BLOCK) * tl.cdiv(width2, BLOCK)
    second, third = tile >= begin2, tile >= begin3
    height = tl.where(third, height3, tl.where(second, height2, height1))
    width = tl.where(third, width3, tl.where(second, width2, width1))
    grad_ptr = tl.where(third, grad3_ptr, tl.where(second, grad2_ptr, grad1_ptr))
    x_ptr = tl.where(third, x3_ptr, tl.where(second, x2_ptr, x1_ptr))
    before = tl.where(third, height1 * width1 + height2 * width2, tl.where(second, height1 * width1, 0))
    tile -= tl.where(third, begin3, tl.where(second, begin2, 0))

    across = tl.cdiv(width, BLOCK)
    row = tile // across * BLOCK + tl.arange(0, BLOCK)
    column = tile % across * BLOCK + tl.arange(0, BLOCK)
    row_live, column_live = row < height, column < width
    split = tl.program_id(1).to(tl.int64)
    begin = split * rows_per_split
    count = tl.minimum(rows_per_split, rows - begin).to(tl.int32)
    grad_ptr += begin * height
    x_ptr += begin * width
    dtype = grad_ptr.dtype.element_ty
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, count, ROWS, num_stages=STAGES):
        local = start + tl.arange(0, ROWS)
        live = (local < count)[:, None]
        grad = tl.load(grad_ptr + local[:, None] * height + row[None, :], mask=live & row_live[None, :], other=0.0)
        x = tl.load(x_ptr + local[:, None] * width + column[None, :], mask=live & column_live[None, :], other=0.0)
        total = add_product(total, tl.trans(grad), x, LOW, dtype)
    target = out_ptr + split * distance + first + before + row[:, None] * width + column[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=row_live[:, None] & column_live[None, :])


@triton.jit(do_not_specialize=SIZES)
def block_reduce_kernel(
    parts_ptr, out_ptr, channels, hidden, norm_parts, stencil_parts, lepe_parts, column_parts, hidden_parts,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of what :func:`mila_mm.ops.block.layout.parts_of` lists, always in one order, one vector behind the other.

    The vectors have as many numbers as there are channels, those of the hidden units' sum behind them excepted; nine of
    a stencil are its weight (channels, 9), the tenth its bias. Grid: vectors * (channels / CHANNELS), and so for hidden
    units.
    """
    blocks = channels // CHANNELS
    program = tl.program_id(0)
    vector = program // blocks
    first = program % blocks * CHANNELS
    stencil = (vector - 6) // 10
    tap = (vector - 6) % 10
    norms, stencils = 3 * channels * norm_parts, 10 * channels * stencil_parts
    columns = 2 * norms + 3 * stencils + 10 * channels * lepe_parts
    of_norm, of_stencil, of_column = vector < 6, (vector >= 6) & (vector < 46), (vector >= 46) & (vector < 50)
    is_weight = of_stencil & (tap < 9)

    count = tl.where(vector >= 50, hidden_parts, tl.where(of_column, column_parts, norm_parts))
    count = tl.where(of_stencil, tl.where(stencil == 3, lepe_parts, stencil_parts), count)
    distance = tl.where(vector >= 50, hidden, tl.where(of_norm, 3 * channels, 2 * channels))
    distance = tl.where(of_stencil, 10 * channels, distance)
    unit = program * CHANNELS - 50 * channels  # hidden units count from the end of the vectors
    source = columns + 4 * channels * column_parts + unit
    half = (vector - 46) // 2
    source = tl.where(of_column, columns + (half * column_parts * 2 + (vector - 46) % 2) * channels + first, source)
    source = tl.where(of_stencil, 2 * norms + stencil * stencils + tap * channels + first, source)
    source = tl.where(of_norm, vector // 3 * norms + vector % 3 * channels + first, source)
    step = tl.where(is_weight, 9, 1)
    target = tl.where(is_weight, (6 + 10 * stencil) * channels + first * 9 + tap, program * CHANNELS)

    channel = tl.arange(0, CHANNELS)
    live = channel < tl.where(vector >= 50, hidden - unit, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for begin in tl.range(0, count, ROWS, num_stages=1):
        part = begin + tl.arange(0, ROWS)
        offset = (source + part.to(tl.int64) * distance)[:, None] + channel[None, :]
        total += tl.load(parts_ptr + offset, mask=(part < count)[:, None] & live[None, :], other=0.0)
    tl.store(out_ptr + target + channel * step, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=live)
