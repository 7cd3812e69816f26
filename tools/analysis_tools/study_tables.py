#!/usr/bin/env python
"""Print the study's tables and write them, with their plots, to the docs: ``tools/analysis_tools/study_tables.py``.

Parameters and MACs are counted anew each time. Throughput is timed with ``--measure`` and kept in a JSON file that
later calls read. Published figures come from ``benchmarks/published.yml``.
"""

import datetime
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mila_mm  # noqa: F401  installs the stand-in for mmcv._ext before anything imports mmcv
from mila_mm import cli
from mila_mm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def parse_args(argv: Sequence[str] | None) -> cli.argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(description='Print and write the tables and the plots of the study.')
    parser.add_argument('--measure', action='store_true', help='time every row, some minutes on a quiet machine')
    parser.add_argument('--rounds', type=int, default=9, help='timed runs of each row with --measure [9]')
    parser.add_argument('--batch', type=int, default=4, help='images of 224 x 224 in a run [4]')
    parser.add_argument('--threads', type=int, default=2, help='CPU threads [2]')
    parser.add_argument('--device', default='cpu', help='where to time [cpu]')
    parser.add_argument(
        '--results',
        type=Path,
        default=ROOT / 'benchmarks' / 'results' / 'study_throughput.json',
        metavar='JSON',
        help='the timings, written with --measure and else read [%(default)s]',
    )
    parser.add_argument(
        '--published',
        type=Path,
        default=ROOT / 'benchmarks' / 'published.yml',
        metavar='YML',
        help='published figures with their sources [%(default)s]',
    )
    parser.add_argument(
        '--doc',
        type=Path,
        default=ROOT / 'docs' / 'study.md',
        metavar='MD',
        help='page whose generated parts are replaced [%(default)s]',
    )
    parser.add_argument(
        '--images',
        type=Path,
        default=ROOT / 'docs' / 'images',
        metavar='FOLDER',
        help='where the plots go [%(default)s]',
    )
    args = parser.parse_args(argv)
    if args.rounds < 2 or args.batch < 1 or args.threads < 1:
        parser.error('--rounds, --batch, --threads: expected at least 2, 1 and 1')
    return args


def measure(args: cli.argparse.Namespace, rows: Sequence[str]) -> dict[str, Any]:
    """Time the rows and write the result.

    Args:
        rows: Keys of the rows, the baseline first.

    Returns:
        The document that is written.
    """
    import torch

    from mila_mm.study.report import classifier
    from mila_mm.study.throughput import relative_throughput

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    images = torch.randn(args.batch, 3, 224, 224, device=device)
    models = {row: classifier(row).to(device) for row in rows}
    machine = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{_cpu()}, {args.threads} threads'
    document = {
        'machine': machine,
        'torch': torch.__version__,
        'date': datetime.date.today().isoformat(),
        'batch': args.batch,
        'rounds': args.rounds,
        'size': 224,
        'rows': relative_throughput(models, images, args.rounds),
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(document, indent=1) + '\n', encoding='utf-8')
    return document


def _cpu() -> str:
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def replace_part(text: str, name: str, content: str, where: Path) -> str:
    """Replace what stands between the marks of a generated part.

    Args:
        text: A Markdown page.
        name: Name of the part.
        content: What is to stand there.
        where: Path of the page, for the message.

    Returns:
        The page.

    Raises:
        UserError: If the page has not both marks.
    """
    begin, end = f'<!-- begin {name} (generated) -->', f'<!-- end {name} -->'
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f'{where}: expected the marks {begin} and {end} around what this tool writes, found not both')
    return f'{before}{begin}\n{content}\n{end}{after}'


def main(argv: Sequence[str] | None = None) -> None:
    """Count, time if asked to, print and write."""
    args = parse_args(argv)
    from mila_mm.study.figures.plots import save_plots
    from mila_mm.study.published import read_published
    from mila_mm.study.report import ablation_table, check_order, count_costs, mask_rcnn_table, upernet_table

    published = read_published(args.published)
    tables = {name: published.tables[name].rows for name in ('designs', 'encodings')}
    rows = list(dict.fromkeys(row['row'] for table in tables.values() for row in table))
    if args.measure:
        measured = measure(args, rows)
    elif args.results.is_file():
        measured = json.loads(args.results.read_text(encoding='utf-8'))
    else:
        raise UserError(f'{args.results}: expected timings, found none; add --measure to time the rows')
    if not args.doc.is_file():
        raise UserError(f'{args.doc}: expected a page to write into, found none')
    costs = count_costs(rows)
    conditions = (
        f'Measured on: {measured["machine"]}; torch {measured["torch"]}, {measured["date"]}; inference in '
        f'fp32, batch {measured["batch"]}, {measured["rounds"]} rounds in turn.'
    )
    order = '\n'.join(f'- {line}' for line in check_order(measured['rows']))
    parts = {
        'designs': ablation_table(tables['designs'], costs, measured['rows']),
        'encodings': ablation_table(tables['encodings'], costs, measured['rows']),
        'order': f'{conditions}\n\n{order}',
        'mask_rcnn': mask_rcnn_table(published),
        'upernet': upernet_table(published),
    }
    page = args.doc.read_text(encoding='utf-8')
    for name, content in parts.items():
        print(f'{name}\n\n{content}\n')
        page = replace_part(page, name, content, args.doc)
    args.doc.write_text(page, encoding='utf-8')
    print(f'wrote {args.doc}')
    for path in save_plots(published, args.images):
        print(f'wrote {path}')


if __name__ == '__main__':
    sys.exit(cli.execute(main))
