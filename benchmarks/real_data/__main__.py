"""MILA beside ResNet, Swin and ConvNeXt of the same cost, from random weights, on three sets of real images.

    python -m benchmarks.real_data                       # what is missing in benchmarks/results/real_data.json
    python -m benchmarks.real_data --minutes 60          # begin no run after an hour; the same command goes on
    python -m benchmarks.real_data --sets nuclei --backbones MILA --schedules try short
    python -m benchmarks.real_data --quick               # ten images of each set, two steps: that everything runs
    python -m benchmarks.real_data --gpu                 # MILA-T, ResNet-50, Swin-T, ConvNeXt-T on a CUDA machine
    python -m benchmarks.real_data --docs                # table, text and plots in docs/ from the result

Nuclei: Mask R-CNN. Blood cells (bccd): RetinaNet with MILA put in by ``mila_mm.swap_backbone``. CamVid: UperNet. For
each set and backbone three learning rates are tried in a short run, and the one with the lowest training loss over
its last quarter is taken; held-out images have no part in that. Every backbone sees the same images in the same order
with the same augmentation, in the same schedule; the result holds a checksum of them.

Each row is trained in a process of its own with one thread and written when it is done: an interruption costs the row
in progress. A second process may run beside: it takes other rows.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')

from benchmarks.real_data import pictures, report  # noqa: E402
from benchmarks.real_data.backbones import LABELS, NAMES  # noqa: E402
from benchmarks.real_data.results import Results, claimed  # noqa: E402
from benchmarks.real_data.tasks import LONG, SHORT, TASKS, Row, planned  # noqa: E402


def describe(row: Row) -> str:
    """A row in a few words."""
    rate = '' if row['lr'] is None else f', lr {row["lr"]:g}'
    name = LABELS[row['size']][row['backbone']]
    return f'{row["set"]}: {name}, {row["schedule"]} of {row["steps"]} steps{rate}, seed {row["seed"]}'


def outcome(row: Row) -> str:
    """What came of a row, in a line."""
    if row['diverged']:
        return 'diverged'
    if row['final'] is None:
        return f'loss {row["loss_at_end"]:.3f} at the end'
    metric = TASKS[row['size']][row['set']].metric
    return f'{metric} {row["final"][metric]:.3f} on the held-out images'


def train_missing(args: argparse.Namespace, results: Results, rows: list[Row]) -> None:
    """Train the rows that are not there, one after the other, each in a fresh process."""
    context = get_context('forkserver')
    context.set_forkserver_preload(['benchmarks.real_data.training', 'mmdet.models', 'mmseg.models', 'mila_mm.engine'])
    command = shlex.join(['python', '-m', 'benchmarks.real_data', *sys.argv[1:]])
    start = time.monotonic()
    for planned_row in rows:
        row = results.with_rate(planned_row)
        if row is None or results.has(row):
            continue
        if args.minutes is not None and time.monotonic() - start > 60 * args.minutes:
            print(f'{args.minutes:g} minutes are over; the same command goes on from here')
            return
        folder = pictures.folder_of(row, args.work_dir)
        with claimed(folder) as mine:
            if not mine or results.has(row):
                continue
            print(f'{time.strftime("%H:%M:%S")} {describe(row)}', flush=True)
            from benchmarks.real_data.training import run

            with ProcessPoolExecutor(1, mp_context=context) as pool:
                try:
                    done = pool.submit(run, row, args.data, folder, command).result()
                except BrokenProcessPool:
                    sys.exit(f'{describe(row)}: the process was ended from outside, perhaps for want of memory')
            results.add(done)
        print(
            f'  {outcome(done)}; {done["seconds"]:.0f} s, of these {done["cpu_seconds"]:.0f} s on the CPU', flush=True
        )


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get('MILA_MM_SAMPLE_DATA', ROOT.parent / 'shared' / 'data')
    parser.add_argument(
        '--data', type=Path, default=Path(default), help='folder with nuclei/, bccd/, camvid/ [%(default)s]'
    )
    parser.add_argument('--sets', nargs='+', choices=list(TASKS['narrow']), default=list(TASKS['narrow']))
    parser.add_argument('--backbones', nargs='+', choices=NAMES, default=list(NAMES))
    parser.add_argument('--schedules', nargs='+', choices=['try', SHORT, LONG], default=['try', SHORT, LONG])
    parser.add_argument('--minutes', type=float, help='begin no run after so many')
    parser.add_argument('--scale', type=float, default=1.0, help='factor on the steps of all schedules')
    parser.add_argument('--quick', action='store_true', help='ten images of each set, two steps')
    parser.add_argument('--gpu', action='store_true', help='the sizes for a CUDA machine')
    parser.add_argument('--docs', action='store_true', help='only write docs/real_data.md and its pictures')
    parser.add_argument('--pictures', action='store_true', help='only draw predictions of the longest runs')
    parser.add_argument('--out', type=Path, help='[benchmarks/results/real_data.json; with --quick in the work folder]')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/real_data'))
    args = parser.parse_args(argv)
    args.size = 'tiny' if args.gpu else 'narrow'
    if args.out is None:
        name = 'real_data_gpu.json' if args.gpu else 'real_data.json'
        args.out = args.work_dir / 'quick.json' if args.quick else ROOT / 'benchmarks' / 'results' / name
    if args.quick:
        args.work_dir = args.work_dir / 'quick'
    return args


def main(argv: list[str] | None = None) -> int:
    """Train what is missing, then print the tables; or write the pages."""
    args = parse(argv)
    results = Results(args.out)
    if args.docs:
        report.write_pages(results.rows(), ROOT / 'docs', args.size)
        return 0
    if args.pictures:
        pictures.draw(results.rows(), args.size, args.data, args.work_dir, ROOT / 'docs' / 'images')
        return 0
    missing = [name for name in args.sets if not (args.data / name).is_dir()]
    if missing:
        sys.exit(
            f'{args.data}: expected the folders {", ".join(missing)}; --data names another place, '
            'docs/real_data.md says where the sets come from'
        )
    if args.gpu and not args.quick:
        from benchmarks.measure import require_cuda

        require_cuda()
    chosen = {'set': args.sets, 'backbone': args.backbones, 'schedule': args.schedules}
    rows = [
        row
        for row in planned(args.size, args.quick, args.scale)
        if all(row[key] in names for key, names in chosen.items())
    ]
    train_missing(args, results, rows)
    print(report.tables(results.rows(), args.size))
    return 0


if __name__ == '__main__':
    sys.exit(main())
