"""Check a config and all of its data, and report everything at once."""

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from typing import Any

from mila_mm import cli
from mila_mm.errors import UserError

_DROPPED = {
    'ignore': 'marked "ignore"',
    'outside': 'outside of the image',
    'area': 'area 0',
    'thin': 'under a pixel wide or high',
    'other': 'of no class',
    'small': 'on images below min_size',
}
# Longer lists of classes are told in JSON only.
_FEW = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    cli.add_config(parser)
    cli.add_cfg_options(parser)
    parser.add_argument(
        '--sample', type=int, default=0, metavar='N', help='images and label maps to open in each split, 0 for all [0]'
    )
    parser.add_argument('--json', action='store_true', help='print the report as JSON')


def main(argv: Sequence[str] | None = None) -> None:
    """Check data as the command line says.

    Raises:
        UserError: If an error was found; the report is printed before.
    """
    args = cli.parse(add_arguments, argv, description='Check a config and all of its data; exits with 2 on errors.')
    if args.sample < 0:
        raise UserError(f'--sample: expected a number of images, 0 for all, got {args.sample}')
    from mila_mm.engine.config.load import load_config, refuse_old, scope_of
    from mila_mm.engine.data.check import check_everything

    cfg = load_config(args.config, args.cfg_options)
    scope = scope_of(cfg)
    if scope not in ('mmdet', 'mmseg'):
        raise UserError(f'check-data knows detectors and segmentors; {args.config} is of {scope}')
    stages = _stages(cfg)
    if not stages:
        refuse_old(cfg)
        raise UserError(f'config {args.config} has no data: no train_dataloader, val_dataloader or test_dataloader')
    with redirect_stdout(io.StringIO()):  # pycocotools tells of every file
        report = check_everything(cfg, stages, scope, args.sample)
    if args.json:
        print(json.dumps(report.as_dict(), indent=2, default=str))
    else:
        print('\n'.join(_lines(report)))
    errors = len(report.of('error'))
    if errors:
        raise UserError(f'{errors} error{"s" * (errors > 1)} in config or data of {args.config}')


def _stages(cfg: Any) -> list[str]:
    """Return the stages that have data, a test set that is the validation set counted once."""
    stages = [stage for stage in ('train', 'val', 'test') if cfg.get(f'{stage}_dataloader')]
    same = (
        'val' in stages and 'test' in stages and cfg.val_dataloader.get('dataset') == cfg.test_dataloader.get('dataset')
    )
    return [stage for stage in stages if not (same and stage == 'test')]


def _lines(report: Any) -> Iterator[str]:
    for key, counts in report.counts.items():
        yield f'{key}: {_counted(counts)}'
        told = [f'{number} {_DROPPED[reason]}' for reason, number in (counts.get('dropped') or {}).items()]
        if told:
            yield f'    not used: {", ".join(told)}'
        classes = counts.get('per_class') or counts.get('pixels_per_class') or {}
        if 0 < len(classes) <= _FEW:
            unit = 'boxes' if counts.get('per_class') else 'pixels'
            yield f'    {unit}: {", ".join(f"{name} {number}" for name, number in classes.items())}'
    for level in ('error', 'warning', 'note'):
        for finding in report.of(level):
            yield f'{level}: {finding}'
    yield f'{len(report.of("error"))} errors, {len(report.of("warning"))} warnings'


def _counted(counts: dict[str, Any]) -> str:
    parts = []
    images, loaded = counts.get('images'), counts.get('images_loaded')
    if images is not None:
        parts.append(f'{images} images' if loaded in (None, images) else f'{loaded} of {images} images')
    if 'boxes_loaded' in counts:
        total = counts.get('boxes')
        crowd = f', {counts["crowd"]} crowd' if counts.get('crowd') else ''
        of = '' if total is None or total == counts['boxes_loaded'] else f' of {total}'
        parts.append(f'{counts["boxes_loaded"]}{of} boxes{crowd}')
    if 'label_maps' in counts:
        seen = counts['label_maps_seen']
        parts.append(
            f'{counts["label_maps"]} label maps' + ('' if seen == counts['label_maps'] else f', {seen} opened')
        )
    if counts.get('ignored_pixels') is not None:
        parts.append(f'{100 * counts["ignored_pixels"]:.1f} % of the pixels ignored')
    return ', '.join(parts) or 'nothing to count'
