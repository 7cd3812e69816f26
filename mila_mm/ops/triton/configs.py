"""Launch settings: a small fixed table, so that no size of image is ever tuned for and results do not depend on tuning.

The entries come from the register counts that ptxas reports (``benchmarks/compile_matrix.py`` prints them all): the
largest tile of tokens at which no kernel spills on sm_80, sm_90 and sm_100.
"""

import functools
import os
from dataclasses import dataclass, replace

import torch

HEAD_WIDTHS = (16, 24, 32, 48, 64)
MAX_GRID = 65535
"""Programs on CUDA's second and third axes of a grid: splits or rows of tiles, and images."""
MAX_SIDE = 65535
"""Tokens on a side of a map: rows of tiles fit the grid, and rows and columns of tokens are exact in fp32."""
MAX_ROW = 2**17
"""Channels of the rows of a column sum: the offsets in one program's run stay below 2**31."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class KernelFailed(RuntimeError):
    """A Triton kernel that the compiler or the driver does not take here; nothing of it has run."""


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


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device has compute capability 9.0."""
    return device.type == 'cuda' and torch.cuda.get_device_capability(device) == (9, 0)


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


def offsets_fit(width: int, token_stride: int) -> bool:
    """Whether offsets in a tile, of at most ten rows with those around it, stay below 2**31."""
    return 10 * width * token_stride < 2**31


def tokens_per_split(tokens: int) -> int:
    """Tokens that one program of a summing kernel takes: a function of the image size alone.

    The batch does not enter, so an image's result is bitwise the same in any batch. Longer runs for larger images keep
    the traffic of the partial sums at about a twentieth of that of the inputs.
    """
    run = 256
    while (run < 1024 and tokens > 256 * run) or tokens > MAX_GRID * run:
        run *= 2
    return run


REDUCE_CHUNK, REDUCE_ROWS, REDUCE_WARPS = 32, 128, 4
LEPE_CHANNELS = 32

# kernel -> head width, or else padded head width -> Launch. Sixteen elements per thread and tensor: what a thread does
# only once, addresses, weights and the head's matrix, then counts little beside what it does for each element.
_STATE = {16: Launch(4, 16, 4, 2), 32: Launch(4, 8, 4), 64: Launch(4, 8, 8)}
_TILE = {16: Launch(8, 8, 2), 32: Launch(4, 8, 2), 64: Launch(4, 8, 4)}
_QUERY = {16: Launch(8, 8, 2, 2), 24: Launch(4, 8, 2), 32: Launch(4, 8, 2, 2), 64: Launch(4, 8, 4)}
_EXACT_STATE = {16: Launch(4, 8, 2), 32: Launch(4, 8, 4, 1, 168), 64: Launch(4, 8, 8)}
_EXACT_TILE = {16: Launch(8, 8, 2), 32: Launch(4, 8, 2), 64: Launch(2, 8, 4, registers=248)}
_EXACT_KEY_VALUE = {16: Launch(8, 8, 2), 32: Launch(4, 8, 2), 64: Launch(4, 4, 8)}
# Three TF32 terms of a square operand, or one of 64 x 64 on sm_80, do not fit the registers beside the sum that this
# kernel keeps; plain fp32 products do, and are as exact.
_PLAIN_QUERY = Launch(2, 8, 8, 1, 128, 'ieee')
_EXACT_QUERY = {
    16: Launch(4, 8, 2),
    24: Launch(4, 8, 2, precision='ieee'),
    32: Launch(4, 8, 4, precision='ieee'),
    64: _PLAIN_QUERY,
}
_FAST = {
    'state': _STATE,
    'output': _TILE,
    'gate_backward': _TILE,
    'query_backward': _QUERY,
    'key_value_backward': _TILE,
}
_EXACT = {
    'state': _EXACT_STATE,
    'output': _EXACT_TILE,
    'gate_backward': {**_EXACT_TILE, 16: Launch(4, 8, 2)},
    'query_backward': _EXACT_QUERY,
    'key_value_backward': _EXACT_KEY_VALUE,
}
# On sm_90 a warp group multiplies 64 rows at once. sm_100 could too, but through a memory of its own, which for
# products as small as these costs more than it saves.
# Of 132 settings tried on an H200 in bf16, those of `state` (above too) and `query_backward` took 0.88 and 0.86 of the
# time of what was here before.
_HOPPER: dict[str, dict[int, Launch]] = {
    'state': {32: Launch(4, 8, 4)},
    'output': {32: Launch(4, 16, 4), 64: Launch(8, 8, 8)},
    'gate_backward': {32: Launch(8, 8, 4), 64: Launch(8, 8, 8)},
    'query_backward': {32: Launch(4, 8, 2, 3), 64: Launch(2, 8, 4)},
    'key_value_backward': {32: Launch(8, 8, 4), 64: Launch(8, 8, 8)},
}
_TF32_TILE = {**_TILE, 64: Launch(4, 8, 8)}
_TABLE: dict[str, dict[str, dict[int, Launch]]] = {
    'low': _FAST,
    'tf32': {
        # Triton 3.6 fails on sm_100 where a single TF32 product has a transposed operand 64 wide; three terms compile.
        'state': {**_STATE, 32: Launch(4, 16, 4), 64: Launch(4, 8, 8, precision='tf32x3')},
        'output': _TF32_TILE,
        'gate_backward': {**_TF32_TILE, 24: Launch(4, 8, 4)},
        'query_backward': {**_QUERY, 24: Launch(4, 8, 4, 2), 64: _PLAIN_QUERY},
        'key_value_backward': {**_TILE, 64: Launch(4, 4, 4)},
    },
    'tf32x3': _EXACT,
    'ieee': _EXACT,
}


@functools.cache
def launch(kernel: str, products: str, head_width: int, straddles: bool, hopper: bool) -> Launch:
    """The settings of one kernel.

    Args:
        kernel: 'state', 'output', 'gate_backward', 'query_backward' or 'key_value_backward'.
        products: :attr:`Arithmetic.name`.
        head_width: Channels per head, one of ``HEAD_WIDTHS``.
        straddles: Whether the number of heads is odd, so that one turns by rows and by columns.
        hopper: Whether the device has compute capability 9.0.
    """
    by_width = _TABLE[products][kernel]
    if hopper and _TABLE[products] is not _EXACT:
        by_width = {**by_width, **_HOPPER.get(kernel, {})}
    setting = by_width.get(head_width) or by_width[padded_width(head_width)]
    # A pipeline would take the scattered loads of a straddling head's tables through shared memory, one by one.
    return replace(setting, stages=1) if straddles else setting


MAX_STENCIL_CHANNELS = 1024
"""Widest tokens of the block's stencils: a LayerNorm holds all channels of a token in one program."""
STENCIL_CHANNELS = 32
"""Channels of one program of the stencils that need no sum over channels."""
_ROW_ELEMENTS = 2048
_STRIP_PROGRAMS = 1024


@dataclass(frozen=True)
class Strip:
    """How a stencil walks down a map (:mod:`mila_mm.ops.triton.strip`).

    Attributes:
        groups: Pairs of columns of one program.
        warps: Warps per program. Four channels of a pair a thread: nine weights of each stay in its registers.
        registers: As :attr:`Launch.registers`.
    """

    groups: int
    warps: int
    registers: int | None = None

    def strips(self, width: int) -> int:
        """Strips that a map of a width has."""
        return -(-width // (2 * self.groups))

    def options(self) -> dict[str, int]:
        """The launch options and the compile-time argument."""
        limit = {} if self.registers is None else {'maxnreg': self.registers}
        return {'GROUPS': self.groups, 'num_warps': self.warps, **limit}


STRIP, STRIP_OF_16_BITS = Strip(16, 4), Strip(16, 4, 128)
"""How the stencils walk that keep nine weights or ten sums: 16 bits leave room for more programs at a time."""
STRIP_OF_16_BITS_BACKWARD = Strip(8, 2, 136)
"""Of `dwc_silu`: what it keeps besides spills at 128 by the ptxas of Triton 3.8. Half as many threads at 136 registers
leave room for seven programs of 64, where four warps would leave it for three of 128."""
STRIP_UNALIGNED = Strip(8, 4)
STRIP_BACKWARD = Strip(8, 4)
"""Nine weights, ten sums and four rows of x: two channels of a pair a thread are what registers hold."""


STRIP_DOWN, STRIP_DOWN_BACKWARD = Strip(8, 4), Strip(4, 4, 128)
STRIP_DOWN_BACKWARD_UNALIGNED = Strip(4, 4, 168)
"""Of the convolution of stride 2, where twice ``groups`` columns of the result are what a program has."""


def strip(dtype: torch.dtype, aligned: bool, silu_backward: bool = False) -> Strip:
    """How the stencils walk over activations of a dtype; unaligned tokens are loaded channel by channel."""
    if not aligned:
        return STRIP_UNALIGNED
    if dtype == torch.float32:
        return STRIP
    return STRIP_OF_16_BITS_BACKWARD if silu_backward else STRIP_OF_16_BITS


def rows_per_run(height: int, programs: int) -> int:
    """Rows that a program walks down, where ``programs`` walk side by side.

    A run reads two rows more than it has, so long ones read less; but all of a GPU should have something to do. A
    result at a token does not depend on it.
    """
    for rows in (32, 16, 8):
        if programs * -(-height // rows) >= _STRIP_PROGRAMS:
            return rows
    return 4


@functools.cache
def norm_strip(channels: int) -> Strip:
    """How the stencil walks that holds all channels of a token."""
    padded = padded_width(channels)
    # 96 channels of 128 need masks besides; ptxas by itself would rather spill two numbers.
    return Strip(max(1, 512 // padded), max(4, padded // 128), 168 if channels < padded == 128 else None)


@functools.cache
def norm_launch(channels: int) -> Launch:
    """The settings of a LayerNorm's kernels, with all channels of a token: 16 elements a thread, at most 64 tokens."""
    tokens = max(2, min(64, _ROW_ELEMENTS // padded_width(channels)))
    return Launch(tokens, 1, 4)


def norm_tokens_per_split(channels: int) -> int:
    """Tokens that one program of the norm's backward takes: as many as eight steps hold, whatever the map."""
    setting = norm_launch(channels)
    return 8 * setting.rows * setting.columns


COLUMN_SUM = Launch(64, 64, 4)
"""Rows of one step and channels of one program: 32 elements a thread."""
COLUMN_REDUCE = Launch(128, 32, 4)
_COLUMN_PROGRAMS = 1024


def column_rows_per_split(rows: int, channels: int) -> int:
    """Rows that one program of a column sum takes: enough programs for any GPU, whole steps, the same on all GPUs."""
    splits = max(1, _COLUMN_PROGRAMS // -(-channels // COLUMN_SUM.columns), rows // 8192)  # offsets below 2**31
    step = COLUMN_SUM.rows
    return -(-rows // (splits * step)) * step


MLP_WIDTHS = (64, 96, 128)
"""Channels at which the MLP's forward is one kernel. Wider ones are bound by their products, which cuBLAS does best."""
HIDDEN_BACKWARD = Launch(64, 64, 8)
GELU_BACKWARD, GELU_BACKWARD_FP32 = Launch(32, 64, 4), Launch(32, 64, 4, registers=96)
"""ptxas by itself would rather spill two numbers of fp32 on sm_100, by Triton 3.8, and take no more for it."""


def mlp_launch(channels: int) -> Launch:
    """The settings of the MLP's kernel: tokens and hidden units of a step, for 16-bit operands."""
    return Launch(128, 64, 8, 2) if padded_width(channels) <= 64 else Launch(64, 64, 4, 2)


WEIGHT_GRADIENTS_FLOP = 2**36
"""Arithmetic up to which one kernel writes the gradients of several of a block's matrices: some 0.15 ms of a GPU.

Beyond that a product each, by cuBLAS, which does large ones best. An estimate, not yet a measurement."""
_WEIGHT_GRADIENT_PROGRAMS = 320


def weight_gradients_launch(channels: int) -> Launch:
    """The settings of that kernel: rows of a step, and the side of the block of a result that a program sums."""
    return Launch(64, 64, 4, 3) if channels <= 64 else Launch(32, 128, 8, 3)


def weight_rows_per_split(rows: int, channels: int) -> int:
    """Rows that one program of it takes: programs for any GPU, in runs so long that the parts are a fraction of what is
    read.
    """
    setting = weight_gradients_launch(channels)
    tiles = 5 * (-(-channels // setting.columns)) ** 2  # of the smaller of two launches
    splits = max(1, min(-(-_WEIGHT_GRADIENT_PROGRAMS // tiles), rows // max(1024, 8 * channels)))
    return -(-rows // (splits * setting.rows)) * setting.rows
