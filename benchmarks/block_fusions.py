"""Time and memory of the block's fusions on a GPU, each against its modules one after the other, eager and compiled.

    python -m benchmarks.block_fusions                        # everything, to benchmarks/results/block_fusions.json
    python -m benchmarks.block_fusions --fusions cpe_norm --sizes 800x1280x2 --stages 1
    python -m benchmarks.block_fusions --resume               # what an interrupted run has not measured
    python -m benchmarks.report benchmarks/results/block_fusions.json --dtype bf16

16 bits are those of autocast with fp32 weights, on tokens of 16 bits, as in training. Before any timing outputs and
gradients are held to fp64. ``fused=`` of the models stays off unless a fusion wins here: the last lines say so, for
each dtype and size.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.attention_op import DTYPES, SIZES, percent_of_copy, size
from benchmarks.attention_op import describe as describe_stage
from mila_mm.ops import (
    batch_norm,
    column_sum,
    cpe_norm,
    dwc_silu,
    layer_norm,
    mlp,
    relu_dwc_relu,
    why_not_triton_stencil,
)

# Passes over a (B, N, C) tensor. cpe_norm: x, x', y, and backward x', dy, dx', g; g, x, dx. dwc_silu: x, u, and
# backward x, du, g; g, x, dx. The projections, as if products were free: y and both results, and their gradients.
# layer_norm: x, y, and dy, x, dx. bias, whose sum is ours: x, y, and dy. relu_dwc_relu, over its 8C wide input: x, a
# quarter for y, and a half for y and dy, x, dx. batch_norm, with its ReLU: x twice, y, and x, dy twice, dx. mlp, as if
# the hidden map took none: x, y, and x, dy, dx.
PASSES = {
    'cpe_norm': (3, 7),
    'dwc_silu': (2, 6),
    'projections': (3, 3),
    'layer_norm': (2, 3),
    'bias': (2, 1),
    'relu_dwc_relu': (1.25, 2.5),
    'batch_norm': (3, 5),
    'mlp': (2, 3),
}
LIMITS = {'bf16': (8e-3, 2e-2), 'fp16': (1e-3, 3e-3), 'fp32': (1e-5, 1e-4)}
Op = Callable[..., tuple[Tensor, ...]]


class BiasBySum(torch.autograd.Function):
    """x + bias, with the bias's gradient by :func:`mila_mm.ops.column_sum`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        """Add."""
        ctx.dtype = bias.dtype
        return x + bias.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Sum."""
        return grad, column_sum(grad, ctx.dtype)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """A depthwise 3x3 as a module computes it, on tokens that lie as channels_last."""
    image = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return F.conv2d(image, weight, bias, padding=1, groups=x.shape[-1]).permute(0, 2, 3, 1).flatten(1, 2)


def modules(fusion: str) -> Op:
    """The unfused form, (inputs, height, width) to outputs."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, *hw: int) -> tuple[Tensor, ...]:
        x = x + depthwise(x, weight, bias, *hw)
        return x, F.layer_norm(x, x.shape[-1:], gamma, beta)

    def silu(x: Tensor, weight: Tensor, bias: Tensor, *hw: int) -> tuple[Tensor, ...]:
        return (F.silu(depthwise(x, weight, bias, *hw)),)

    def projections(x: Tensor, w_in: Tensor, b_in: Tensor, w_act: Tensor, b_act: Tensor, *_: int) -> tuple[Tensor, ...]:
        return F.linear(x, w_in, b_in), F.linear(x, w_act, b_act)

    def layer(x: Tensor, gamma: Tensor, beta: Tensor, *_: int) -> tuple[Tensor, ...]:
        return (F.layer_norm(x, x.shape[-1:], gamma, beta).to(x.dtype),)  # what comes next casts it

    def bias(x: Tensor, bias: Tensor, *_: int) -> tuple[Tensor, ...]:
        return (x + bias.to(x.dtype),)

    def down(x: Tensor, weight: Tensor, bias: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        image = F.relu(x).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        y = F.relu(F.conv2d(image, weight, bias, stride=2, padding=1, groups=x.shape[-1]))
        return (y.permute(0, 2, 3, 1).flatten(1, 2),)

    def batch(x: Tensor, gamma: Tensor, beta: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        image = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        y = F.relu(F.batch_norm(image, None, None, gamma, beta, training=True), inplace=True)
        return (y.permute(0, 2, 3, 1).flatten(1, 2),)

    def feed_forward(
        x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, shortcut: Tensor, *_: int
    ) -> tuple[Tensor, ...]:
        return (shortcut + F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2),)

    forms = {'cpe_norm': norm, 'dwc_silu': silu, 'projections': projections}
    forms |= {'layer_norm': layer, 'bias': bias, 'relu_dwc_relu': down, 'batch_norm': batch, 'mlp': feed_forward}
    return forms[fusion]


def fused(fusion: str) -> Op:
    """Our form, by Triton or not at all."""

    def norm(*args: Any) -> tuple[Tensor, ...]:
        return cpe_norm(*args[:5], args[5:], backend='triton')

    def silu(*args: Any) -> tuple[Tensor, ...]:
        return (dwc_silu(*args[:3], args[3:], backend='triton'),)

    def projections(x: Tensor, w_in: Tensor, b_in: Tensor, w_act: Tensor, b_act: Tensor, *_: int) -> tuple[Tensor, ...]:
        return F.linear(x, torch.cat((w_in, w_act)), torch.cat((b_in, b_act))).chunk(2, dim=-1)

    def layer(x: Tensor, gamma: Tensor, beta: Tensor, *_: int) -> tuple[Tensor, ...]:
        return (layer_norm(x, gamma, beta, backend='triton'),)

    def bias(x: Tensor, bias: Tensor, *_: int) -> tuple[Tensor, ...]:
        return (BiasBySum.apply(x, bias),)

    def down(*args: Any) -> tuple[Tensor, ...]:
        return (relu_dwc_relu(*args[:3], args[3:], backend='triton'),)

    def batch(x: Tensor, gamma: Tensor, beta: Tensor, *_: int) -> tuple[Tensor, ...]:
        return (batch_norm(x, gamma, beta, relu=True, backend='triton'),)

    def feed_forward(*args: Any) -> tuple[Tensor, ...]:
        return (mlp(*args[:6]),)

    forms = {'cpe_norm': norm, 'dwc_silu': silu, 'projections': projections}
    forms |= {'layer_norm': layer, 'bias': bias, 'relu_dwc_relu': down, 'batch_norm': batch, 'mlp': feed_forward}
    return forms[fusion]


def draw(fusion: str, batch: int, height: int, width: int, channels: int, dtype: torch.dtype) -> list[Tensor]:
    """Random leaves: tokens of ``dtype``, parameters in fp32."""
    channels *= 8 if fusion == 'relu_dwc_relu' else 1
    kernel, vector, matrix = (channels, 1, 3, 3), (channels,), (channels, channels)
    shapes = {
        'cpe_norm': [kernel, *[vector] * 3],
        'dwc_silu': [kernel, vector],
        'projections': [matrix, vector, matrix, vector],
        'layer_norm': [vector, vector],
        'bias': [vector],
        'relu_dwc_relu': [kernel, vector],
        'batch_norm': [vector, vector],
        'mlp': [(4 * channels, channels), (4 * channels,), (channels, 4 * channels), vector],
    }[fusion]
    x = torch.randn(batch, height * width, channels, device=measure.DEVICE).to(dtype)
    parameters = [
        torch.randn(shape, device=measure.DEVICE) / math.sqrt(max(1, math.prod(shape[1:]))) for shape in shapes
    ]
    shortcut = [torch.randn_like(x)] if fusion == 'mlp' else []
    return [t.requires_grad_() for t in (x, *parameters, *shortcut)]


def with_gradients(
    op: Op, inputs: list[Tensor], grads: list[Tensor], hw: tuple[int, int], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Outputs, and gradients of the inputs."""
    with torch.autocast(measure.DEVICE, dtype, enabled=dtype in (torch.float16, torch.bfloat16)):
        outputs = op(*inputs, *hw)
    return outputs, torch.autograd.grad(outputs, inputs, [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)])


def worst_errors(fusion: str, op: Op, dtype: torch.dtype, channels: int) -> tuple[float, float]:
    """Root mean square error of the outputs, and of the gradients, against fp64 on a map of 40 x 56."""
    hw = (40, 56)
    inputs = draw(fusion, 2, *hw, channels, dtype)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    grads = [torch.randn_like(y).to(dtype) for y in modules(fusion)(*doubles, *hw)]
    want = with_gradients(modules(fusion), doubles, [g.double() for g in grads], hw, torch.float64)
    got = with_gradients(op, inputs, grads, hw, dtype)

    def worst(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True)]
        return max(math.inf if math.isnan(error) else error for error in errors)

    return worst(got[0], want[0]), worst(got[1], want[1])


def measure_one(op: Op, inputs: list[Tensor], hw: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    """Times and peak memory of forward, and of forward and backward, eager and replayed from a CUDA graph."""
    cast = dtype != torch.float32

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(measure.DEVICE, dtype, enabled=cast):
            return op(*inputs, *hw)

    grads = [torch.randn_like(y) for y in forward()]

    def both() -> None:
        with_gradients(op, inputs, grads, hw, dtype)

    return {
        'forward': measure.timed(forward),
        'both': measure.timed(both),
        'forward_graph': measure.timed_graph(forward),
        'both_graph': measure.timed_graph(both),
        'forward_peak_bytes': measure.peak_bytes(forward),
        'both_peak_bytes': measure.peak_bytes(both),
    }


def measure_rows(rows: list[dict[str, Any]], bandwidth: float) -> Iterator[dict[str, Any]]:
    """Complete rows of one fusion, dtype, stage and implementation."""
    fusion, dtype_name, name, channels = (rows[0][k] for k in ('fusion', 'dtype', 'implementation', 'channels'))
    dtype, (there, back) = DTYPES[dtype_name], PASSES[fusion]
    op = fused(fusion) if name == 'ours' else modules(fusion)
    op = torch.compile(op, dynamic=False) if name == 'compiled' else op
    errors = worst_errors(fusion, op, dtype, channels)
    slack = 1 if name == 'ours' else 5  # PyTorch sums the gradients of a convolution's weights in 16 bits
    correct = all(error <= slack * limit for error, limit in zip(errors, LIMITS[dtype_name], strict=True))
    print(
        f'{dtype_name} {rows[0]["stage"]} {name}: errors {errors[0]:.1e} {errors[1]:.1e}'
        f'{"" if correct else " TOO LARGE, not timed"}'
    )
    for row in rows:
        row.update(errors=errors, correct=correct)
        if correct:
            torch._dynamo.reset()  # each size compiled for itself: past a limit it would run uncompiled
            hw, title = tuple(row['map']), f'  {row["image"][0]}x{row["image"][1]}x{row["batch"]}'
            inputs = draw(fusion, row['batch'], *hw, channels, dtype)
            result = measure.out_of_memory_as_none(lambda: measure_one(op, inputs, hw, dtype))  # noqa: B023
            if result is None:
                print(f'{title}: out of memory')
            else:
                row.update(result)
                for key, passes in (('forward', there), ('both', there + back)):
                    best = (result[f'{key}_graph'] or result[key])['median']
                    row[f'{key}_percent_of_copy'] = percent_of_copy(inputs[0].numel(), passes, dtype, best, bandwidth)
                print(
                    f'{title}: forward {result["forward"]["median"]:.3f} ms, both {result["both"]["median"]:.3f} ms '
                    f'({row["both_percent_of_copy"]:.0f} % of copy)'
                )
        yield row


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """For each fusion and dtype, and each size of these, the ratio of times, forward and backward, over the better of
    the unfused forms: the median over what the line covers."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if 'both' in row:
            image = f'{row["image"][0]} x {row["image"][1]}, batch {row["batch"]}'
            case = times.setdefault((row['fusion'], row['dtype'], image, row['stage']), {})
            case[row['implementation']] = (row['both_graph'] or row['both'])['median']
    ratios: dict[tuple[str, str, str], list[float]] = {}
    for (fusion, dtype, image, _), by in times.items():
        if 'ours' in by and len(by) > 1:
            ratio = min(t for name, t in by.items() if name != 'ours') / by['ours']
            for covered in ('all sizes', image):
                ratios.setdefault((fusion, dtype, covered), []).append(ratio)
    lines = []
    for (fusion, dtype, image), found in sorted(
        ratios.items(), key=lambda item: (list(PASSES).index(item[0][0]), item[0][1], item[0][2] != 'all sizes')
    ):
        median = statistics.median(found)
        lines.append(
            f'{fusion}, {dtype}, {image}: {"WINS" if median > 1 else "LOSES"}, {median:.2f} x the better '
            f'unfused form (worst {min(found):.2f}, {sum(r > 1 for r in found)} of {len(found)} cases)'
        )
    return lines


def describe(dtype: str, fusion: str, stage: int, name: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """What is known of a row before anything runs."""
    row = describe_stage(dtype, stage, name, size)
    return {'fusion': fusion, **row, 'stage': f'{fusion} {stage}'}


def require_kernels() -> None:
    """Exit with one line where ours would not run."""
    measure.require_cuda()
    if measure.REHEARSAL:
        return
    if (reason := why_not_triton_stencil(torch.zeros(1, 4, 64, device=measure.DEVICE))) is not None:
        sys.exit(f'the Triton kernels cannot run here: {reason}')


def main() -> int:
    """Parse, measure, save row by row. Returns 1 where one of our forms was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--fusions', nargs='+', default=list(PASSES), choices=PASSES)
    parser.add_argument('--sizes', type=size, nargs='+', default=SIZES, metavar='HxWxB')
    parser.add_argument('--dtypes', nargs='+', default=['bf16', 'fp32'], choices=DTYPES)
    parser.add_argument('--stages', type=int, nargs='+', default=[1, 2, 3, 4], choices=[1, 2, 3, 4])
    parser.add_argument(
        '--implementations', nargs='+', default=['ours', 'eager', 'compiled'], choices=['eager', 'compiled', 'ours']
    )
    parser.add_argument('--out', type=Path, default=measure.RESULTS / 'block_fusions.json')
    measure.add_resume(parser)
    args = parser.parse_args()
    require_kernels()
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 for all
    head = {'benchmark': 'block_fusions', 'machine': measure.machine(), 'copy_bandwidth': measure.copy_bandwidth()}
    result = measure.Result(args.out, head, args.resume)
    for cases in itertools.product(args.dtypes, args.fusions, args.stages, args.implementations):
        if todo := result.missing([describe(*cases, size) for size in args.sizes]):
            for row in measure_rows(todo, result.document['copy_bandwidth']):
                result.add(row)
    result.document['verdicts'] = verdicts(result.rows)
    print('\n'.join(result.document['verdicts']))
    measure.save(args.out, result.document)
    return 0 if all(row['correct'] for row in result.rows if row['implementation'] == 'ours') else 1


if __name__ == '__main__':
    sys.exit(main())
