"""Device functions that the attention kernels share. Every one is inlined into its callers.

Notation follows the docstring of :mod:`mila_mm.ops.triton`. Blocks hold tokens along axis 0 and the channels of one
head along axis 1; ``PADDED`` is the head width ``WIDTH`` rounded up to a power of two, as Triton's blocks need it.
"""

import triton
import triton.language as tl


@triton.jit
def exponential(x, ACCURATE: tl.constexpr):
    """exp(x); ``ACCURATE`` corrects the rounding of ``x * log2(e)``, which alone costs |x| / 2 ulp in fp32."""
    if ACCURATE:
        x = tl.where(x < -150.0, -150.0, x)  # exp is 0 there already; keeps -inf out of the difference below
        product = x * 1.44269502162933349609375
        rest = tl.fma(x, 1.44269502162933349609375, -product) + x * 1.92596299112661746887e-8
        power = tl.exp2(product)
        return power + power * (rest * 0.693147180559945309417)
    return tl.exp(x)


@triton.jit
def feature_map(x, ACCURATE: tl.constexpr):
    """elu(x) + 1 as x + 1 or exp(x): the difference elu(x) + 1 would lose small values. NaN stays NaN."""
    # exp may overflow to inf where it is not selected; a select, unlike a product, does not let that through.
    return tl.where(x > 0.0, x + 1.0, exponential(x, ACCURATE))


@triton.jit
def feature_slope(mapped):
    """Derivative of the feature map from its value: min(phi, 1), exact on both branches."""
    return tl.where(mapped < 1.0, mapped, 1.0)


@triton.jit
def sigmoid(x, ACCURATE: tl.constexpr):
    """1 / (1 + exp(-x)), from an exponential that cannot overflow."""
    decay = exponential(-tl.abs(x), ACCURATE)
    return tl.where(x >= 0.0, 1.0, decay) / (1.0 + decay)


@triton.jit
def multiply(a, b, LOW: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr):
    """Matrix product with an fp32 sum: operands rounded to ``DTYPE`` where ``LOW``, else fp32 at ``PRECISION``."""
    if LOW:
        return tl.dot(a.to(DTYPE), b.to(DTYPE), out_dtype=tl.float32)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def rotate(x, cos, sin, TOKENS: tl.constexpr, PADDED: tl.constexpr):
    """Turn the channel pairs (2j, 2j + 1) of ``x`` (TOKENS, PADDED) by the angles (TOKENS, PADDED / 2)."""
    even, odd = tl.split(tl.reshape(x, (TOKENS, PADDED // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (TOKENS, PADDED))


@triton.jit
def load_rotation(
    cos_ptr, sin_ptr, table_stride, row, column, live, head, heads,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, STRADDLES: tl.constexpr,
):
    """Cosines and sines (TOKENS, PADDED / 2) of one head's pairs: the first half of all pairs turn by row."""
    local = tl.arange(0, PADDED // 2)
    quarter = heads * (WIDTH // 4)
    if STRADDLES:  # with an odd number of heads the middle one carries rows in some pairs and columns in the others
        pair = head * (WIDTH // 2) + local
        by_row = pair < quarter
        position = tl.where(by_row[None, :], row[:, None], column[:, None])
        offset = position * table_stride + tl.where(by_row, pair, pair - quarter)[None, :]
    else:  # one decision for the whole head keeps the loads of the table contiguous
        first = head * (WIDTH // 2)
        by_row = first < quarter
        position = tl.where(by_row, row, column)
        offset = position[:, None] * table_stride + tl.where(by_row, first, first - quarter) + local[None, :]
    mask = live[:, None] & (local < WIDTH // 2)[None, :]
    return tl.load(cos_ptr + offset, mask=mask, other=0.0), tl.load(sin_ptr + offset, mask=mask, other=0.0)


@triton.jit
def image_offset(batch, batch_stride, ALIGNED: tl.constexpr):
    """Elements before an image; ``ALIGNED`` promises a multiple of 16, which wide loads need to know."""
    offset = batch * batch_stride
    if ALIGNED:
        offset = tl.multiple_of(offset, 16)
    return offset


@triton.jit
def load_square(ptr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """A (WIDTH, WIDTH) fp32 matrix as a (PADDED, PADDED) block, zero outside."""
    index = tl.arange(0, PADDED)
    mask = (index < WIDTH)[:, None] & (index < WIDTH)[None, :]
    return tl.load(ptr + index[:, None] * WIDTH + index[None, :], mask=mask, other=0.0)


@triton.jit
def tile_tokens(tile, tiles_across, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """First row and column of a tile, then row, column and 'lies inside the map' of its tokens, in row-major order."""
    first_row = tile // tiles_across * ROWS
    first_column = tile % tiles_across * COLUMNS
    index = tl.arange(0, ROWS * COLUMNS)
    row = first_row + index // COLUMNS
    column = first_column + index % COLUMNS
    return first_row, first_column, row, column, (row < height) & (column < width)


@triton.jit
def stencil(
    x_ptr, taps_ptr, x_token_stride, channels, row, column, first_token, height, width, channel, channel_live,
    FLIPPED: tl.constexpr, TOKENS: tl.constexpr, PADDED: tl.constexpr,
):
    """Depthwise 3x3 convolution (``FLIPPED``: its transpose) with zero padding, at the tokens of a tile, in fp32.

    Args:
        x_ptr: Channel 0 of the image's token ``first_token``, which all offsets count from: they stay below 2**31.
        taps_ptr: (9, channels) weights, tap after tap.
        row, column: Positions of the tokens. first_token: ``row * width + column`` of the first of them.
        channel: (PADDED,) channel numbers; channel_live: which of them exist.
    """
    total = tl.zeros((TOKENS, PADDED), tl.float32)
    token = row * width + column - first_token
    # Rolled rows: unrolling all nine taps keeps nine loads alive at once and costs about seventy registers.
    for down in tl.range(0, 3, num_stages=1):
        near_row = row + (down - 1)
        row_live = (near_row >= 0) & (near_row < height)
        for right in tl.static_range(3):
            near_column = column + (right - 1)
            live = row_live & (near_column >= 0) & (near_column < width)
            offset = (token + (down - 1) * width + (right - 1)) * x_token_stride
            x = tl.load(
                x_ptr + offset[:, None] + channel[None, :], mask=live[:, None] & channel_live[None, :], other=0.0
            )
            tap = down * 3 + right
            if FLIPPED:
                tap = 8 - tap
            weight = tl.load(taps_ptr + tap * channels + channel, mask=channel_live, other=0.0)
            total += x.to(tl.float32) * weight.to(tl.float32)[None, :]
    return total
