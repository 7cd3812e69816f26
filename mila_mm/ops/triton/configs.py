"""Launch settings: a small fixed table, so that no size of image is ever tuned for and results do not depend on tuning.

The entries come from the register counts that ptxas reports (``benchmarks/compile_matrix.py`` prints them all): the
largest tile of tokens at which no kernel spills on sm_80, sm_90 and sm_100.
"""

import os
from dataclasses import dataclass

import torch

HEAD_WIDTHS = (16, 24, 32, 48, 64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Arithmetic:
    """How matrix products are taken and how exact the exponential is.

    Attributes:
        low: Round the operands to the 16-bit dtype of the inputs (tensor cores at full rate).
        precision: Triton's ``input_precision`` for fp32 operands: 'tf32', 'tf32x3' or 'ieee'.
        accurate: Correct the exponential's argument rounding; worth it only where the result is kept in fp32.
    """

    low: bool
    precision: str
    accurate: bool

    @property
    def name(self) -> str:
        """Key of the tables below."""
        return 'low' if self.low else self.precision


@dataclass(frozen=True)
class Launch:
    """Settings of one kernel.

    Attributes:
        rows, columns: Tokens per step: a tile of the map, or a run of ``rows * columns``.
        warps: Warps per program.
        stages: Depth of the software pipeline of its loop; 1 for none.
        registers: Limit per thread where ptxas by itself would take too many for more programs at a time, or spill to
            save a few. None for no limit.
        precision: Takes the place of :attr:`Arithmetic.precision` in this kernel. None for no change.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 1
    registers: int | None = None
    precision: str | None = None

    def options(self) -> dict[str, int]:
        """The launch options that go with the kernel's own arguments."""
        limit = {} if self.registers is None else {'maxnreg': self.registers}
        return {'num_warps': self.warps, **limit}


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on tensors of any device."""
    return os.environ.get('TRITON_INTERPRET', '0') not in {'', '0'}


def tf32_allowed() -> bool:
    """Whether the user let PyTorch's own fp32 matrix products use TF32, by either of its interfaces."""
    backend = torch.backends.cuda.matmul
    # The old attributes raise once the new one has been set, so the new one is asked wherever it exists.
    if hasattr(backend, 'fp32_precision'):
        return backend.fp32_precision == 'tf32'
    return bool(backend.allow_tf32)


def arithmetic(dtype: torch.dtype, dots: str | None = None) -> Arithmetic:
    """Choose the arithmetic for inputs of ``dtype``.

    Args:
        dtype: float32, float16 or bfloat16.
        dots: Overrides the choice: 'low', 'tf32', 'tf32x3' or 'ieee'.

    Returns:
        Products of three TF32 terms for fp32 (one term where the user allowed TF32); TF32 for fp16, whose range would
        lose small keys as operands; bf16 operands for bf16, except in the interpreter, which multiplies their bits.
    """
    if dots is None:
        if dtype == torch.float32:
            dots = 'tf32' if tf32_allowed() else 'tf32x3'
        else:
            dots = 'low' if dtype == torch.bfloat16 and not interpreted() else 'tf32'
    low = dots == 'low'
    return Arithmetic(low, 'tf32' if low else dots, dtype == torch.float32)


def padded_width(head_width: int) -> int:
    """The head width rounded up to a power of two."""
    return 1 << (head_width - 1).bit_length()


def tokens_per_split(tokens: int) -> int:
    """Tokens that one program of a summing kernel takes: a function of the image size alone.

    Neither the batch nor the device enters, so an image's result is bitwise the same in any batch on any GPU. Longer
    runs for larger images keep the traffic of the partial sums at about a twentieth of that of the inputs.
    """
    run = 256
    while run < 1024 and tokens > 256 * run:
        run *= 2
    return run


TILES_PER_LEPE_SPLIT = 8
REDUCE_CHUNK, REDUCE_ROWS, REDUCE_WARPS = 128, 32, 4
LEPE_CHANNELS = 32

# kernel -> products -> head width, or else padded head width -> Launch. Eight elements per thread and tensor, one
# 128-bit access in 16 bits, wherever registers decide how many programs run at a time.
_STATE = {16: Launch(4, 16, 4, 2), 32: Launch(4, 16, 4, 2), 64: Launch(4, 8, 8)}
_TILE = {16: Launch(8, 8, 4), 24: Launch(8, 8, 8, 1, 128), 32: Launch(8, 8, 8), 64: Launch(4, 8, 8)}
_KEY_VALUE = {16: Launch(8, 8, 4), 32: Launch(8, 8, 8), 64: Launch(4, 4, 8)}
_QUERY = {16: Launch(4, 8, 4, 2), 32: Launch(4, 8, 4, 2), 64: Launch(2, 8, 8, 2)}
_EXACT_STATE = {16: Launch(4, 8, 4, 1, 168), 32: Launch(4, 8, 4, 1, 168), 64: Launch(4, 8, 8)}
_EXACT_TILE = {16: Launch(8, 8, 4), 32: Launch(8, 8, 8), 64: Launch(2, 8, 4, registers=248)}
_EXACT_KEY_VALUE = {16: Launch(8, 8, 4), 32: Launch(8, 8, 8), 64: Launch(4, 4, 8)}
# Three TF32 terms of a 64 x 64 operand do not fit the registers of sm_80; plain fp32 products do, and are as exact.
_EXACT_QUERY = {16: Launch(4, 8, 4), 32: Launch(2, 8, 4), 64: Launch(2, 8, 8, 1, 128, 'ieee')}


def _rows(fast: dict[int, Launch], exact: dict[int, Launch]) -> dict[str, dict[int, Launch]]:
    return {'low': fast, 'tf32': fast, 'tf32x3': exact, 'ieee': exact}


_TABLE: dict[str, dict[str, dict[int, Launch]]] = {
    # Triton 3.6 fails on sm_100 where a single TF32 product has a transposed operand 64 wide; three terms compile.
    'state': {**_rows(_STATE, _EXACT_STATE), 'tf32': {**_STATE, 64: Launch(4, 8, 8, precision='tf32x3')}},
    'output': _rows(_TILE, _EXACT_TILE),
    'gate_backward': _rows(_TILE, _EXACT_TILE),
    'query_backward': _rows(_QUERY, _EXACT_QUERY),
    # On sm_80 ptxas spills to stay at 128 registers, with 8 warps and an odd number of 24-wide heads. In TF32 it does
    # so with 4 warps, to stay at 96.
    'key_value_backward': {**_rows(_KEY_VALUE, _EXACT_KEY_VALUE), 'low': {**_KEY_VALUE, 24: Launch(8, 8, 4)}},
}


def lepe_launch(dtype: torch.dtype, channels: int) -> Launch:
    """The settings of the kernel that sums the LePE gradients; its nine sums stay in registers."""
    # In fp32, and where tokens are not aligned to 16 elements, addresses take more registers.
    roomy = dtype == torch.float32 or channels % 16 != 0
    return Launch(8, 8, 8, registers=None if roomy else 128)


def launch(kernel: str, products: str, head_width: int) -> Launch:
    """The settings of one kernel.

    Args:
        kernel: 'state', 'output', 'gate_backward', 'query_backward' or 'key_value_backward'.
        products: :attr:`Arithmetic.name`.
        head_width: Channels per head, one of ``HEAD_WIDTHS``.
    """
    by_width = _TABLE[kernel][products]
    return by_width.get(head_width) or by_width[padded_width(head_width)]


MAX_STENCIL_CHANNELS = 1024
"""Widest tokens of the block's stencils: a LayerNorm holds all channels of a token in one program."""
STENCIL_CHANNELS = 32
"""Channels of one program of the stencils that need no sum over channels."""
TILES_PER_STENCIL_SPLIT = 4
_ROW_ELEMENTS = 4096


def norm_launch(channels: int) -> Launch:
    """The settings of the kernels that hold all channels of a token: 16 elements a thread, at most 64 tokens."""
    tokens = max(1, min(64, _ROW_ELEMENTS // padded_width(channels)))
    columns = 1 << (tokens.bit_length() // 2)
    return Launch(tokens // columns, columns, 8, registers=128)


def norm_tokens_per_split(channels: int) -> int:
    """Tokens that one program of the norm's backward takes: as many as four steps hold, whatever the map."""
    setting = norm_launch(channels)
    return 4 * setting.rows * setting.columns


STENCIL = Launch(8, 8, 8)
# Ten sums and, at a time, up to nine weights and neighbours: four elements a thread.
STENCIL_BACKWARD = Launch(8, 8, 16)
