"""Write a trained model as a file that runs without mmdet, mmseg or mila_mm."""

import argparse
from collections.abc import Sequence

from mila_mm import cli


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    cli.add_config(parser)
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='weights of that model')
    parser.add_argument(
        '--format', choices=['onnx', 'pt2', 'aoti', 'torchscript', 'openvino'], default='onnx', help='format [onnx]'
    )
    parser.add_argument('--size', type=int, nargs=2, required=True, metavar=('H', 'W'), help='size of the images')
    parser.add_argument('--dynamic', action='store_true', help='take any multiples of 32 as height and width')
    parser.add_argument('--batch', type=int, default=1, metavar='N', help='images of one call [1]')
    parser.add_argument('--precision', choices=['fp32', 'fp16'], default='fp32', help='of the network [fp32]')
    parser.add_argument(
        '--masks',
        choices=['box', 'image'],
        default='box',
        help='masks as 28 x 28 probabilities over each box, or pasted into the image [box]',
    )
    parser.add_argument('--logits', action='store_true', help='a segmentor returns its logits as well')
    parser.add_argument('--out', metavar='FILE', help="file to write [the config's name and the format's suffix]")
    parser.add_argument(
        '--images',
        nargs='+',
        action='extend',
        default=[],
        metavar='PATH',
        help="images or folders to compare on [the config's test set if it is here, else drawn ones]",
    )
    cli.add_cfg_options(parser)


def main(argv: Sequence[str] | None = None) -> None:
    """Export as the command line says."""
    args = cli.parse(
        add_arguments,
        argv,
        description='Write a trained detector, segmentor or classifier as one file, run it and compare it with the '
        'model. Where they differ no file is left.',
    )
    from mila_mm.export import export_model

    exported = export_model(
        args.config,
        args.checkpoint,
        format=args.format,
        size=tuple(args.size),
        dynamic=args.dynamic,
        batch=args.batch,
        precision=args.precision,
        masks=args.masks,
        logits=args.logits,
        out=args.out,
        images=args.images,
        cfg_options=args.cfg_options,
    )
    at = ', '.join(f'{height} x {width}' for height, width in exported.shapes)
    print(f'{exported.path}: {exported.bytes / 1e6:.1f} MB, {exported.kind}')
    if exported.operators:
        most = ', '.join(f'{name} {count}' for name, count in list(exported.operators.items())[:8])
        print(f'operators: {sum(exported.operators.values())} of {len(exported.operators)} kinds: {most}, ...')
    if exported.smallest is not None:
        print(f'takes images whose sides are multiples of 32, from {exported.smallest} on')
    print(f'compared with the model at {at} on {exported.images}: {exported.comparison.summary(exported.kind)}')
    file, model = (1000 * seconds / args.batch for seconds in exported.seconds)
    print(f'one image: {file:.0f} ms, PyTorch {model:.0f} ms (medians of 5 on this CPU)')
    for note in exported.notes:
        print(f'note: {note}')
