"""Grids, constants and numbers of the attention's kernels for one shape."""

from __future__ import annotations

import torch
from torch import Tensor

from mila_mm.ops.attention import backward_kernels, forward_kernels
from mila_mm.ops.rope import rope_tables
from mila_mm.ops.triton import configs
from mila_mm.ops.triton.kept import Launch
from mila_mm.ops.triton.tensors import aligned

Strides = tuple[int, ...]
"""Of images and tokens, of one tensor after the other."""


class Geometry:
    """What every kernel of one call shares: sizes, the arithmetic and the rotation tables.

    Args:
        shape: (B, N, C) of v.
        height, width: The map, N = height * width.
        heads: Of C / heads channels.
        rope_base: Base of the rotation frequencies.
        dtype: Of the activations.
        device: Where they are.
        dots: How to take matrix products, see :func:`mila_mm.ops.triton.configs.arithmetic`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        height: int,
        width: int,
        heads: int,
        rope_base: float,
        dtype: torch.dtype,
        device: torch.device,
        dots: str | None = None,
    ) -> None:
        self.batch, self.tokens, self.channels = shape
        self.height, self.width, self.heads = height, width, heads
        self.head_width = self.channels // heads
        self.arithmetic = configs.arithmetic(dtype, dots)
        self.cos, self.sin = rope_tables(max(height, width), self.channels, rope_base, device)
        self.table_stride = self.cos.stride(0)
        self.tokens_per_split = configs.tokens_per_split(self.tokens)
        self.splits = -(-self.tokens // self.tokens_per_split)
        self.device = device

    def _constants(self, setting: configs.Launch) -> dict[str, object]:
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

    def _setting(self, kernel: str) -> configs.Launch:
        """The launch settings of a kernel on this device."""
        straddles, hopper = self.heads % 2 == 1, configs.is_hopper(self.device)
        return configs.launch(kernel, self.arithmetic.name, self.head_width, straddles, hopper)

    def _run(self, kernel: str) -> tuple[tuple[int, int, int], dict[str, object]]:
        """Grid and settings of a kernel that walks runs of tokens."""
        setting = self._setting(kernel)
        options = {'BLOCK': setting.rows * setting.columns, 'STAGES': setting.stages, **setting.options()}
        return (self.heads, self.splits, self.batch), {**self._constants(setting), **options}

    def _tile(self, kernel: str) -> tuple[tuple[int, int, int], dict[str, object]]:
        """Grid and settings of a kernel with one tile per program."""
        setting = self._setting(kernel)
        across, down = -(-self.width // setting.columns), -(-self.height // setting.rows)
        options = {'ROWS': setting.rows, 'COLUMNS': setting.columns, **setting.options()}
        return (across * self.heads, down, self.batch), {**self._constants(setting), **options}

    def state_shapes(self, splits: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of a (d, d) matrix and a (d,) vector for each head, or for each split and head."""
        d, parts = self.head_width, () if splits == 1 else (splits,)
        return (self.batch, *parts, self.heads, d, d), (self.batch, *parts, self.heads, d)

    def state(self, strides: Strides) -> Launch:
        """For ``strides`` of qk, v; takes qk, v, cos, sin, and the state's and the key mean's parts."""
        grid, options = self._run('state')
        numbers = self.table_stride, self.width, self.tokens, self.heads, self.tokens_per_split, 1.0 / self.tokens
        return Launch(forward_kernels, 'state_kernel', grid, (*strides, *numbers), **options)

    def reduce(self) -> Launch:
        """Takes the parts of a state and a mean, and both sums."""
        d = self.head_width
        chunks = -(-d * d // configs.REDUCE_CHUNK) + 1
        return Launch(
            forward_kernels, 'reduce_kernel', (self.batch * self.heads * chunks,), (self.heads, self.splits),
            WIDTH=d, CHUNK=configs.REDUCE_CHUNK, ROWS=configs.REDUCE_ROWS, num_warps=configs.REDUCE_WARPS,
        )  # fmt: skip

    def output(self, strides: Strides, eps: float, lepe: bool = True, gate: bool = True) -> Launch:
        """For ``strides`` of qk, v, gate; takes qk, v, taps, bias, gate, cos, sin, state, key mean, y."""
        grid, options = self._tile('output')
        numbers = self.table_stride, self.height, self.width, self.heads, eps
        return Launch(
            forward_kernels, 'output_kernel', grid, (*strides, *numbers), HAS_LEPE=lepe, HAS_GATE=gate, **options
        )

    def gate_backward(self, strides: Strides, eps: float, lepe: bool = True) -> Launch:
        """For ``strides`` of dy, qk, v, gate, and between tokens of the gate's gradient.

        Takes dy, qk, v, taps, bias, gate, cos, sin, state, key mean, do and the gate's gradient.
        """
        grid, options = self._tile('gate_backward')
        numbers = self.table_stride, self.height, self.width, self.heads, eps
        return Launch(backward_kernels, 'gate_backward_kernel', grid, (*strides, *numbers), HAS_LEPE=lepe, **options)

    def query_backward(self, strides: Strides, eps: float) -> Launch:
        """For ``strides`` of do, qk; takes do, qk, cos, sin, state, key mean, dqk and the parts of both gradients."""
        grid, options = self._run('query_backward')
        numbers = self.width, self.tokens, self.heads, self.tokens_per_split, 1.0 / self.tokens, eps
        return Launch(
            backward_kernels, 'query_backward_kernel', grid, (*strides, self.table_stride, *numbers), **options
        )

    def key_value_backward(self, strides: Strides, lepe: bool = True) -> Launch:
        """For ``strides`` of do, qk, v; takes do, qk, v, taps, cos, sin, dS, dkm, dqk, dv."""
        grid, options = self._tile('key_value_backward')
        numbers = self.table_stride, self.height, self.width, self.heads
        return Launch(
            backward_kernels, 'key_value_backward_kernel', grid, (*strides, *numbers), HAS_LEPE=lepe, **options
        )


def strides_of(*tensors: Tensor) -> Strides:
    """Of images and tokens (B, N, C)."""
    return tuple(stride for x in tensors for stride in x.stride()[:2])
