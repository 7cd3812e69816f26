"""Test a checkpoint and show where it errs: by class, size and kind, with the worst images."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from mila_mm import cli
from mila_mm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    cli.add_config(parser)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='weights of that model')
    cli.add_cfg_options(parser)
    cli.add_verbose(parser)
    parser.add_argument(
        '--out', type=Path, default=Path('analysis'), metavar='DIR', help='folder to write to [analysis]'
    )
    parser.add_argument('--worst', type=int, default=20, metavar='N', help='images to draw, the worst first [20]')
    parser.add_argument('--score-thr', type=float, default=0.3, metavar='S', help='score that a detection needs [0.3]')


def main(argv: Sequence[str] | None = None) -> None:
    """Analyse as the command line says."""
    args = cli.parse(add_arguments, argv, description='Test a checkpoint and show where it errs.')
    if args.worst < 0:
        raise UserError(f'--worst: expected a number of images, got {args.worst}')
    if not 0 <= args.score_thr <= 1:
        raise UserError(f'--score-thr: expected a score from 0 to 1, got {args.score_thr}')
    from mila_mm.engine.analysis.report import analyze, occurring
    from mila_mm.engine.screen import quiet

    with quiet(args.verbose):
        result = analyze(
            args.config,
            args.checkpoint,
            args.out,
            worst=args.worst,
            score_thr=args.score_thr,
            cfg_options=args.cfg_options,
        )
    for name, table in result.items():
        if name != 'metrics':
            print(f'\n{name}')
            shown = occurring(table)
            for row, values in shown.items():
                print(f'  {row}: {", ".join(f"{key} {_number(value)}" for key, value in values.items())}')
            if len(shown) < len(table):
                print(f'  ({len(table) - len(shown)} of {len(table)} do not occur)')
    print(f'\n{args.out / "index.html"} shows all of it')


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return '-' if math.isnan(value) else f'{value:.3f}'
