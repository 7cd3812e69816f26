"""Kernels of the backward pass. Nothing but q, k, v, the gate, S and the key mean comes from the forward pass."""

import triton
import triton.language as tl

from .common import (
    feature_map,
    feature_slope,
    image_offset,
    load_rotation,
    load_square,
    multiply,
    rotate,
    sigmoid,
    stencil,
    tile_tokens,
)
from .forward_kernels import SIZES, attend


@triton.jit(do_not_specialize=SIZES)
def gate_backward_kernel(
    grad_y_ptr, qk_ptr, v_ptr, taps_ptr, bias_ptr, gate_ptr, cos_ptr, sin_ptr, state_ptr, mean_ptr,
    grad_out_ptr, grad_gate_ptr,
    grad_y_batch_stride, grad_y_token_stride, qk_batch_stride, qk_token_stride, v_batch_stride, v_token_stride,
    gate_batch_stride, gate_token_stride, table_stride, height, width, heads, tiles, tiles_across, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_LEPE: tl.constexpr,
    ALIGNED: tl.constexpr, STRADDLES: tl.constexpr, ACCURATE: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):
    """do = dy * silu(u) and du = dy * o * silu'(u), with o computed again. Grid: batch * tiles * heads.

    A kernel of its own rather than the head of the query kernel: together they need more registers than there are.
    """
    program = tl.program_id(0)
    head = program % heads
    tile = program // heads % tiles
    batch = (program // heads // tiles).to(tl.int64)
    first_row, first_column, row, column, live = tile_tokens(tile, tiles_across, height, width, ROWS, COLUMNS)
    first_token = first_row * width + first_column
    first = first_token.to(tl.int64)
    local_channel = tl.arange(0, PADDED)
    channel = head * WIDTH + local_channel
    channel_live = local_channel < WIDTH
    owner = batch * heads + head

    out = attend(
        qk_ptr + image_offset(batch, qk_batch_stride, ALIGNED) + first * qk_token_stride,
        v_ptr + image_offset(batch, v_batch_stride, ALIGNED) + first * v_token_stride,
        taps_ptr, bias_ptr, cos_ptr, sin_ptr, state_ptr + owner * (WIDTH * WIDTH), mean_ptr + owner * WIDTH,
        qk_token_stride, v_token_stride, table_stride, height, width, heads, eps, head,
        first_token, row, column, live, channel, channel_live,
        WIDTH, PADDED, ROWS * COLUMNS, HAS_LEPE, STRADDLES, ACCURATE, LOW, PRECISION,
    )
    mask = live[:, None] & channel_live[None, :]
    local = (row * width + column - first_token)[:, None]
    gate_ptr += image_offset(batch, gate_batch_stride, ALIGNED) + first * gate_token_stride
    gate = tl.load(gate_ptr + local * gate_token_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    grad_y_ptr += image_offset(batch, grad_y_batch_stride, ALIGNED) + first * grad_y_token_stride
    grad_y = tl.load(grad_y_ptr + local * grad_y_token_stride + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    open_part = sigmoid(gate, ACCURATE)
    channels = heads * WIDTH
    result = (batch * height * width + first) * channels + local * channels + channel[None, :]
    grad_out = grad_y * gate * open_part
    tl.store(grad_out_ptr + result, grad_out.to(grad_out_ptr.dtype.element_ty), mask=mask)
    grad_gate = grad_y * out * open_part * (1.0 + gate * (1.0 - open_part))
    tl.store(grad_gate_ptr + result, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def query_backward_kernel(
    grad_out_ptr, qk_ptr, cos_ptr, sin_ptr, state_ptr, mean_ptr, grad_qk_ptr, grad_state_ptr, grad_mean_ptr,
    grad_out_batch_stride, grad_out_token_stride, qk_batch_stride, qk_token_stride, table_stride,
    width, tokens, heads, splits, tokens_per_split, scale, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
    STRADDLES: tl.constexpr, ACCURATE: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):
    """dq, and the parts of dS' = mean of P do^T and of dkm' = mean of e q^, over one run of tokens of one head.

    Grid: batch * splits * heads. ``grad_state`` and ``grad_mean`` are laid out as the parts of the state kernel.
    """
    program = tl.program_id(0)
    head = program % heads
    split = program // heads % splits
    batch = (program // heads // splits).to(tl.int64)
    first = split * tokens_per_split
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
        token = first + local
        cos, sin = load_rotation(
            cos_ptr, sin_ptr, table_stride, token // width, token % width, live, head, heads, WIDTH, PADDED, STRADDLES
        )
        mapped = feature_map(q.to(tl.float32), ACCURATE)
        normaliser = 1.0 / (tl.sum(mapped * mean[None, :], axis=1) + eps)
        query = rotate(mapped, cos, sin, BLOCK, PADDED) * normaliser[:, None]
        reached = multiply(grad_out, tl.trans(state), LOW, PRECISION, q_ptr.dtype.element_ty)
        grad_normaliser = -normaliser * tl.sum(query * reached, axis=1)  # of 1 / z, the denominator
        grad_state += multiply(tl.trans(query), grad_out, LOW, PRECISION, q_ptr.dtype.element_ty) * scale
        grad_mean += grad_normaliser[:, None] * mapped
        grad_mapped = rotate(reached * normaliser[:, None], cos, -sin, BLOCK, PADDED)
        grad_mapped += grad_normaliser[:, None] * mean[None, :]
        grad_q = (grad_mapped * feature_slope(mapped)).to(grad_qk_ptr.dtype.element_ty)
        tl.store(grad_q_ptr + local[:, None] * (2 * channels) + channel[None, :], grad_q, mask=mask)

    part = program.to(tl.int64)
    square = grad_state_ptr + part * (WIDTH * WIDTH) + channel[:, None] * WIDTH + channel[None, :]
    tl.store(square, grad_state, mask=channel_live[:, None] & channel_live[None, :])
    tl.store(grad_mean_ptr + part * WIDTH + channel, tl.sum(grad_mean, axis=0) * scale, mask=channel_live)


@triton.jit(do_not_specialize=SIZES)
def key_value_backward_kernel(
    grad_out_ptr, qk_ptr, v_ptr, taps_ptr, cos_ptr, sin_ptr, grad_state_ptr, grad_mean_ptr, grad_qk_ptr, grad_v_ptr,
    grad_out_batch_stride, grad_out_token_stride, qk_batch_stride, qk_token_stride, v_batch_stride, v_token_stride,
    table_stride, height, width, heads, tiles, tiles_across,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HAS_LEPE: tl.constexpr,
    ALIGNED: tl.constexpr, STRADDLES: tl.constexpr, ACCURATE: tl.constexpr, LOW: tl.constexpr, PRECISION: tl.constexpr,
):
    """dk = (R^T dS' v + dkm') phi'(k) and dv = dS'^T k~ + transposed lepe of do. Grid: batch * tiles * heads."""
    program = tl.program_id(0)
    head = program % heads
    tile = program // heads % tiles
    batch = (program // heads // tiles).to(tl.int64)
    first_row, first_column, row, column, live = tile_tokens(tile, tiles_across, height, width, ROWS, COLUMNS)
    first_token = first_row * width + first_column
    first = first_token.to(tl.int64)
    local_channel = tl.arange(0, PADDED)
    channel = head * WIDTH + local_channel
    channel_live = local_channel < WIDTH
    channels = heads * WIDTH
    owner = batch * heads + head
    mask = live[:, None] & channel_live[None, :]
    local = (row * width + column - first_token)[:, None]

    qk_ptr += image_offset(batch, qk_batch_stride, ALIGNED) + first * qk_token_stride + channels
    k = tl.load(qk_ptr + local * qk_token_stride + channel[None, :], mask=mask, other=0.0)
    v_ptr += image_offset(batch, v_batch_stride, ALIGNED) + first * v_token_stride
    v = tl.load(v_ptr + local * v_token_stride + channel[None, :], mask=mask, other=0.0)
    cos, sin = load_rotation(
        cos_ptr, sin_ptr, table_stride, row, column, live, head, heads, WIDTH, PADDED, STRADDLES
    )
    grad_state = load_square(grad_state_ptr + owner * (WIDTH * WIDTH), WIDTH, PADDED)
    grad_mean = tl.load(grad_mean_ptr + owner * WIDTH + local_channel, mask=channel_live, other=0.0)

    mapped = feature_map(k.to(tl.float32), ACCURATE)
    grad_turned = multiply(v, tl.trans(grad_state), LOW, PRECISION, v_ptr.dtype.element_ty)
    grad_mapped = rotate(grad_turned, cos, -sin, ROWS * COLUMNS, PADDED) + grad_mean[None, :]
    grad_k_ptr = grad_qk_ptr + (batch * height * width + first) * (2 * channels) + channels
    grad_k = (grad_mapped * feature_slope(mapped)).to(grad_qk_ptr.dtype.element_ty)
    tl.store(grad_k_ptr + local * (2 * channels) + channel[None, :], grad_k, mask=mask)

    turned = rotate(mapped, cos, sin, ROWS * COLUMNS, PADDED)
    grad_v = multiply(turned, grad_state, LOW, PRECISION, v_ptr.dtype.element_ty)
    if HAS_LEPE:
        grad_v += stencil(
            grad_out_ptr + image_offset(batch, grad_out_batch_stride, ALIGNED) + first * grad_out_token_stride,
            taps_ptr, grad_out_token_stride, channels, row, column, first_token, height, width, channel, channel_live,
            True, ROWS * COLUMNS, PADDED,
        )
    grad_v_ptr += (batch * height * width + first) * channels
    tl.store(grad_v_ptr + local * channels + channel[None, :], grad_v.to(grad_v_ptr.dtype.element_ty), mask=mask)
