"""Predict on a picture, a folder, a video or a camera."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from mila_mm import cli
from mila_mm.errors import UserError

if TYPE_CHECKING:
    from mila_mm.engine.inference.predict import Summary
    from mila_mm.engine.inference.sources import Picture, Source

_SHOWN = 10
_KILLED = 128  # and the number of the signal, as shells say it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    cli.add_config(parser)
    parser.add_argument(
        'checkpoint',
        metavar='CHECKPOINT',
        help='weights of that model: a file, mask-rcnn-tiny-3x or another published name',
    )
    parser.add_argument(
        'source',
        metavar='SOURCE',
        help="picture, folder, 'pattern/**/*.jpg', video, number of a camera, or address of a stream",
    )
    parser.add_argument('--out', metavar='DIR', default='predictions', help='folder to write to [predictions]')
    parser.add_argument('--no-pictures', action='store_true', help='draw nothing')
    parser.add_argument('--json', action='store_true', help="write DIR/predictions.json in COCO's layout")
    parser.add_argument(
        '--masks',
        action='store_true',
        help='write label maps as PNG into DIR/masks: classes, numbers of instances, or panoptic ids',
    )
    parser.add_argument(
        '--score-thr', type=float, default=0.3, metavar='S', help='leave out boxes and instances of lower scores [0.3]'
    )
    parser.add_argument('--batch', type=int, default=1, metavar='N', help='images that the model takes at once [1]')
    parser.add_argument('--device', help='cuda, cuda:1, cpu, ... [the GPU where there is one]')
    parser.add_argument('--limit', type=int, metavar='N', help='stop after N images')
    cli.add_cfg_options(parser)


def main(argv: Sequence[str] | None = None) -> None:
    """Predict as the command line says.

    Raises:
        UserError: If something could not be read; what could is written.
    """
    args = cli.parse(
        add_arguments,
        argv,
        description='Predict with a detector, an instance, panoptic or semantic segmentor, and draw what it finds.',
    )
    from mila_mm.engine.inference.predict import predict
    from mila_mm.engine.screen import quiet

    with quiet():
        summary = predict(
            args.config,
            args.checkpoint,
            args.source,
            out=args.out,
            pictures=not args.no_pictures,
            write_json=args.json,
            masks=args.masks,
            score_thr=args.score_thr,
            batch=args.batch,
            device=args.device,
            limit=args.limit,
            cfg_options=args.cfg_options,
            progress=show_progress,
        )
    print(described(summary))
    if summary.interrupted:
        unread = f'{_unread(summary)}\n' if summary.failures else ''
        sys.stderr.write(f'{unread}interrupted; what came before is written\n')
        sys.exit(_KILLED + summary.signum)
    if summary.failures:
        raise UserError(_unread(summary))


def _unread(summary: 'Summary') -> str:
    """Say which images could not be read."""
    lines = summary.failures[:_SHOWN]
    if len(summary.failures) == 1:
        return f'{lines[0]}; the rest is written'
    if len(summary.failures) > _SHOWN:
        lines.append(f'and {len(summary.failures) - _SHOWN} more')
    total = summary.images + len(summary.failures)
    return '\n'.join([f'{len(summary.failures)} of {total} could not be read; the rest is written', *lines])


def show_progress(images: 'Iterable[Picture]', source: 'Source') -> 'Iterable[Picture]':
    """Show how many images have come, how fast, and how long it will take."""
    from tqdm import tqdm

    unit = 'image' if source.fps is None else 'frame'
    return tqdm(
        images, total=source.total, unit=unit, dynamic_ncols=True, disable=None if source.fps is None else False
    )


def described(summary: 'Summary') -> str:
    """Return the last lines of a run."""
    count = f'{summary.images} image{"" if summary.images == 1 else "s"}'
    rate = summary.images / summary.seconds if summary.seconds else 0.0
    alone = f', {1000 * summary.model_seconds / summary.images:.0f} ms an image in the model' if summary.images else ''
    found = f', {summary.found} found' if summary.found else ''
    lines = [f'{count} in {summary.seconds:.1f} s ({rate:.2f} images/s{alone}){found}']
    return '\n'.join([*lines, *(f'  {line}' for line in summary.written)])
