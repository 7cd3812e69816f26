#!/usr/bin/env python
"""Count multiply-adds and parameters of a detector or segmentor: ``tools/analysis_tools/get_flops.py CONFIG``."""

import json
import sys
from collections.abc import Sequence

import mila_mm  # noqa: F401  installs the stand-in for mmcv._ext before anything imports mmcv
from mila_mm import cli


def parse_args(argv: Sequence[str] | None) -> cli.argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(
        description='Count the multiply-adds and parameters of a whole detector or segmentor, without data or weights.'
    )
    parser.add_argument('config', metavar='CONFIG', help='config file, or mmdet::FOLDER/FILE, mmseg::FOLDER/FILE')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='SIDE',
        help='height and width in pixels, or one side of a square [800 1280 for detectors, 512 2048 for segmentors]',
    )
    parser.add_argument('--device', default='cpu', help='where to run the forward pass [cpu]')
    parser.add_argument('--json', action='store_true', help='print one JSON object instead of a table')
    cli.add_cfg_options(parser)
    args = parser.parse_args(argv)
    if args.shape is not None and len(args.shape) > 2:
        parser.error(f'--shape: expected one or two numbers, got {len(args.shape)}')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Count and print."""
    args = parse_args(argv)
    from mila_mm.engine.complexity import count_complexity
    from mila_mm.engine.config.load import load_config

    shape = None if args.shape is None else (args.shape[0], args.shape[-1])
    result = count_complexity(load_config(args.config, args.cfg_options), shape, args.device)
    if args.json:
        record = {'config': args.config, 'input_shape': result.input_shape, 'padded_shape': result.padded_shape}
        record |= {'macs': result.macs, 'flops': result.flops, 'params': result.params}
        print(json.dumps(record | {'parts': {name: list(counts) for name, counts in result.parts.items()}}))
        return
    height, width = result.input_shape
    padded = ' x '.join(map(str, result.padded_shape))
    padding = '' if result.padded_shape == result.input_shape else f', padded to {padded}'
    line = '=' * 64
    print(line)
    print(f'Config: {args.config}')
    print(f'Input:  {height} x {width} (height x width){padding}, random, batch 1')
    print(f'{"":<20}{"MACs":>12}{"params":>12}')
    for name, (macs, params) in result.parts.items():
        note = '  (training only)' if name in result.training_only else ''
        print(f'  {name:<18}{macs / 1e9:>10.1f} G{params / 1e6:>10.2f} M{note}')
    print(line)
    print(f'MACs:   {result.macs / 1e9:.1f} G  (multiply-adds: what papers call "FLOPs")')
    print(f'FLOPs:  {result.flops / 1e9:.1f} G  (2 per multiply-add)')
    print(f'Params: {result.params / 1e6:.2f} M')
    print(line)


if __name__ == '__main__':
    sys.exit(cli.execute(main))
