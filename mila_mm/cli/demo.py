"""Train, test and draw a small model on a generated set of shapes."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mila_mm import cli, zoo
from mila_mm.errors import UserError

CONFIGS = {'det': 'demo/mask_rcnn_mila_nano_shapes', 'seg': 'demo/upernet_mila_nano_shapes'}
# Key in the metrics to the name in the figures and the last lines
METRICS = {
    'det': {
        'coco/bbox_mAP_50': 'box AP50',
        'coco/segm_mAP_50': 'mask AP50',
        'coco/bbox_mAP': 'box AP',
        'coco/segm_mAP': 'mask AP',
    },
    'seg': {'mIoU': 'mIoU (%)', 'mAcc': 'mean accuracy (%)', 'aAcc': 'pixel accuracy (%)'},
}
TITLES = {'det': 'Mask R-CNN with MILA nano', 'seg': 'UperNet with MILA nano'}
SAMPLES_DRAWN = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument(
        'task', nargs='?', choices=sorted(CONFIGS), default='det', help='det: Mask R-CNN; seg: UperNet [det]'
    )
    parser.add_argument('--work-dir', metavar='DIR', help='folder for all that is written [./work_dirs/demo_TASK]')
    parser.add_argument('--data-root', metavar='DIR', help='folder of the shapes set, written if need be [data/shapes]')
    parser.add_argument('--data-only', action='store_true', help='write the shapes set and stop')
    cli.add_cfg_options(parser)
    cli.add_verbose(parser)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the demo."""
    args = cli.parse(
        add_arguments,
        argv,
        description='Write the shapes set, train a small detector (det) or segmentor (seg) with MILA nano on it, '
        'test it on held-out images and draw what came out. Needs no data, no weights and no GPU.',
    )
    # Threads that wait asleep instead of spinning: nothing is lost where the machine is idle, and where another
    # process takes one of two cores, training stays several times faster. Read when torch is loaded.
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    from mila_mm.engine.screen import quiet

    with quiet(args.verbose):
        run_demo(args)


def run_demo(args: argparse.Namespace) -> None:
    """Write the data, train, test and draw.

    Raises:
        UserError: If the data set cannot be made as asked for.
    """
    start = time.perf_counter()
    from mila_mm.datasets import write_shapes
    from mila_mm.engine import load_config, test, train

    config = str(zoo.require_config(CONFIGS[args.task]))
    cfg = load_config(config, args.cfg_options)
    try:
        root = write_shapes(args.data_root or cfg.data_root, **cfg.shapes)
    except ValueError as error:
        raise UserError(f'--cfg-options shapes: {error}') from error
    print(f'shapes set: {root} ({cfg.shapes.num_train} training images, {cfg.shapes.num_val} held out)', flush=True)
    if args.data_only:
        return
    work_dir = Path(args.work_dir or f'work_dirs/demo_{args.task}')
    options = [*at_root(cfg, root), *args.cfg_options]
    runner = train(config, work_dir=str(work_dir), cfg_options=options)
    trained = time.perf_counter()
    checkpoint = (work_dir / 'last_checkpoint').read_text().strip()
    dump = work_dir / 'predictions.pkl'
    metrics = test(config, checkpoint, work_dir=str(work_dir), out=str(dump), cfg_options=options)
    pictures = draw(args.task, cfg, root, work_dir, Path(runner.log_dir), metrics)
    print(f'\n{TITLES[args.task]}, {cfg.shapes.num_val} held-out images:')
    for key, name in METRICS[args.task].items():
        print(f'  {name:<20}{metrics[key]:.3f}')
    print(f'took {time.perf_counter() - start:.0f} s, {trained - start:.0f} s of it until the end of the training')
    for name, path in {**pictures, 'checkpoint': checkpoint, 'log': runner.log_dir}.items():
        print(f'  {name:<20}{path}')


def at_root(cfg: Any, root: Path) -> list[str]:
    """Return the overrides that let a config read the shapes set from another folder.

    Args:
        cfg: The demo's config.
        root: Folder of the set.

    Returns:
        Overrides as ``key.of.entry=value``.
    """
    stages = ('train', 'val', 'test')
    options = [f'{stage}_dataloader.dataset.data_root={root}' for stage in stages]
    if 'ann_file' in cfg.test_evaluator:
        ann_file = root / cfg.test_dataloader.dataset.ann_file
        options += [f'{stage}_evaluator.ann_file={ann_file}' for stage in stages[1:]]
    return options


def draw(task: str, cfg: Any, root: Path, work_dir: Path, log_dir: Path, metrics: dict[str, float]) -> dict[str, Path]:
    """Draw predictions on held-out images, and the curves of the training.

    Args:
        task: 'det' or 'seg'.
        cfg: The demo's config.
        root: Folder of the shapes set.
        work_dir: Folder to write to; holds predictions.pkl.
        log_dir: Folder of the training's log.
        metrics: Metrics on the held-out images.

    Returns:
        The pictures' names and files.
    """
    from mila_mm import visualization

    metainfo = cfg.test_dataloader.dataset.metainfo
    dump = work_dir / 'predictions.pkl'
    if task == 'det':
        ann_file = root / cfg.test_dataloader.dataset.ann_file
        samples = visualization.read_detections(dump, ann_file, SAMPLES_DRAWN)
    else:
        samples = visualization.read_segmentations(dump, SAMPLES_DRAWN, num_drawn=len(metainfo.classes) - 1)
    paths = {'predictions': work_dir / 'predictions.png', 'curves': work_dir / 'curves.png'}
    figures = ', '.join(f'{name} {metrics[key]:.3g}' for key, name in list(METRICS[task].items())[:2])
    visualization.save_predictions(
        samples, metainfo.classes, metainfo.palette, paths['predictions'],
        title=f'{TITLES[task]} on held-out images: {figures}',
    )  # fmt: skip
    training, validation = visualization.read_scalars(log_dir / 'vis_data' / 'scalars.json')
    visualization.save_curves(training, validation, METRICS[task], paths['curves'], title=TITLES[task])
    return paths
