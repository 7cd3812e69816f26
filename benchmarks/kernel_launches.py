"""What the launchers of attention and block would start, noted on small CPU tensors with every kernel replaced.

So what :mod:`benchmarks.compile_matrix` compiles is exactly what a GPU would be given: settings, constants, argument
types and what Triton specialises on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton

from mila_mm.ops.attention import backward_kernels, forward_kernels, launch
from mila_mm.ops.batch_norm import kernels as batch_norm_kernels
from mila_mm.ops.batch_norm import launch as batch_norm_launch
from mila_mm.ops.block import kernels as block_kernels
from mila_mm.ops.block import launch as block_launch
from mila_mm.ops.block.layout import Shape
from mila_mm.ops.block.plan import Plan
from mila_mm.ops.feed_forward import kernels as mlp_kernels
from mila_mm.ops.feed_forward import launch as mlp_launch
from mila_mm.ops.rows import kernels as row_kernels
from mila_mm.ops.rows import launch as row_launch
from mila_mm.ops.stencil import down_kernels, lepe_kernels
from mila_mm.ops.stencil import kernels as stencil_kernels
from mila_mm.ops.stencil import launch as stencil_launch
from mila_mm.ops.triton import configs

# Name, dtype of the activations, matrix products.
MODES = (
    ('fp32', torch.float32, 'tf32x3'),
    ('fp32-tf32', torch.float32, 'tf32'),
    ('fp16', torch.float16, 'tf32'),
    ('bf16', torch.bfloat16, 'low'),
)
POINTERS = {torch.float32: '*fp32', torch.float16: '*fp16', torch.bfloat16: '*bf16', torch.int64: '*i64'}
KERNELS = (
    (forward_kernels, 'state_kernel'),
    (forward_kernels, 'reduce_kernel'),
    (forward_kernels, 'output_kernel'),
    (backward_kernels, 'gate_backward_kernel'),
    (backward_kernels, 'query_backward_kernel'),
    (backward_kernels, 'key_value_backward_kernel'),
    (lepe_kernels, 'lepe_backward_kernel'),
    (lepe_kernels, 'lepe_reduce_kernel'),
    (stencil_kernels, 'cpe_norm_kernel'),
    (row_kernels, 'layer_norm_kernel'),
    (row_kernels, 'norm_backward_kernel'),
    (stencil_kernels, 'dwc_silu_kernel'),
    (stencil_kernels, 'stencil_backward_kernel'),
    (down_kernels, 'relu_dwc_relu_kernel'),
    (down_kernels, 'relu_dwc_relu_backward_kernel'),
    (batch_norm_kernels, 'batch_statistics_kernel'),
    (batch_norm_kernels, 'batch_moments_kernel'),
    (batch_norm_kernels, 'batch_norm_kernel'),
    (batch_norm_kernels, 'batch_norm_sums_kernel'),
    (batch_norm_kernels, 'batch_norm_backward_kernel'),
    (mlp_kernels, 'mlp_kernel'),
    (mlp_kernels, 'gelu_backward_kernel'),
    (mlp_kernels, 'hidden_backward_kernel'),
    (row_kernels, 'column_parts_kernel'),
    (row_kernels, 'column_reduce_kernel'),
    (block_kernels, 'block_reduce_kernel'),
    (block_kernels, 'weight_gradients_kernel'),
)
STENCIL_CHANNELS = (32, 64, 72, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class Launch:
    """One kernel as a launcher would start it."""

    module: str
    kernel: str
    case: str
    mode: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


class Recorder:
    """Stands in for a kernel: ``recorder[grid](...)`` notes the arguments and runs nothing."""

    def __init__(self, module: str, kernel: triton.JITFunction, note: Callable[..., None]) -> None:
        self.module, self.kernel, self.note = module, kernel, note

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return what takes the arguments."""
        return functools.partial(self.note, self.module, self.kernel)


def describe(module: str, kernel: triton.JITFunction, case: str, mode: str, args: tuple, options: dict) -> Launch:
    """Types, constants and divisibility of a launch, as Triton derives them from its arguments."""
    compiler = tuple((name, value) for name, value in options.items() if name not in kernel.arg_names)
    signature, constants, divisible = [], [], []
    values = dict(zip(kernel.arg_names, args, strict=False)) | options
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature.append((parameter.name, 'constexpr'))
            constants.append((parameter.name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((parameter.name, POINTERS[value.dtype]))
            divisible.append(index)
        elif isinstance(value, float):
            signature.append((parameter.name, 'fp32'))
        else:
            signature.append((parameter.name, 'i32'))
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(index)
    return Launch(module, kernel.__name__, case, mode, tuple(signature), tuple(constants), tuple(divisible), compiler)


@contextmanager
def recording(case: str, mode: str, capability: int) -> Iterator[list[Launch]]:
    """Replace all kernels by recorders, for a device of a capability; what they were asked to launch is in the list."""
    launches: list[Launch] = []

    def note(module: str, kernel: triton.JITFunction, *args: object, **options: object) -> None:
        launches.append(describe(module, kernel, case, mode, args, options))

    originals = [(module, name, getattr(module, name)) for module, name in KERNELS]
    is_hopper, configs.is_hopper = configs.is_hopper, lambda device: capability == 90
    try:
        for module, name, kernel in originals:
            setattr(module, name, Recorder(module.__name__, kernel, note))
        yield launches
    finally:
        configs.is_hopper = is_hopper
        for module, name, kernel in originals:
            setattr(module, name, kernel)


def record(
    mode: str,
    dtype: torch.dtype,
    dots: str,
    head_width: int,
    heads: int,
    lepe: bool,
    gate: bool,
    size: tuple[int, int] = (20, 20),
    capability: int = 80,
) -> list[Launch]:
    """All launches of one forward and one backward pass, with more than one split so that every kernel is there."""
    case = f'd{head_width} {"odd" if heads % 2 else "even"} heads{" lepe" * lepe}{" gate" * gate}'
    height, width = size
    channels = heads * head_width
    x = torch.zeros(1, height * width, channels, dtype=dtype)
    weight, bias = (torch.zeros(channels, 1, 3, 3), torch.zeros(channels)) if lepe else (None, None)
    u = x if gate else None
    with recording(case, mode, capability) as launches:
        qk = torch.cat((x, x), -1)
        rest = (height, width, heads, 1e-6, 1e4)
        _, state, mean = launch.attention_forward(qk, x, weight, bias, u, *rest, dots=dots)
        launch.attention_backward(x, qk, x, weight, bias, u, state, mean, *rest, dots=dots)
    return launches


def record_stencils(
    mode: str, dtype: torch.dtype, channels: int, size: tuple[int, int] = (20, 20), capability: int = 80
) -> list[Launch]:
    """All launches of the block's stencils on tokens of one width, forward and backward."""
    x = torch.zeros(1, size[0] * size[1], channels, dtype=dtype)
    vector = torch.zeros(channels)
    weights = (torch.zeros(channels, 1, 3, 3), vector)
    with recording(f'{channels} channels', mode, capability) as launches:
        norm = (*weights, vector, vector)
        out, _, mean, rstd = stencil_launch.cpe_norm_forward(x, *norm, *size, 1e-5, dtype)
        stencil_launch.cpe_norm_backward(x, x, x, *norm, out, mean, rstd, *size)
        stencil_launch.dwc_silu_forward(x, *weights, *size)
        stencil_launch.dwc_silu_backward(x, x, *weights, *size)
        y = stencil_launch.relu_dwc_relu_forward(x, *weights, *size)
        stencil_launch.relu_dwc_relu_backward(y, x, *weights, y, *size)
        row_launch.column_sum(x, dtype)
        for relu in (False, True):
            record_batch_norm(x, vector, relu)
        if channels % 32 == 0:
            dots = next(dots for name, _, dots in MODES if name == mode)
            for scaled in (False, True):
                record_block(x, size, dots, scaled)
        if dtype != torch.float32:
            record_mlp(x)
        for source in {x, x.float()}:  # the residual stream may be wider than what the norm writes
            _, mean, rstd = row_launch.layer_norm_forward(source, vector, vector, 1e-5, dtype)
            row_launch.layer_norm_backward(x, source, mean, rstd, vector, vector, None, source.dtype)
    return launches


def record_batch_norm(x: torch.Tensor, vector: torch.Tensor, relu: bool) -> None:
    """The launches of a BatchNorm in training mode, forward and backward."""
    running = vector, vector, torch.tensor(0)
    _, statistics = batch_norm_launch.batch_norm_forward(x, vector, vector, running, 0.1, 1e-5, relu)
    batch_norm_launch.batch_norm_backward(x, x, vector, vector, statistics, relu)


def record_block(x: torch.Tensor, size: tuple[int, int], dots: str, scaled: bool) -> None:
    """The launches of a whole block with an MLP of four times as many hidden units, forward and backward."""
    channels, hidden = x.shape[2], 4 * x.shape[2]
    shape = Shape(
        1, *size, channels, hidden, channels // 32, 1e-5, 1e-5, 1e-6, 1e4, x.dtype, x.dtype, torch.float32,
        (scaled, scaled), True, dots, x.device,
    )  # fmt: skip
    plan = Plan(shape)
    widths = ((2 * channels, channels), (2 * channels, channels), (channels, channels), (hidden, channels))
    weights = [x.new_zeros(shape) for out, into in (*widths, (channels, hidden)) for shape in ((out, into), (out,))]
    params = [torch.zeros(channels * count) for _ in range(3) for count in (9, 1, 1, 1)]
    scales = (x.new_zeros(1), x.new_zeros(1)) if scaled else (None, None)
    _, *kept = block_launch.forward(plan, x, weights, params, torch.zeros(channels * 9), scales)
    rest = [*weights[:6:2], *weights[6:9]]
    block_launch.backward(plan, x, [x, *kept], rest, params, torch.zeros(channels * 9), scales)


def record_mlp(x: torch.Tensor) -> None:
    """The launches of an MLP of four times as many hidden units."""
    channels = x.shape[2]
    hidden = x.new_zeros(x.shape[1], 4 * channels)
    mlp_launch.gelu_backward_(hidden, hidden, x.dtype)
    if channels in configs.MLP_WIDTHS:
        vector = x.new_zeros(channels)
        weights = x.new_zeros(4 * channels, channels), hidden[0], x.new_zeros(channels, 4 * channels), vector
        for shortcut in (None, x, x.float()):
            mlp_launch.mlp_forward(x, *weights, shortcut, None)
        mlp_launch.mlp_forward(x, *weights, x, vector[:1])


def every_launch(quick: bool, head_widths: Sequence[int], capability: int) -> Iterator[Launch]:
    """The launches on a GPU of one capability, some more than once."""
    for mode, dtype, dots in MODES:
        for head_width in (32,) if quick else head_widths:
            for heads in (2,) if quick else (2, 3):
                for lepe in (True,) if quick else (True, False):
                    for gate in (True, False):
                        yield from record(mode, dtype, dots, head_width, heads, lepe, gate, capability=capability)
        if mode != 'fp32-tf32':  # the stencils have no matrix products
            for channels in (64, 512) if quick else STENCIL_CHANNELS:
                yield from record_stencils(mode, dtype, channels, capability=capability)
