#!/usr/bin/env python
"""Train every row of the study small, on the shapes set, and write the table: ``replicate_study.py``."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import mila_mm  # noqa: F401  installs the stand-in for mmcv._ext before anything imports mmcv
from mila_mm import cli

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs' / 'demo' / 'study_nano_shapes.py'


def parse_args(argv: Sequence[str] | None) -> cli.argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(
        description='Train every row of the study at nano width on the shapes set, all with the same budget, then '
        'write results (JSON) and a table (Markdown). Runs that are done already are not repeated.'
    )
    parser.add_argument('--rows', nargs='+', metavar='ROW', help='train these rows only [all]')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], metavar='SEED', help='seeds of each row [0]')
    parser.add_argument('--iters', type=int, metavar='N', help="steps of each run [the config's]")
    parser.add_argument('--config', default=str(CONFIG), metavar='CONFIG', help='what all rows share [%(default)s]')
    parser.add_argument('--work-dir', default='work_dirs/study', metavar='DIR', help='folder of the runs [%(default)s]')
    parser.add_argument('--data-root', metavar='DIR', help="folder of the shapes set [the config's]")
    parser.add_argument('--part', default='1/1', metavar='K/N', help='do the K-th of N shares, for N processes at once')
    parser.add_argument('--report-only', action='store_true', help='train nothing, write what the work dir holds')
    parser.add_argument('--json', metavar='FILE', help='where to write all results [WORK_DIR/study_replication.json]')
    parser.add_argument('--markdown', metavar='FILE', help='where to write the table [WORK_DIR/study_replication.md]')
    args = parser.parse_args(argv)
    share, slash, shares = args.part.partition('/')
    if not slash or not share.isdigit() or not shares.isdigit() or not 1 <= int(share) <= int(shares):
        parser.error(f'--part: expected K/N with 1 <= K <= N, got {args.part}')
    if args.iters is not None and args.iters < 2:
        parser.error(f'--iters: expected at least 2, got {args.iters}')
    args.share = int(share), int(shares)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing and report."""
    args = parse_args(argv)
    # Threads that wait asleep: a busy machine loses a factor otherwise. Read when torch is loaded.
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    from mila_mm.study.model import STUDY_ROWS
    from mila_mm.study.replication import RESULT, Plan, read_result, run_row
    from mila_mm.study.replication_report import PUBLISHED, check_rows, markdown

    wanted = check_rows(args.rows, STUDY_ROWS)
    work_dir = Path(args.work_dir)
    plan = Plan(args.config, work_dir, Path(args.data_root) if args.data_root else None, args.iters)
    share, shares = args.share
    # All rows with one seed before the next seed: what is interrupted compares all rows.
    runs = [] if args.report_only else [(row, seed) for seed in args.seeds for row in wanted]
    for row, seed in runs[share - 1 :: shares]:
        result = run_row(plan, row, STUDY_ROWS[row], seed)
        print(f'{row:<18} seed {seed}  mIoU {result["metrics"]["mIoU"]:.2f}  {result["seconds"]:.0f} s', flush=True)
    paths = [work_dir / f'{row}_seed{seed}' / RESULT for row in STUDY_ROWS for seed in args.seeds]
    results = [result for result in map(read_result, paths) if result is not None]
    written = {
        Path(args.json or work_dir / 'study_replication.json'): json.dumps(results, indent=1) + '\n',
        Path(args.markdown or work_dir / 'study_replication.md'): markdown(results),
    }
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')
        print(path)
    missing = [row for row in PUBLISHED if not any(r['row'] == row for r in results)]
    if missing:
        print(f'not trained yet: {", ".join(missing)}')


if __name__ == '__main__':
    sys.exit(cli.execute(main))
