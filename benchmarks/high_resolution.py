"""What images of 512 to 4096 pixels a side cost four backbones, and the exponent with which each grows.

    python -m benchmarks.high_resolution           # benchmarks/results/high_resolution.json; goes on where it ended
    python -m benchmarks.high_resolution --models MILA-T --sides 1024 2048 --what forward
    python -m benchmarks.high_resolution --docs    # tables and plot in docs/high_resolution.md from the result

MILA-T, and timm's Swin-T, ConvNeXt-T and ViT-S with patches of 16 (whose attention is PyTorch's
``scaled_dot_product_attention``), one image, without heads. *Forward* is inference, *step* forward and backward without
an optimizer, *attention* the op of MILA's first stage by itself, and for ViT-S that of one of its blocks, *memory* the
computed peak of a step, on tensors that have sizes and no memory. On a CPU:
fp32, one thread, and the time is that of the process, so that other work on the machine counts less; on a GPU: bf16
under autocast, by CUDA events.

Each case runs in a process of its own. What is expected to take longer than ``--seconds``, from the case before, or
more memory than is free is left out, and the result says so.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch
from torch import Tensor, nn

from benchmarks import measure
from benchmarks.high_resolution_report import SIDES, fitted, write_page
from benchmarks.memory import total, tracked_step

MODELS = ('MILA-T', 'Swin-T', 'ConvNeXt-T', 'ViT-S')
TIMM = {
    'Swin-T': ('swin_tiny_patch4_window7_224', {'strict_img_size': False}),
    'ConvNeXt-T': ('convnext_tiny', {}),
    'ViT-S': ('vit_small_patch16_224', {'dynamic_img_size': True}),
}
WHAT = ('attention', 'memory', 'forward', 'step')
SHORTEST = 20.0
"""Seconds: a case that is done earlier is repeated, up to three times."""
MEMORY_SHARE = 0.6
"""Of the memory that is free, what a case may be expected to take."""
Row = dict[str, Any]


def build(name: str) -> nn.Module:
    """A backbone that returns its maps, for any size of image."""
    if name == 'MILA-T':
        from mila_mm.models import MILATrunk

        return MILATrunk('tiny')
    import timm

    model, options = TIMM[name]
    return timm.create_model(model, pretrained=False, features_only=True, **options)


def attention(name: str, side: int, device: torch.device) -> Callable[[], Tensor]:
    """The attention by itself, on random tokens of one image: a call of it."""
    if name == 'MILA-T':
        from mila_mm.ops import mila_attention

        height, channels, heads = side // 4, 64, 2
        tokens = (1, height * height)
        qk, v = torch.randn(*tokens, 2 * channels, device=device), torch.randn(*tokens, channels, device=device)
        weight, bias = torch.randn(channels, 1, 3, 3, device=device), torch.randn(channels, device=device)
        return lambda: mila_attention(qk, v, weight, bias, spatial_shape=(height, height), num_heads=heads)
    q, k, v = torch.randn(3, 1, 6, (side // 16) ** 2, 64, device=device)
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v)


def call(row: Row, side: int, device: torch.device) -> Callable[[], object]:
    """What is timed, at a side that may be smaller than the row's for warming up."""
    what = row['stage']
    cast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda')
    if what == 'attention':
        function = attention(row['implementation'], side, device)

        def alone() -> None:
            with torch.no_grad(), cast:
                function()

        return alone
    model = build(row['implementation']).to(device).train(what == 'step')

    def run() -> None:
        image = torch.randn(1, 3, side, side, device=device)
        with torch.set_grad_enabled(what == 'step'), cast:
            maps = model(image)
        if what == 'step':
            torch.autograd.backward(maps, [torch.ones_like(x) for x in maps])
            model.zero_grad(set_to_none=True)

    return run


def measure_row(row: Row) -> Row:
    """Time a row and take its peak memory, in this process, which should be a fresh one."""
    torch.manual_seed(0)
    side = row['image'][0]
    if torch.cuda.is_available():
        function = call(row, side, torch.device('cuda'))
        return row | {'seconds': measure.timed(function)['median'] / 1e3, 'peak_bytes': measure.peak_bytes(function)}
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    call(row, 256, torch.device('cpu'))()  # what the first call costs in libraries and buffers is not the image's
    function = call(row, side, torch.device('cpu'))
    before, start = measure.resident_bytes(), time.process_time()
    times, walls = [], []
    while not times or (len(times) < 3 and time.process_time() - start < SHORTEST):
        wall, used = time.perf_counter(), time.process_time()
        function()
        times.append(time.process_time() - used)
        walls.append(time.perf_counter() - wall)
    return row | {
        'seconds': median(times),
        'wall_seconds': median(walls),
        'runs': len(times),
        'peak_bytes': measure.grown_bytes(before),
        'load': round(os.getloadavg()[0], 1),
    }


def computed_bytes(name: str, side: int) -> int:
    """Peak bytes of a training step in fp32, from tensors without memory."""
    peak, _ = tracked_step(lambda: build(name).train(), side, side)
    return total(peak)


def free_bytes() -> int:
    """Memory that a new process can have."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    lines = Path('/proc/meminfo').read_text(encoding='utf-8').splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable'))


def expected_seconds(row: Row, rows: list[Row]) -> float:
    """Time that a row is expected to take, from the two next smaller ones; 0 where there are none."""
    same = [
        each for each in rows if each.get('seconds') and all(each[k] == row[k] for k in ('implementation', 'stage'))
    ]
    smaller = sorted((each['image'][0], each['seconds']) for each in same if each['image'][0] < row['image'][0])
    if not smaller:
        return 0.0
    exponent = fitted(smaller[-2:])[0] if len(smaller) > 1 else 2.0 if row['implementation'] == 'ViT-S' else 1.0
    side, seconds = smaller[-1]
    return seconds * (row['image'][0] / side) ** (2 * max(1.0, exponent))


def reason_to_leave_out(row: Row, rows: list[Row], limit: float) -> str | None:
    """Why a row is not measured here, None where it is."""
    if not torch.cuda.is_available() and (expected := expected_seconds(row, rows)) > limit:
        return f'expected to take {expected:.0f} s, more than {limit:.0f} s'
    # Inference keeps no activations: a few maps of the first stage.
    needed = 4 * 64 * row['image'][0] ** 2
    if row['stage'] == 'step':
        needed = next((each['computed_bytes'] for each in rows if same({**row, 'stage': 'memory'}, each)), needed)
    if needed > MEMORY_SHARE * free_bytes():
        return f'expected to take {needed / 2**30:.0f} GiB, more than {MEMORY_SHARE:.0%} of what is free'
    return None


def machine() -> Row:
    """Where the figures are from."""
    if torch.cuda.is_available():
        return measure.machine()
    from benchmarks.backbone_cpu import machine as cpu_machine

    return cpu_machine() | {'threads': int(os.environ['OMP_NUM_THREADS']), 'commit': measure.commit()}


def measure_missing(args: argparse.Namespace) -> None:
    """Measure what the result lacks, the small sides of every model first."""
    context = get_context('forkserver')
    context.set_forkserver_preload(['benchmarks.high_resolution', 'mila_mm.models', 'timm'])
    for side, what, name in itertools.product(sorted(args.sides), args.what, args.models):
        row: Row = dict(stage=what, implementation=name, image=[side, side], batch=1)
        rows = read_rows(args.out)
        if (what == 'attention' and name not in ('MILA-T', 'ViT-S')) or any(same(row, each) for each in rows):
            continue
        if what == 'memory':
            row['computed_bytes'] = computed_bytes(name, side)
        elif reason := reason_to_leave_out(row, rows, args.seconds):
            row['left_out'] = reason
        else:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                row = pool.submit(measure_row, row).result()
        rows = [each for each in read_rows(args.out) if not same(row, each, but_left_out=False)]
        measure.write(args.out, {'benchmark': 'high_resolution', 'rows': [*rows, row | {'machine': machine()}]})
        said = f'{row["seconds"]:.2f} s, peak {row["peak_bytes"] / 2**30:.2f} GiB' if 'seconds' in row else row
        print(f'{what}, {name}, {side}: {said}', flush=True)


def read_rows(path: Path) -> list[Row]:
    """The rows so far."""
    return json.loads(path.read_text(encoding='utf-8'))['rows'] if path.exists() else []


def same(row: Row, other: Row, but_left_out: bool = True) -> bool:
    """Whether two rows are of the same case; one that was left out is tried again and does not count."""
    equal = all(row[key] == other[key] for key in ('stage', 'implementation', 'image'))
    return equal and not (but_left_out and 'left_out' in other)


def main(argv: list[str] | None = None) -> int:
    """Measure and save row by row; or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS))
    parser.add_argument('--sides', nargs='+', type=int, default=list(SIDES), help='multiples of 32')
    parser.add_argument('--what', nargs='+', choices=WHAT, default=list(WHAT))
    parser.add_argument('--seconds', type=float, default=180.0, help='on a CPU, leave out what takes longer')
    parser.add_argument('--docs', action='store_true', help='only write docs/high_resolution.md and its plot')
    name = 'high_resolution_gpu.json' if torch.cuda.is_available() else 'high_resolution.json'
    parser.add_argument('--out', type=Path, default=measure.RESULTS / name)
    args = parser.parse_args(argv)
    if any(side < 32 or side % 32 for side in args.sides):
        parser.error(f'--sides: expected positive multiples of 32, got {args.sides}')
    if not args.docs:
        measure_missing(args)
    document = json.loads(args.out.read_text(encoding='utf-8'))
    write_page(document['rows'], measure.ROOT / 'docs' if args.docs else None)
    return 0


if __name__ == '__main__':
    sys.exit(main())
