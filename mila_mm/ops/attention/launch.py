"""Launchers: shapes and strides to grids and kernels. The docstring of the package states what they compute."""

import torch
from torch import Tensor

from mila_mm.ops.attention import backward_kernels, forward_kernels
from mila_mm.ops.rope import rope_tables
from mila_mm.ops.stencil.launch import depthwise_weight_backward
from mila_mm.ops.triton import configs
from mila_mm.ops.triton.kept import start
from mila_mm.ops.triton.tensors import aligned, depthwise_taps, on_device, readable, vector_or


class _Plan:
    """What every kernel of one call shares: sizes, the arithmetic and the rotation tables."""

    def __init__(self, v: Tensor, height: int, width: int, heads: int, rope_base: float, dots: str | None) -> None:
        self.batch, self.tokens, self.channels = v.shape
        self.height, self.width, self.heads = height, width, heads
        self.head_width = self.channels // heads
        self.arithmetic = configs.arithmetic(v.dtype, dots)
        self.cos, self.sin = rope_tables(max(height, width), self.channels, rope_base, v.device)
        self.table_stride = self.cos.stride(0)
        self.tokens_per_split = configs.tokens_per_split(self.tokens)
        self.splits = -(-self.tokens // self.tokens_per_split)
        self.device = v.device
        self.dtype = v.dtype

    def fp32(self, *shape: int) -> Tensor:
        """Uninitialised fp32 memory: every kernel writes all of its result."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def result(self, *shape: int) -> Tensor:
        """Uninitialised memory in the dtype of the activations."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def constants(self, setting: configs.Launch) -> dict[str, object]:
        """Compile-time arguments of a kernel with matrix products."""
        return {
            'WIDTH': self.head_width,
            'PADDED': configs.padded_width(self.head_width),
            'ALIGNED': aligned(self.channels),
            'STRADDLES': self.heads % 2 == 1,
            'ACCURATE': self.arithmetic.accurate,
            'LOW': self.arithmetic.low,
            'PRECISION': setting.precision or self.arithmetic.precision,
        }

    def setting(self, kernel: str) -> configs.Launch:
        """The launch settings of a kernel on this device."""
        straddles, hopper = self.heads % 2 == 1, configs.is_hopper(self.device)
        return configs.launch(kernel, self.arithmetic.name, self.head_width, straddles, hopper)

    def run(self, kernel: str) -> tuple[tuple[int, int, int], dict[str, object]]:
        """Grid and settings of a kernel that walks runs of tokens."""
        setting = self.setting(kernel)
        options = {'BLOCK': setting.rows * setting.columns, 'STAGES': setting.stages, **setting.options()}
        return (self.heads, self.splits, self.batch), {**self.constants(setting), **options}

    def tile(self, kernel: str) -> tuple[tuple[int, int, int], dict[str, object]]:
        """Grid and settings of a kernel with one tile per program."""
        setting = self.setting(kernel)
        across, down = -(-self.width // setting.columns), -(-self.height // setting.rows)
        options = {'ROWS': setting.rows, 'COLUMNS': setting.columns, **setting.options()}
        return (across * self.heads, down, self.batch), {**self.constants(setting), **options}

    def parts(self) -> tuple[Tensor, Tensor]:
        """Room for the sums of the splits: a (d, d) matrix and a (d,) vector for each split and head."""
        d = self.head_width
        return self.fp32(self.batch, self.splits, self.heads, d, d), self.fp32(self.batch, self.splits, self.heads, d)

    def reduce(self, state_parts: Tensor, mean_parts: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the splits: (B, heads, d, d) and (B, heads, d). A single split is its own sum."""
        d = self.head_width
        if self.splits == 1:
            return state_parts.view(self.batch, self.heads, d, d), mean_parts.view(self.batch, self.heads, d)
        state, mean = self.fp32(self.batch, self.heads, d, d), self.fp32(self.batch, self.heads, d)
        chunks = -(-d * d // configs.REDUCE_CHUNK) + 1
        start(
            forward_kernels.reduce_kernel,
            (self.batch * self.heads * chunks,),
            state_parts,
            mean_parts,
            state,
            mean,
            self.heads,
            self.splits,
            WIDTH=d,
            CHUNK=configs.REDUCE_CHUNK,
            ROWS=configs.REDUCE_ROWS,
            num_warps=configs.REDUCE_WARPS,
        )
        return state, mean


def attention_forward(
    qk: Tensor,
    v: Tensor,
    lepe_weight: Tensor | None,
    lepe_bias: Tensor | None,
    gate: Tensor | None,
    height: int,
    width: int,
    num_heads: int,
    eps: float,
    rope_base: float,
    *,
    dots: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the forward kernels.

    Args:
        qk: (B, N, 2C), q first. v: (B, N, C). gate: (B, N, C) before its SiLU, or None; all of one dtype.
        lepe_weight: (C, 1, 3, 3) and lepe_bias (C,) of any float dtype, or both None.
        height, width: The map, with N = height * width. num_heads: Heads of C / num_heads channels.
        eps: Added to the normaliser. rope_base: Base of the rotation frequencies.
        dots: How to take matrix products, see :func:`mila_mm.ops.triton.configs.arithmetic`.

    Returns:
        y (B, N, C) contiguous in v's dtype; the state (B, heads, d, d) and the key mean (B, heads, d), fp32.
    """
    plan = _Plan(v, height, width, num_heads, rope_base, dots)
    y = plan.result(plan.batch, plan.tokens, plan.channels)
    d = plan.head_width
    if plan.batch == 0 or plan.tokens == 0:
        empty = (plan.batch, num_heads, d)
        return y, torch.zeros((*empty, d), device=v.device), torch.zeros(empty, device=v.device)
    qk, v = readable(qk, width), readable(v, width)
    gate = None if gate is None else readable(gate, width)
    with on_device(v):
        grid, options = plan.run('state')
        parts = plan.parts()
        start(
            forward_kernels.state_kernel, grid,
            qk, v, plan.cos, plan.sin, *parts,
            qk.stride(0), qk.stride(1), v.stride(0), v.stride(1), plan.table_stride,
            width, plan.tokens, num_heads, plan.tokens_per_split, 1.0 / plan.tokens,
            **options,
        )  # fmt: skip
        state, mean = plan.reduce(*parts)

        grid, options = plan.tile('output')
        gated = v if gate is None else gate
        start(
            forward_kernels.output_kernel, grid,
            qk, v, depthwise_taps(lepe_weight, v, d), vector_or(lepe_bias, v), gated,
            plan.cos, plan.sin, state, mean, y,
            qk.stride(0), qk.stride(1), v.stride(0), v.stride(1), gated.stride(0), gated.stride(1), plan.table_stride,
            height, width, num_heads, eps,
            HAS_LEPE=lepe_weight is not None, HAS_GATE=gate is not None, **options,
        )  # fmt: skip
    return y, state, mean


def attention_backward(
    grad_y: Tensor,
    qk: Tensor,
    v: Tensor,
    lepe_weight: Tensor | None,
    lepe_bias: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
    key_mean: Tensor,
    height: int,
    width: int,
    num_heads: int,
    eps: float,
    rope_base: float,
    *,
    dots: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Run the backward kernels.

    Args:
        grad_y: (B, N, C), gradient of the output; any strides. state, key_mean: As the forward pass returned them.
        qk, v, lepe_weight, lepe_bias, gate, height, width, num_heads, eps, rope_base, dots: As in the forward pass.

    Returns:
        Gradients of qk (B, N, 2C), v, lepe_weight, lepe_bias and gate, contiguous, each in the dtype of its input and
        None where that was None.
    """
    plan = _Plan(v, height, width, num_heads, rope_base, dots)
    grad_qk = plan.result(plan.batch, plan.tokens, 2 * plan.channels)
    grad_v = plan.result(plan.batch, plan.tokens, plan.channels)
    if plan.batch == 0 or plan.tokens == 0:
        grad_weight, grad_bias, grad_gate = (
            None if x is None else torch.zeros_like(x) for x in (lepe_weight, lepe_bias, gate)
        )
        return grad_qk, grad_v, grad_weight, grad_bias, grad_gate
    qk, v, grad_y = readable(qk, width), readable(v, width), readable(grad_y, width)
    state, key_mean = state.contiguous(), key_mean.contiguous()
    taps, grad_weight, grad_bias, grad_gate = v, None, None, None
    with on_device(v):
        if lepe_weight is not None:
            taps = depthwise_taps(lepe_weight, v, plan.head_width)
        grad_out = grad_y
        if gate is not None:
            grad_out, grad_gate = _gate_backward(
                plan, grad_y, qk, v, taps, lepe_bias, readable(gate, width), state, key_mean, eps
            )
        _query_key_value_backward(plan, grad_out, qk, v, taps, state, key_mean, eps, lepe_weight, grad_qk, grad_v)
        if lepe_weight is not None and lepe_bias is not None:
            grad_weight, grad_bias = depthwise_weight_backward(grad_out, v, lepe_weight, lepe_bias, height, width)
    return grad_qk, grad_v, grad_weight, grad_bias, grad_gate


def _gate_backward(
    plan: _Plan,
    grad_y: Tensor,
    qk: Tensor,
    v: Tensor,
    taps: Tensor,
    lepe_bias: Tensor | None,
    gate: Tensor,
    state: Tensor,
    key_mean: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of the output before the gate and of the gate, both (B, N, C) contiguous."""
    grad_out = plan.result(plan.batch, plan.tokens, plan.channels)
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grid, options = plan.tile('gate_backward')
    start(
        backward_kernels.gate_backward_kernel, grid,
        grad_y, qk, v, taps, vector_or(lepe_bias, v), gate, plan.cos, plan.sin, state, key_mean,
        grad_out, grad_gate,
        grad_y.stride(0), grad_y.stride(1), qk.stride(0), qk.stride(1), v.stride(0), v.stride(1),
        gate.stride(0), gate.stride(1), plan.table_stride, plan.height, plan.width, plan.heads, eps,
        HAS_LEPE=lepe_bias is not None, **options,
    )  # fmt: skip
    return grad_out, grad_gate


def _query_key_value_backward(
    plan: _Plan,
    grad_out: Tensor,
    qk: Tensor,
    v: Tensor,
    taps: Tensor,
    state: Tensor,
    key_mean: Tensor,
    eps: float,
    lepe_weight: Tensor | None,
    grad_qk: Tensor,
    grad_v: Tensor,
) -> None:
    """Fill grad_qk and grad_v: the sweep over queries, the sum of its parts, the sweep over keys and values."""
    grid, options = plan.run('query_backward')
    parts = plan.parts()
    start(
        backward_kernels.query_backward_kernel, grid,
        grad_out, qk, plan.cos, plan.sin, state, key_mean, grad_qk, *parts,
        grad_out.stride(0), grad_out.stride(1), qk.stride(0), qk.stride(1), plan.table_stride,
        plan.width, plan.tokens, plan.heads, plan.tokens_per_split, 1.0 / plan.tokens, eps,
        **options,
    )  # fmt: skip
    grad_state, grad_mean = plan.reduce(*parts)
    grid, options = plan.tile('key_value_backward')
    start(
        backward_kernels.key_value_backward_kernel, grid,
        grad_out, qk, v, taps, plan.cos, plan.sin, grad_state, grad_mean, grad_qk, grad_v,
        grad_out.stride(0), grad_out.stride(1), qk.stride(0), qk.stride(1), v.stride(0), v.stride(1),
        plan.table_stride, plan.height, plan.width, plan.heads,
        HAS_LEPE=lepe_weight is not None, **options,
    )  # fmt: skip
