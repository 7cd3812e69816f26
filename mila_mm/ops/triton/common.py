"""Device functions that the attention kernels share. Every one is inlined into its callers.

Notation follows the docstring of :mod:`mila_mm.ops.attention`. Blocks hold tokens along axis 0 and the channels of one
head along axis 1; ``PADDED`` is the head width ``WIDTH`` rounded up to a power of two, as Triton's blocks need it.
"""

import triton
import triton.language as tl

from mila_mm.ops.triton.configs import interpreted

INLINE = tl.constexpr(not interpreted())
"""Whether there is PTX: the interpreter takes the same functions in Triton's own terms."""


@triton.jit
def widen(x):
    """``x`` in fp32. Two bf16 take two instructions; Triton's own conversion takes three."""
    if INLINE and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            'shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;', '=&r,=r,r', [x], dtype=tl.float32, is_pure=True, pack=2
        )
    return x.to(tl.float32)


@triton.jit
def reciprocal(x, ACCURATE: tl.constexpr):
    """1 / x; unless ``ACCURATE`` to 1 ulp, and 0 where it would be below the normal numbers."""
    if INLINE and not ACCURATE:
        return tl.inline_asm_elementwise(
            'rcp.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def power_of_2(x):
    """2^x, 0 where that is below the normal numbers: this spares the three instructions that would scale it."""
    if INLINE:
        return tl.inline_asm_elementwise(
            'ex2.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def exponential(x, ACCURATE: tl.constexpr):
    """exp(x); ``ACCURATE`` corrects the rounding of ``x * log2(e)``, which alone costs |x| / 2 ulp in fp32."""
    if ACCURATE:
        x = tl.where(x < -150.0, -150.0, x)  # exp is 0 there already; keeps -inf out of the difference below
        product = x * 1.44269502162933349609375
        rest = tl.fma(x, 1.44269502162933349609375, -product) + x * 1.92596299112661746887e-8
        power = tl.exp2(product)
        return power + power * (rest * 0.693147180559945309417)
    return power_of_2(x * 1.44269502162933349609375)


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
    """1 / (1 + exp(-x)); where ``ACCURATE`` from an exponential that cannot overflow, to keep its smallest values."""
    if ACCURATE:
        decay = exponential(-tl.abs(x), True)
        return tl.where(x >= 0.0, 1.0, decay) / (1.0 + decay)
    return reciprocal(1.0 + power_of_2(x * -1.44269502162933349609375), False)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """``x`` in fp32, rounded to TF32 where ``PRECISION`` says so: the matrix units cut off what Triton hands them."""
    if INLINE and PRECISION == 'tf32' and x.dtype == tl.float32:  # 16-bit floats are TF32 as they are
        return tl.inline_asm_elementwise(
            'cvt.rna.tf32.f32 $0, $1;', '=r,r', [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return widen(x)


@triton.jit
def multiply(a, b, LOW: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr):
    """Matrix product with an fp32 sum: operands rounded to ``DTYPE`` where ``LOW``, else fp32 at ``PRECISION``."""
    if LOW:
        return tl.dot(a.to(DTYPE), b.to(DTYPE), out_dtype=tl.float32)
    return tl.dot(operand(a, PRECISION), operand(b, PRECISION), input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def rotate(x, cos, sin, TOKENS: tl.constexpr, PADDED: tl.constexpr):
    """Turn the channel pairs (2j, 2j + 1) of ``x`` (TOKENS, PADDED) by the angles (TOKENS, PADDED / 2)."""
    even, odd = tl.split(tl.reshape(x, (TOKENS, PADDED // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (TOKENS, PADDED))


@triton.jit
def load_rotation(
    cos_ptr, sin_ptr, table_stride, row, column, live, head, heads,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, STRADDLES: tl.constexpr,
):  # fmt: skip
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
def run_positions(first, local, width):
    """Row and column of the tokens ``local`` of a run that begins at token ``first``, where an image has ``width``.

    In fp32, where one division serves the whole run. Exact while ``width`` + ``local`` is below 2**20: the quotient is
    at least 1 / (2 width) away from an integer, and its error, three roundings, is less.
    """
    first_column = first % width
    down = ((first_column + local).to(tl.float32) + 0.5) * (1.0 / width.to(tl.float32))
    down = down.to(tl.int32)
    return first // width + down, first_column + local - down * width


@triton.jit
def tile_tokens(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column, in the tile, of its tokens: first those of all even rows, then those of all odd ones.

    So :func:`stencil`, which computes two rows at a time, has both where the other kernels expect them.
    """
    HALF: tl.constexpr = ROWS // 2 * COLUMNS
    index = tl.arange(0, ROWS * COLUMNS)
    return index % HALF // COLUMNS * 2 + index // HALF, index % COLUMNS


@triton.jit
def tile_place(heads, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a program's tile is: head, first row, first column, first token, image, and the head's number in the batch.

    Grid: tiles across * heads, tiles down, batch.
    """
    program = tl.program_id(0)  # heads fastest: neighbours share the lines that hold both their channels
    head = program % heads
    first_column = program // heads * COLUMNS
    first_row = tl.program_id(1) * ROWS
    batch = tl.program_id(2).to(tl.int64)
    return head, first_row, first_column, (first_row * width + first_column).to(tl.int64), batch, batch * heads + head


@triton.jit
def tile_mask(
    first_row, first_column, height, width,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of a tile: tokens (TOKENS, 1) counted from its first, channels (1, PADDED) from the head's first, what exists."""
    row, column = tile_tokens(ROWS, COLUMNS)
    live = (first_row + row < height) & (first_column + column < width)
    channel = tl.arange(0, PADDED)
    return (row * width + column)[:, None], channel[None, :], live[:, None] & (channel < WIDTH)[None, :]


@triton.jit
def load_row(x_ptr, row_stride, row, columns, live, first_row, height, channel, channel_live):
    """x (tokens, channels) in fp32 at ``row``, counted from ``first_row``; zero outside the map.

    ``columns`` are the offsets of the tokens' columns: with four rows and three columns, twelve sums are all that
    the offsets of a pair's neighbours take.
    """
    live = live & (first_row + row >= 0) & (first_row + row < height)
    offset = row * row_stride + columns
    mask = live[:, None] & channel_live[None, :]
    return widen(tl.load(x_ptr + offset[:, None] + channel[None, :], mask=mask, other=0.0))


@triton.jit
def load_tap(taps_ptr, tap_stride, channel, channel_live, TAP: tl.constexpr, FLIPPED: tl.constexpr):
    """The weights (1, channels) of one of nine taps, counted from the other end where ``FLIPPED``."""
    tap: tl.constexpr = 8 - TAP if FLIPPED else TAP
    return tl.load(taps_ptr + tap * tap_stride + channel, mask=channel_live, other=0.0)[None, :]


@triton.jit
def joined(upper, lower, HALF: tl.constexpr, PADDED: tl.constexpr):
    """The even and the odd rows of a tile as one block, in the order of :func:`tile_tokens`."""
    return tl.reshape(tl.permute(tl.join(upper, lower), (2, 0, 1)), (2 * HALF, PADDED))


@triton.jit
def stencil(
    start, x_ptr, x_token_stride, taps_ptr, tap_stride, first_row, first_column, height, width, channel, channel_live,
    FLIPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """``start`` + depthwise 3x3 convolution (``FLIPPED``: its transpose), zero padding, at a tile's tokens, in fp32.

    Two rows at a time, so that of the four rows that these need the inner two are loaded and widened once, not twice,
    and a weight serves both.

    Args:
        start: What the sums begin with, a number or (1, PADDED): a bias costs nothing here.
        x_ptr: The tile's first token, which all offsets count from: they stay below 2**31.
        taps_ptr: The first of nine weights, which are ``tap_stride`` apart.
        channel: (PADDED,) channel numbers, counted from where both pointers stand; channel_live: which of them exist.
    """
    HALF: tl.constexpr = ROWS // 2 * COLUMNS
    index = tl.arange(0, HALF)
    row = index // COLUMNS * 2
    row_stride = width * x_token_stride
    upper = tl.zeros((HALF, PADDED), tl.float32) + start
    lower = upper
    for right in tl.static_range(3):
        w0 = load_tap(taps_ptr, tap_stride, channel, channel_live, right, FLIPPED)
        w1 = load_tap(taps_ptr, tap_stride, channel, channel_live, 3 + right, FLIPPED)
        w2 = load_tap(taps_ptr, tap_stride, channel, channel_live, 6 + right, FLIPPED)
        column = index % COLUMNS + (right - 1)
        live = (first_column + column >= 0) & (first_column + column < width)
        place = (column * x_token_stride, live, first_row, height, channel, channel_live)
        upper += load_row(x_ptr, row_stride, row - 1, *place) * w0
        x = load_row(x_ptr, row_stride, row, *place)
        upper += x * w1
        lower += x * w0
        x = load_row(x_ptr, row_stride, row + 1, *place)
        upper += x * w2
        lower += x * w1
        lower += load_row(x_ptr, row_stride, row + 2, *place) * w2
    return joined(upper, lower, HALF, PADDED)
