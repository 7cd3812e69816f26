"""Draw batches as the model sees them, with boxes, masks and label maps."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from mila_mm import cli
from mila_mm.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    cli.add_config(parser)
    cli.add_cfg_options(parser)
    cli.add_verbose(parser)
    parser.add_argument('--split', choices=['train', 'val', 'test'], default='train', help='what to draw from [train]')
    parser.add_argument('--number', type=int, default=8, metavar='N', help='samples to draw [8]')
    parser.add_argument('--out', type=Path, default=Path('browse'), metavar='DIR', help='folder for the PNGs [browse]')
    parser.add_argument('--show', action='store_true', help='open a window for each instead')


def main(argv: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    args = cli.parse(add_arguments, argv, description='Draw batches as the model sees them.')
    if args.number < 1:
        raise UserError(f'--number: expected a number of samples above 0, got {args.number}')
    if args.show and not (os.environ.get('DISPLAY') or os.environ.get('WAYLAND_DISPLAY')) and os.name == 'posix':
        raise UserError('--show needs a display, and DISPLAY is not set; without it the pictures go to --out')
    from mila_mm.engine.config.checks import check_data, check_work_dir
    from mila_mm.engine.config.load import load_config
    from mila_mm.engine.data.browse import browse
    from mila_mm.engine.screen import quiet

    with quiet(args.verbose):
        cfg = load_config(args.config, args.cfg_options)
        check_data(cfg, [args.split])
        if not args.show:
            check_work_dir(args.out, '--out')
        written = browse(cfg, args.split, args.number, None if args.show else args.out, args.show)
    if written:
        print(f'{len(written)} pictures in {args.out}')
