"""Kernels of the forward pass: the state of each head, the sum of its parts, the output."""

import triton
import triton.language as tl

from mila_mm.ops.triton.common import (
    feature_map,
    image_offset,
    load_rotation,
    load_square,
    multiply,
    reciprocal,
    rotate,
    run_positions,
    sigmoid,
    stencil,
    tile_mask,
    tile_place,
    tile_tokens,
    widen,
)

# Sizes of the image change from batch to batch: no binary may depend on whether one of them divides by 16. Strides of
# tokens and the number of channels are not listed, since their divisibility is what allows 128-bit loads. Batch strides
# are products of both; what loads need to know of them is in `ALIGNED`.
SIZES = [
    'height',
    'width',
    'tokens',
    'splits',
    'tokens_per_split',
    'heads',
    'qk_batch_stride',
    'v_batch_stride',
    'gate_batch_stride',
    'grad_y_batch_stride',
    'grad_out_batch_stride',
]


@triton.jit(do_not_specialize=SIZES)
def state_kernel(
    qk_ptr, v_ptr, cos_ptr, sin_ptr, state_ptr, mean_ptr,
    qk_batch_stride, qk_token_stride, v_batch_stride, v_token_stride, table_stride,
    width, tokens, heads, tokens_per_split, scale,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
    STRADDLES: tl.constexpr, ACCURATE: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of S = mean of k~ v^T and of the mean of k^, over one run of tokens of one head.

    Grid: heads, splits, batch; neighbours share the lines that hold both their channels.
    Writes state (batch, splits, heads, WIDTH, WIDTH) and mean (batch, splits, heads, WIDTH), both times ``scale``.
    """
    head = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * tokens_per_split
    count = tl.minimum(tokens_per_split, tokens - first)

    channel = tl.arange(0, PADDED)
    channel_live = channel < WIDTH
    k_ptr = qk_ptr + image_offset(batch, qk_batch_stride, ALIGNED) + first.to(tl.int64) * qk_token_stride
    k_ptr += (heads + head) * WIDTH
    v_ptr += image_offset(batch, v_batch_stride, ALIGNED) + first.to(tl.int64) * v_token_stride + head * WIDTH

    state = tl.zeros((PADDED, PADDED), tl.float32)
    mapped_sum = tl.zeros((BLOCK, PADDED), tl.float32)
    for begin in tl.range(0, count, BLOCK, num_stages=STAGES):
        local = begin + tl.arange(0, BLOCK)
        live = local < count
        mask = live[:, None] & channel_live[None, :]
        k = tl.load(k_ptr + local[:, None] * qk_token_stride + channel[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + local[:, None] * v_token_stride + channel[None, :], mask=mask, other=0.0)
        row, column = run_positions(first, local, width)
        cos, sin = load_rotation(
            cos_ptr, sin_ptr, table_stride, row, column, live, head, heads, WIDTH, PADDED, STRADDLES
        )  # fmt: skip
        # Masked after the feature map: phi(0) is 1, not 0.
        mapped = tl.where(mask, feature_map(widen(k), ACCURATE), 0.0)
        mapped_sum += mapped
        turned = rotate(mapped, cos, sin, BLOCK, PADDED)
        # The product with `scale` keeps this sum outside the tensor cores, whose own accumulation truncates.
        state += multiply(tl.trans(turned), v, LOW, PRECISION, v_ptr.dtype.element_ty) * scale

    part = (batch * tl.num_programs(1) + tl.program_id(1)) * heads + head
    index = tl.arange(0, PADDED)
    square = state_ptr + part * (WIDTH * WIDTH) + index[:, None] * WIDTH + index[None, :]
    tl.store(square, state, mask=(index < WIDTH)[:, None] & (index < WIDTH)[None, :])
    tl.store(mean_ptr + part * WIDTH + channel, tl.sum(mapped_sum, axis=0) * scale, mask=channel_live)


@triton.jit
def sum_parts(
    parts_ptr, result_ptr, owner, chunk, heads, splits,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum ``CHUNK`` entries of one head over its splits: (batch, splits, heads, SIZE) to (batch, heads, SIZE)."""
    index = chunk * CHUNK + tl.arange(0, CHUNK)
    live = index < SIZE
    parts_ptr += (owner // heads * splits * heads + owner % heads) * SIZE
    total = tl.zeros((ROWS, CHUNK), tl.float32)
    for begin in tl.range(0, splits, ROWS, num_stages=1):
        split = begin + tl.arange(0, ROWS)
        offset = (split.to(tl.int64) * heads * SIZE)[:, None] + index[None, :]
        total += tl.load(parts_ptr + offset, mask=(split < splits)[:, None] & live[None, :], other=0.0)
    tl.store(result_ptr + owner * SIZE + index, tl.sum(total, axis=0), mask=live)


@triton.jit(do_not_specialize=SIZES)
def reduce_kernel(
    state_parts_ptr, mean_parts_ptr, state_ptr, mean_ptr, heads, splits,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sum the parts of one head over its splits, always in the same order.

    Grid: batch * heads * (chunks of the WIDTH x WIDTH matrix, and one more for the vector).
    """
    square_chunks: tl.constexpr = (WIDTH * WIDTH + CHUNK - 1) // CHUNK
    program = tl.program_id(0)
    chunk = program % (square_chunks + 1)
    owner = (program // (square_chunks + 1)).to(tl.int64)
    if chunk < square_chunks:
        sum_parts(state_parts_ptr, state_ptr, owner, chunk, heads, splits, WIDTH * WIDTH, CHUNK, ROWS)
    else:
        sum_parts(mean_parts_ptr, mean_ptr, owner, 0, heads, splits, WIDTH, CHUNK, ROWS)


@triton.jit
def attend(
    q_ptr, v_ptr, taps_ptr, bias_ptr, cos_ptr, sin_ptr, state_ptr, mean_ptr,
    q_token_stride, v_token_stride, table_stride, height, width, heads, eps, head, first_row, first_column,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_LEPE: tl.constexpr,
    STRADDLES: tl.constexpr, ACCURATE: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output before the gate, o = S^T P + lepe(v), at the tokens of a tile; pointers stand at its first token."""
    row, column = tile_tokens(ROWS, COLUMNS)
    live = (first_row + row < height) & (first_column + column < width)
    channel = tl.arange(0, PADDED)
    channel_live = channel < WIDTH
    offset = (row * width + column)[:, None] * q_token_stride + channel[None, :]
    q = tl.load(q_ptr + offset, mask=live[:, None] & channel_live[None, :], other=0.0)
    cos, sin = load_rotation(
        cos_ptr, sin_ptr, table_stride, first_row + row, first_column + column, live, head, heads,
        WIDTH, PADDED, STRADDLES,
    )  # fmt: skip
    mean = tl.load(mean_ptr + channel, mask=channel_live, other=0.0)
    state = load_square(state_ptr, WIDTH, PADDED)
    mapped = feature_map(widen(q), ACCURATE)
    normaliser = reciprocal(tl.sum(mapped * mean[None, :], axis=1) + eps, ACCURATE)
    # Scaled before it becomes an operand: its entries then stay O(1) in 16 bits, whatever the size of q and k.
    query = rotate(mapped, cos, sin, ROWS * COLUMNS, PADDED) * normaliser[:, None]
    out = multiply(query, state, LOW, PRECISION, q_ptr.dtype.element_ty)
    if HAS_LEPE:
        bias = tl.load(bias_ptr + channel, mask=channel_live, other=0.0).to(tl.float32)
        out += stencil(
            bias[None, :],
            v_ptr,
            v_token_stride,
            taps_ptr,
            WIDTH,
            first_row,
            first_column,
            height,
            width,
            channel,
            channel_live,
            False,
            ROWS,
            COLUMNS,
            PADDED,
        )
    return out


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    qk_ptr, v_ptr, taps_ptr, bias_ptr, gate_ptr, cos_ptr, sin_ptr, state_ptr, mean_ptr, y_ptr,
    qk_batch_stride, qk_token_stride, v_batch_stride, v_token_stride, gate_batch_stride, gate_token_stride,
    table_stride, height, width, heads, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_LEPE: tl.constexpr, HAS_GATE: tl.constexpr, ALIGNED: tl.constexpr,
    STRADDLES: tl.constexpr, ACCURATE: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = (S^T P + lepe(v)) * silu(gate) for one tile and one head. Grid: tiles across * heads, tiles down, batch."""
    head, first_row, first_column, first, batch, owner = tile_place(heads, width, ROWS, COLUMNS)
    qk_ptr += image_offset(batch, qk_batch_stride, ALIGNED) + first * qk_token_stride + head * WIDTH
    v_ptr += image_offset(batch, v_batch_stride, ALIGNED) + first * v_token_stride + head * WIDTH
    out = attend(
        qk_ptr, v_ptr, taps_ptr + head * (9 * WIDTH), bias_ptr + head * WIDTH, cos_ptr, sin_ptr,
        state_ptr + owner * (WIDTH * WIDTH), mean_ptr + owner * WIDTH,
        qk_token_stride, v_token_stride, table_stride, height, width, heads, eps, head, first_row, first_column,
        WIDTH, PADDED, ROWS, COLUMNS, HAS_LEPE, STRADDLES, ACCURATE, LOW, PRECISION,
    )  # fmt: skip
    local, channel, mask = tile_mask(first_row, first_column, height, width, WIDTH, PADDED, ROWS, COLUMNS)
    if HAS_GATE:
        gate_ptr += image_offset(batch, gate_batch_stride, ALIGNED) + first * gate_token_stride + head * WIDTH
        gate = widen(tl.load(gate_ptr + local * gate_token_stride + channel, mask=mask, other=0.0))
        out *= gate * sigmoid(gate, ACCURATE)
    channels = heads * WIDTH
    y_ptr += (batch * height * width + first) * channels + head * WIDTH
    tl.store(y_ptr + local * channels + channel, out.to(y_ptr.dtype.element_ty), mask=mask)
