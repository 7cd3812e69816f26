"""The last stage of a block's sums over tokens: gradients of all parameters that are no matrices, in one launch.

======================  ====================  ==============================================
kernel                  reads                 writes
======================  ====================  ==============================================
block_reduce            all parts             gradients of biases, norms and stencils
======================  ====================  ==============================================
"""

import triton
import triton.language as tl

SIZES = ['norm_parts', 'stencil_parts', 'lepe_parts', 'column_parts', 'hidden_parts']


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
