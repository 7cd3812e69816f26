"""Kernels of the backward pass. Nothing but q, k, v, the gate, S and the key mean comes from the forward pass."""

import triton
import triton.language as tl

from mila_mm.ops.attention.forward_kernels import SIZES, attend
from mila_mm.ops.triton.common import (
    feature_map,
    feature_slope,
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


@triton.jit(do_not_specialize=SIZES)
def gate_backward_kernel(
    grad_y_ptr, qk_ptr, v_ptr, taps_ptr, bias_ptr, gate_ptr, cos_ptr, sin_ptr, state_ptr, mean_ptr,
    grad_out_ptr, grad_gate_ptr,
    grad_y_batch_stride, grad_y_token_stride, qk_batch_stride, qk_token_stride, v_batch_stride, v_token_stride,
    gate_batch_stride, gate_token_stride, grad_gate_token_stride, table_stride, height, width, heads, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_LEPE: tl.constexpr,
    ALIGNED: tl.constexpr, STRADDLES: tl.constexpr, ACCURATE: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """do = dy * silu(u) and du = dy * o * silu'(u), with o computed again. Grid: as the output kernel's.

    Images of du lie without a gap between them, whatever the distance of its tokens: it may be half of a wider matrix.

    A kernel of its own rather than the head of the query kernel: together they need more registers than there are.
    """
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
    gate_ptr += image_offset(batch, gate_batch_stride, ALIGNED) + first * gate_token_stride + head * WIDTH
    gate = widen(tl.load(gate_ptr + local * gate_token_stride + channel, mask=mask, other=0.0))
    grad_y_ptr += image_offset(batch, grad_y_batch_stride, ALIGNED) + first * grad_y_token_stride + head * WIDTH
    grad_y = widen(tl.load(grad_y_ptr + local * grad_y_token_stride + channel, mask=mask, other=0.0))
    open_part = sigmoid(gate, ACCURATE)
    channels = heads * WIDTH
    place = batch * height * width + first
    grad_out = grad_y * gate * open_part
    target = grad_out_ptr + place * channels + head * WIDTH + local * channels + channel
    tl.store(target, grad_out.to(grad_out_ptr.dtype.element_ty), mask=mask)
    grad_gate = grad_y * out * open_part * (1.0 + gate * (1.0 - open_part))
    target = grad_gate_ptr + place * grad_gate_token_stride + head * WIDTH + local * grad_gate_token_stride + channel
    tl.store(target, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def query_backward_kernel(
    grad_out_ptr, qk_ptr, cos_ptr, sin_ptr, state_ptr, mean_ptr, grad_qk_ptr, grad_state_ptr, grad_mean_ptr,
    grad_out_batch_stride, grad_out_token_stride, qk_batch_stride, qk_token_stride, table_stride,
    width, tokens, heads, tokens_per_split, scale, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
    STRADDLES: tl.constexpr, ACCURATE: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and the parts of dS' = mean of P do^T and of dkm' = mean of e q^, over one run of tokens of one head.

    Grid: heads, splits, batch. ``grad_state`` and ``grad_mean`` are laid out as the parts of the state kernel.
    """
    head = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * tokens_per_split
    count = tl.minimum(tokens_per_split, tokens - first)
    channel = tl.arange(0, PADDED)
    channel_live = channel < WIDTH
    channels = heads * WIDTH
    q_ptr = qk_ptr + image_offset(batch, qk_batch_stride, ALIGNED) + first.to(tl.int64) * qk_token_stride + head * WIDTH
    grad_out_ptr += image_offset(batch, grad_out_batch_stride, ALIGNED) + head * WIDTH
    grad_out_ptr += first.to(tl.int64) * grad_out_token_stride
    grad_q_ptr = grad_qk_ptr + (batch * tokens + first) * (2 * channels) + head * WIDTH
    owner = batch * heads + head
    state = load_square(state_ptr + owner * (WIDTH * WIDTH), WIDTH, PADDED)
    mean = tl.load(mean_ptr + owner * WIDTH + channel, mask=channel_live, other=0.0)

    grad_state = tl.zeros((PADDED, PADDED), tl.float32)
    grad_mean = tl.zeros((BLOCK, PADDED), tl.float32)
    for begin in tl.range(0, count, BLOCK, num_stages=STAGES, disable_licm=True):
        local = begin + tl.arange(0, BLOCK)
        live = local < count
        mask = live[:, None] & channel_live[None, :]
        q = tl.load(q_ptr + local[:, None] * qk_token_stride + channel[None, :], mask=mask, other=0.0)
        # Zero where no token is, which keeps those rows out of both sums below.
        grad_out = tl.load(
            grad_out_ptr + local[:, None] * grad_out_token_stride + channel[None, :], mask=mask, other=0.0
        )
        row, column = run_positions(first, local, width)
        cos, sin = load_rotation(
            cos_ptr, sin_ptr, table_stride, row, column, live, head, heads, WIDTH, PADDED, STRADDLES
        )  # fmt: skip
        mapped = feature_map(widen(q), ACCURATE)
        normaliser = reciprocal(tl.sum(mapped * mean[None, :], axis=1) + eps, ACCURATE)
        query = rotate(mapped, cos, sin, BLOCK, PADDED) * normaliser[:, None]
        reached = multiply(grad_out, tl.trans(state), LOW, PRECISION, q_ptr.dtype.element_ty)
        grad_normaliser = -normaliser * tl.sum(query * reached, axis=1)  # of 1 / z, the denominator
        grad_state += multiply(tl.trans(query), grad_out, LOW, PRECISION, q_ptr.dtype.element_ty) * scale
        grad_mean += grad_normaliser[:, None] * mapped
        grad_mapped = rotate(reached * normaliser[:, None], cos, -sin, BLOCK, PADDED)
        grad_mapped += grad_normaliser[:, None] * mean[None, :]
        grad_q = (grad_mapped * feature_slope(mapped)).to(grad_qk_ptr.dtype.element_ty)
        tl.store(grad_q_ptr + local[:, None] * (2 * channels) + channel[None, :], grad_q, mask=mask)

    part = (batch * tl.num_programs(1) + tl.program_id(1)) * heads + head
    square = grad_state_ptr + part * (WIDTH * WIDTH) + channel[:, None] * WIDTH + channel[None, :]
    tl.store(square, grad_state, mask=channel_live[:, None] & channel_live[None, :])
    tl.store(grad_mean_ptr + part * WIDTH + channel, tl.sum(grad_mean, axis=0) * scale, mask=channel_live)


@triton.jit(do_not_specialize=SIZES)
def key_value_backward_kernel(
    grad_out_ptr, qk_ptr, v_ptr, taps_ptr, cos_ptr, sin_ptr, grad_state_ptr, grad_mean_ptr, grad_qk_ptr, grad_v_ptr,
    grad_out_batch_stride, grad_out_token_stride, qk_batch_stride, qk_token_stride, v_batch_stride, v_token_stride,
    table_stride, height, width, heads,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_LEPE: tl.constexpr,
    ALIGNED: tl.constexpr, STRADDLES: tl.constexpr, ACCURATE: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk = (R^T dS' v + dkm') phi'(k) and dv = dS'^T k~ + transposed lepe of do. Grid: as the output kernel's."""
    head, first_row, first_column, first, batch, owner = tile_place(heads, width, ROWS, COLUMNS)
    local, channel, mask = tile_mask(first_row, first_column, height, width, WIDTH, PADDED, ROWS, COLUMNS)
    channels = heads * WIDTH

    k_ptr = qk_ptr + image_offset(batch, qk_batch_stride, ALIGNED) + first * qk_token_stride + (heads + head) * WIDTH
    k = tl.load(k_ptr + local * qk_token_stride + channel, mask=mask, other=0.0)
    v_ptr += image_offset(batch, v_batch_stride, ALIGNED) + first * v_token_stride + head * WIDTH
    v = tl.load(v_ptr + local * v_token_stride + channel, mask=mask, other=0.0)
    row, column = tile_tokens(ROWS, COLUMNS)
    cos, sin = load_rotation(
        cos_ptr, sin_ptr, table_stride, first_row + row, first_column + column,
        (first_row + row < height) & (first_column + column < width), head, heads, WIDTH, PADDED, STRADDLES,
    )  # fmt: skip
    local_channel = tl.arange(0, PADDED)
    grad_state = load_square(grad_state_ptr + owner * (WIDTH * WIDTH), WIDTH, PADDED)
    grad_mean = tl.load(grad_mean_ptr + owner * WIDTH + local_channel, mask=local_channel < WIDTH, other=0.0)

    mapped = feature_map(widen(k), ACCURATE)
    grad_turned = multiply(v, tl.trans(grad_state), LOW, PRECISION, v_ptr.dtype.element_ty)
    grad_mapped = rotate(grad_turned, cos, -sin, ROWS * COLUMNS, PADDED) + grad_mean[None, :]
    grad_k_ptr = grad_qk_ptr + (batch * height * width + first) * (2 * channels) + (heads + head) * WIDTH
    grad_k = (grad_mapped * feature_slope(mapped)).to(grad_qk_ptr.dtype.element_ty)
    tl.store(grad_k_ptr + local * (2 * channels) + channel, grad_k, mask=mask)

    turned = rotate(mapped, cos, sin, ROWS * COLUMNS, PADDED)
    grad_v = multiply(turned, grad_state, LOW, PRECISION, v_ptr.dtype.element_ty)
    if HAS_LEPE:
        grad_out_ptr += image_offset(batch, grad_out_batch_stride, ALIGNED) + first * grad_out_token_stride
        grad_v += stencil(
            0.0,
            grad_out_ptr + head * WIDTH,
            grad_out_token_stride,
            taps_ptr + head * (9 * WIDTH),
            WIDTH,
            first_row,
            first_column,
            height,
            width,
            local_channel,
            local_channel < WIDTH,
            True,
            ROWS,
            COLUMNS,
            PADDED,
        )
    grad_v_ptr += (batch * height * width + first) * channels + head * WIDTH
    tl.store(grad_v_ptr + local * channels + channel, grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask)
