"""Test a detector or segmentor."""

import argparse
from collections.abc import Sequence

from mila_mm import cli


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    cli.add_config(parser)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='weights of that model')
    cli.add_run_arguments(parser)
    parser.add_argument(
        '--out',
        metavar='PATH',
        help='write the predictions to PATH, which ends with .pkl (a segmentor: or is a folder, for PNG)',
    )
    parser.add_argument('--show', action='store_true', help='open a window for each image')
    parser.add_argument('--show-dir', metavar='DIR', help='write a picture of the predictions on each image into DIR')
    parser.add_argument('--wait-time', type=float, default=2.0, help='seconds that a window of --show stays [2]')
    parser.add_argument('--tta', action='store_true', help="test with the config's tta_model and tta_pipeline")
    parser.add_argument('--no-check', action='store_true', help='start without checking config and data')


def main(argv: Sequence[str] | None = None) -> None:
    """Test as the command line says."""
    args = cli.parse(add_arguments, argv, description='Test a detector (mmdet) or a segmentor (mmseg).')
    cli.export_local_rank(args)
    cli.look_first(args, 'test')
    from mila_mm.engine import test
    from mila_mm.engine.config.environment import name_ranks
    from mila_mm.engine.screen import quiet

    with quiet(args.verbose):
        name_ranks(args.launcher)
        cli.job.join()
        test(
            args.config,
            args.checkpoint,
            work_dir=args.work_dir,
            out=args.out,
            show=args.show,
            show_dir=args.show_dir,
            wait_time=args.wait_time,
            tta=args.tta,
            launcher=args.launcher,
            check=not args.no_check,
            cfg_options=args.cfg_options,
        )
