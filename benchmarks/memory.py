"""Memory of one training step of the backbone by image size, with and without checkpointing and the fused op.

    python -m benchmarks.memory                    # computed; measured as well where there is a GPU
    python -m benchmarks.memory --docs             # the table in docs/large_images.md, from the result

*Computed* runs the step on fake CPU tensors, which have sizes and no memory, under PyTorch's memory tracker, in fp32:
the greatest sum of parameters, gradients, activations and temporaries that live at one time. The fused op counts as
its inputs, outputs and a state per head. *Measured* is the peak of CUDA's allocator. Neither holds an optimizer (AdamW:
twice the parameters) nor the heads of a detector.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from benchmarks.backbone import size, trunk
from benchmarks.backbone_cpu import machine as cpu_machine

SIZES = [(800, 1333, 1), (1024, 1024, 1), (1536, 1536, 1), (2048, 2048, 1)]
CHECKPOINTING = {'none': False, 'block': 'block', 'stage': 'stage'}
ATTENTION = {'fused': 'auto', 'eager': 'reference'}
Row = dict[str, Any]


def build(row: Row, backend: str) -> nn.Module:
    """The backbone of a row, ready to train."""
    model = trunk(row['arch'], backend)
    model.with_cp = CHECKPOINTING[row['checkpointing']]
    return model.train()


def computed(row: Row) -> dict[str, int]:
    """Bytes of a step in fp32 for one image: at its peak, and between forward and backward."""
    peak, after = tracked_step(lambda: build(row, ATTENTION[row['attention']]), *row['image'])
    growing = sum(
        value
        for kinds in peak.values()
        for kind, value in kinds.items()
        if str(kind).rpartition('.')[2] in ('ACT', 'TEMP', 'OTH')
    )
    return {'peak_bytes': total(peak), 'peak_bytes_of_the_batch': growing, 'after_forward_bytes': after}


def tracked_step(make: Callable[[], nn.Module], height: int, width: int) -> tuple[dict[Any, dict[str, int]], int]:
    """Run forward and backward of one image in fp32 on tensors without memory.

    Args:
        make: Makes a backbone, which returns a sequence of maps.

    Returns:
        PyTorch's snapshot of what lives at the peak, and the bytes between forward and backward.
    """
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    real, mode = make(), FakeTensorMode()  # made of numbers: some constructors read what they compute
    with FakeCopyMode(mode):
        model = deepcopy(real)
    with mode:
        image = torch.randn(1, 3, height, width)
        tracker = MemTracker()
        tracker.track_external(model, image)
        with tracker:
            maps = model(image)
            after = total(tracker.get_tracker_snapshot('current'))
            torch.autograd.backward(maps, [torch.ones_like(x) for x in maps])
        return tracker.get_tracker_snapshot('peak'), after


def total(snapshot: dict[Any, dict[str, int]]) -> int:
    """Sum over devices."""
    return sum(int(kinds['Total']) for kinds in snapshot.values())


def measured(row: Row, dtype: str, batch: int) -> int | None:
    """Peak bytes of CUDA's allocator in a step, None where the GPU has too little."""

    def run() -> int:
        model = build(row, 'triton' if row['attention'] == 'fused' else 'reference').cuda()
        image = torch.randn(batch, 3, *row['image'], device='cuda')

        def one() -> None:
            with torch.autocast('cuda', torch.bfloat16, enabled=dtype == 'bf16'):
                maps = model(image)
            torch.autograd.backward(maps, [torch.ones_like(x) for x in maps])
            model.zero_grad(set_to_none=True)

        one()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        one()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    torch.cuda.empty_cache()
    return measure.out_of_memory_as_none(run)


def rows_of(args: argparse.Namespace) -> Iterator[Row]:
    """The combinations, with what is computed and measured for each."""
    for arch, (height, width, _), cp, attention in product(args.archs, args.sizes, args.checkpointing, ATTENTION):
        row: Row = {'arch': arch, 'image': [height, width], 'checkpointing': cp, 'attention': attention}
        start = time.perf_counter()
        row['computed'] = computed(row)
        row['measured'] = None
        if torch.cuda.is_available():
            row['measured'] = {
                f'{dtype} B={batch}': measured(row, dtype, batch) for dtype in ('fp32', 'bf16') for batch in (1, 2)
            }
        print(
            f'{arch} {height}x{width} {cp} {attention}: {gib(row["computed"]["peak_bytes"])} GiB computed, '
            f'{row["measured"] or "not measured"} ({time.perf_counter() - start:.0f} s)',
            flush=True,
        )
        yield row


def gib(value: float | None) -> str:
    """Bytes as GiB with two decimals."""
    return 'out of memory' if value is None else f'{value / 2**30:.2f}'


def table(document: dict[str, Any]) -> str:
    """The result as Markdown, one line for each model, size and way of checkpointing."""
    machine = document['machine']
    where = f'{machine["gpu"]}, ' if 'gpu' in machine else 'no GPU: nothing measured; '
    lines = [
        f'Peak of forward and backward of the backbone, GiB ({where}torch {machine["torch"]}, {machine["date"][:10]}).',
        '"Fused, eager": with the fused attention op, and with its formula as separate operators.',
        '',
        '| arch | image | checkpointing | computed, fp32, B=1: fused, eager | computed, B=2 '
        '| measured, fp32, B=1, 2 | measured, bf16, B=1, 2 |',
        '| --- ' * 7 + '|',
    ]
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in document['rows']:
        key = row['arch'], ' x '.join(map(str, row['image'])), row['checkpointing']
        groups.setdefault(key, {})[row['attention']] = row
    for key, rows in groups.items():
        pair = [rows[name] for name in ATTENTION if name in rows]
        peaks = [row['computed']['peak_bytes'] for row in pair]
        # Activations are proportional to the batch, parameters and their gradients are not.
        double = [row['computed']['peak_bytes'] + row['computed']['peak_bytes_of_the_batch'] for row in pair]
        cells = [', '.join(map(gib, peaks)), ', '.join(map(gib, double))]
        for dtype in ('fp32', 'bf16'):
            if any(row['measured'] is None for row in pair):
                cells.append('not run')
                continue
            cells.append(
                '; '.join(', '.join(gib(row['measured'][f'{dtype} B={batch}']) for row in pair) for batch in (1, 2))
            )
        lines.append('| ' + ' | '.join([*key, *cells]) + ' |')
    return '\n'.join(lines)


def main() -> int:
    """Compute, measure where there is a GPU, and save; or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--archs', nargs='+', default=['tiny', 'base'], choices=['nano', 'tiny', 'small', 'base'])
    parser.add_argument('--sizes', type=size, nargs='+', default=SIZES, metavar='HxWxB', help='B is not used')
    parser.add_argument('--checkpointing', nargs='+', default=list(CHECKPOINTING), choices=list(CHECKPOINTING))
    parser.add_argument('--out', type=Path, default=measure.RESULTS / 'memory.json')
    parser.add_argument('--docs', action='store_true', help='write the table of --out into docs/large_images.md')
    args = parser.parse_args()
    if args.docs:
        text = table(json.loads(args.out.read_text(encoding='utf-8')))
        measure.write_docs(text, 'benchmarks/memory.py', measure.ROOT / 'docs' / 'large_images.md')
        return 0
    rows: list[Row] = []
    machine = measure.machine() if torch.cuda.is_available() else cpu_machine()
    document = {'benchmark': 'memory', 'machine': machine, 'rows': rows}
    for row in rows_of(args):
        rows.append(row)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(document, indent=1) + '\n', encoding='utf-8')  # a long run keeps what it has
    print(table(document))
    return 0


if __name__ == '__main__':
    sys.exit(main())
