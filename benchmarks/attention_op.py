"""Time and memory of the attention op on a GPU, against a transcription of its formula, eager and compiled.

    python -m benchmarks.attention_op                         # everything, to benchmarks/results/attention_op.json
    python -m benchmarks.attention_op --sizes 800x1280x1 --dtypes bf16 --stages 1
    python -m benchmarks.attention_op --resume                # what an interrupted run has not measured
    python -m benchmarks.report benchmarks/results/attention_op.json      # the table and the plot

What is timed is what the op covers: from the output of the qk projection to the product with the gate. Before any
timing each implementation's output and gradients are held to an fp64 reference on a smaller map; one that fails is not
timed.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.transcription import rope
from mila_mm.ops import mila_attention, mila_attention_reference, why_not_triton

# Image height, width, batch; maps of the stages are a 4th, 8th, 16th and 32nd of it.
SIZES = ((224, 224, 64), (800, 1280, 1), (800, 1280, 2), (800, 1280, 8), (512, 2048, 2), (2048, 2048, 1))
CHANNELS, HEADS = (64, 128, 256, 512), (2, 4, 8, 16)
DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}
# Passes over a (B, N, C) tensor in two sweeps that keep nothing between them: k, v; q, v, gate, y.
# Backward: dy, q, v, gate, dgate, do, dq; k, v, do, dk, dv.
FORWARD_PASSES, BACKWARD_PASSES = 6, 12
# Root mean square error against fp64, of the output and of the gradients, that an implementation may have.
LIMITS = {'bf16': (8e-3, 2e-2), 'fp16': (1e-3, 3e-3), 'fp32': (1e-5, 1e-4)}

Op = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, int], Tensor]


def transcribed(
    qk: Tensor, v: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, height: int, width: int, heads: int
) -> Tensor:
    """The formula as ``transcription.LinearAttention`` writes it, behind its qk projection, with the gate."""
    b, n, c = v.shape

    def split(t: Tensor) -> Tensor:
        return t.reshape(b, n, heads, c // heads).permute(0, 2, 1, 3)

    q, k = qk.reshape(b, n, 2, c).permute(2, 0, 1, 3).unbind(0)
    q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
    q_rope = split(rope(q.reshape(b, height, width, c), height, width).reshape(b, n, c))
    k_rope = split(rope(k.reshape(b, height, width, c), height, width).reshape(b, n, c))
    z = 1 / (split(q) @ split(k).mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
    kv = (k_rope.transpose(-2, -1) * n**-0.5).to(v.dtype) @ (split(v) * n**-0.5)
    out = (q_rope.to(v.dtype) @ kv * z).transpose(1, 2).reshape(b, n, c)
    grid = v.reshape(b, height, width, c).permute(0, 3, 1, 2)
    lepe = F.conv2d(grid, weight.to(v.dtype), bias.to(v.dtype), padding=1, groups=c)
    return (out + lepe.permute(0, 2, 3, 1).reshape(b, n, c)) * F.silu(gate)


def ours(
    qk: Tensor, v: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, height: int, width: int, heads: int
) -> Tensor:
    """The op, by Triton or not at all."""
    return mila_attention(qk, v, weight, bias, (height, width), heads, gate, backend='triton')


def draw(batch: int, height: int, width: int, channels: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Random leaves (qk, v, weight, bias, gate) and a gradient of the output."""
    tokens = height * width

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=measure.DEVICE, dtype=dtype)

    inputs = [
        normal(batch, tokens, 2 * channels, dtype=dtype),
        normal(batch, tokens, channels, dtype=dtype),
        normal(channels, 1, 3, 3) / 3,
        normal(channels),
        normal(batch, tokens, channels, dtype=dtype),
    ]
    return [x.requires_grad_() for x in inputs], normal(batch, tokens, channels, dtype=dtype)


def worst_errors(op: Op, dtype: torch.dtype, channels: int, heads: int) -> tuple[float, float]:
    """Root mean square error of the output, and the worst of the gradients, against fp64 on a map of 40 x 56."""
    height, width = 40, 56
    inputs, grad_y = draw(2, height, width, channels, dtype)
    y = op(*inputs, height, width, heads)
    grads = torch.autograd.grad(y, inputs, grad_y)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    exact = mila_attention_reference(*doubles[:4], (height, width), heads, doubles[4])
    exact_grads = torch.autograd.grad(exact, doubles, grad_y.double())

    def error(got: Tensor, want: Tensor) -> float:
        value = ((got.double() - want).norm() / want.norm()).item()
        return math.inf if math.isnan(value) else value

    return error(y, exact), max(error(a, b) for a, b in zip(grads, exact_grads, strict=True))


def measure_one(op: Op, inputs: list[Tensor], grad_y: Tensor, size: tuple[int, int, int]) -> dict[str, Any]:
    """Times and peak memory of forward, and of forward and backward, eager and replayed from a CUDA graph."""

    def forward() -> None:
        with torch.no_grad():
            op(*inputs, *size)

    def both() -> None:
        torch.autograd.grad(op(*inputs, *size), inputs, grad_y)

    return {
        'forward': measure.timed(forward),
        'both': measure.timed(both),
        'forward_graph': measure.timed_graph(forward),
        'both_graph': measure.timed_graph(both),
        'forward_peak_bytes': measure.peak_bytes(forward),
        'both_peak_bytes': measure.peak_bytes(both),
    }


def percent_of_copy(elements: int, passes: float, dtype: torch.dtype, milliseconds: float, bandwidth: float) -> float:
    """Minimal traffic over time, as a percentage of the bandwidth of a copy."""
    return 100 * elements * dtype.itemsize * passes / (milliseconds / 1e3) / bandwidth


def describe(dtype: str, stage: int, name: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """What is known of a row before anything runs; the stem and each downsampling round up."""
    height, width, batch = size
    return {
        'dtype': dtype,
        'stage': stage,
        'implementation': name,
        'image': [height, width],
        'batch': batch,
        'map': [-(-side // 2 ** (stage + 1)) for side in (height, width)],
        'channels': CHANNELS[stage - 1],
    }


def measure_rows(rows: list[dict[str, Any]], bandwidth: float) -> Iterator[dict[str, Any]]:
    """Complete rows of one dtype, stage and implementation."""
    dtype_name, stage, name, channels = (rows[0][key] for key in ('dtype', 'stage', 'implementation', 'channels'))
    dtype, heads = DTYPES[dtype_name], HEADS[stage - 1]
    op = {'eager': transcribed, 'compiled': torch.compile(transcribed, dynamic=False), 'ours': ours}[name]
    errors = worst_errors(op, dtype, channels, heads)
    correct = all(e <= limit for e, limit in zip(errors, LIMITS[dtype_name], strict=True))
    print(
        f'{dtype_name} stage {stage} {name}: errors {errors[0]:.1e} {errors[1]:.1e}'
        f'{"" if correct else " TOO LARGE, not timed"}'
    )
    for row in rows:
        row.update(errors=errors, correct=correct)
        if correct:
            torch._dynamo.reset()  # each size compiled for itself: past a limit it would run uncompiled
            (h, w), batch = row['map'], row['batch']
            inputs, grad_y = draw(batch, h, w, channels, dtype)
            result = measure.out_of_memory_as_none(lambda: measure_one(op, inputs, grad_y, (h, w, heads)))  # noqa: B023
            title = f'  {row["image"][0]}x{row["image"][1]}x{batch}'
            if result is None:
                print(f'{title}: out of memory')
            else:
                row.update(result | shares_of_copy(result, grad_y.numel(), dtype, bandwidth))
                print(
                    f'{title}: forward {result["forward"]["median"]:.3f} ms '
                    f'({row["forward_percent_of_copy"]:.0f} % of copy), both {result["both"]["median"]:.3f} ms '
                    f'({row["both_percent_of_copy"]:.0f} %)'
                )
        yield row


def shares_of_copy(result: dict[str, Any], elements: int, dtype: torch.dtype, bandwidth: float) -> dict[str, float]:
    """The share of the copy's bandwidth in either direction, from the replayed graph where there is one."""
    shares = {}
    for key, passes in (('forward', FORWARD_PASSES), ('both', FORWARD_PASSES + BACKWARD_PASSES)):
        best = (result[f'{key}_graph'] or result[key])['median']
        shares[f'{key}_percent_of_copy'] = percent_of_copy(elements, passes, dtype, best, bandwidth)
    return shares


def benchmark(args: argparse.Namespace) -> measure.Result:
    """Measure all rows that are not there yet."""
    bandwidth = measure.copy_bandwidth()
    print(f'copy bandwidth {bandwidth / 1e12:.2f} TB/s')
    head = {'benchmark': 'attention_op', 'machine': measure.machine(), 'copy_bandwidth': bandwidth}
    result = measure.Result(args.out, head, args.resume)
    for dtype, stage, name in itertools.product(args.dtypes, args.stages, args.implementations):
        if todo := result.missing([describe(dtype, stage, name, size) for size in args.sizes]):
            for row in measure_rows(todo, result.document['copy_bandwidth']):
                result.add(row)
    return result


def size(text: str) -> tuple[int, int, int]:
    """'800x1280x2' as (800, 1280, 2)."""
    height, width, batch = (int(part) for part in text.split('x'))
    return height, width, batch


def require_kernels() -> None:
    """Exit with one line where ours would not run."""
    measure.require_cuda()
    if measure.REHEARSAL:
        return
    probe = torch.zeros(1, 4, 128, device=measure.DEVICE)
    if (reason := why_not_triton(probe, probe[..., :64], 2)) is not None:
        sys.exit(f'the Triton kernels cannot run here: {reason}')


def main() -> int:
    """Parse, measure, save row by row. Returns 1 where our op was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', type=size, nargs='+', default=SIZES, metavar='HxWxB')
    parser.add_argument('--dtypes', nargs='+', default=['bf16', 'fp32'], choices=DTYPES)
    parser.add_argument('--stages', type=int, nargs='+', default=[1, 2, 3, 4], choices=[1, 2, 3, 4])
    parser.add_argument(
        '--implementations', nargs='+', default=['ours', 'eager', 'compiled'], choices=['eager', 'compiled', 'ours']
    )
    parser.add_argument('--out', type=Path, default=measure.RESULTS / 'attention_op.json')
    measure.add_resume(parser)
    args = parser.parse_args()
    require_kernels()
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 for all
    rows = benchmark(args).rows
    print(f'wrote {args.out}')
    return 0 if all(row['correct'] for row in rows if row['implementation'] == 'ours') else 1


if __name__ == '__main__':
    sys.exit(main())
