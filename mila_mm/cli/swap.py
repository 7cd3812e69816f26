"""Put MILA in place of the backbone of a config."""

import argparse
from collections.abc import Sequence

from mila_mm import cli


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    cli.add_config(parser)
    parser.add_argument('--arch', default='tiny', help='tiny, small, base, or nano for tests [tiny]')
    parser.add_argument('--out', metavar='FILE', required=True, help='config to write, a .py file')
    parser.add_argument(
        '--weights', metavar='WEIGHTS', help='weights to start from: mila://tiny-in1k (small, base) or a file'
    )
    parser.add_argument(
        '--recipe',
        choices=['keep', 'mila'],
        default='keep',
        help="keep the optimizer, or put MILA's AdamW recipe in place of SGD [keep]",
    )
    parser.add_argument(
        '--drop-path-rate',
        type=float,
        metavar='RATE',
        help="stochastic depth [the old backbone's, or that of MILA's recipes]",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Swap as the command line says."""
    args = cli.parse(
        add_arguments,
        argv,
        description='Put MILA in place of the backbone of a detector (mmdet) or a segmentor (mmseg), and rewire what '
        'reads its maps. Writes a short config that inherits from CONFIG.',
    )
    from mila_mm.swap import check_out, plan_swap, report, write_child

    check_out(args.out, args.config)  # a swap takes up to a minute
    result = plan_swap(args.config, args.arch, args.weights, args.recipe, args.drop_path_rate)
    write_child(result, args.out)
    print(f'{report(result)}\nwritten: {args.out}')
