"""One row: build the model, count it, train it, test it on the held-out images."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import time
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.registry import METRICS
from mmseg.evaluation import IoUMetric

import mila_mm  # noqa: F401 - before anything imports mmcv
from benchmarks import measure
from benchmarks.backbone_cpu import machine as cpu_machine
from benchmarks.real_data import backbones
from benchmarks.real_data.hooks import DivergedError, WatchHook
from benchmarks.real_data.tasks import CONFIGS, QUICK_IMAGES, TASKS, Row, Task

POINTS = 4
"""Points of a curve."""


@METRICS.register_module()
class ClassIoUMetric(IoUMetric):
    """mmseg's metric, which also returns the IoU and the share of pixels of each class, in percent."""

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Mean figures as mmseg's, then ``IoU.CLASS`` and ``share.CLASS``."""
        metrics = super().compute_metrics(results)
        intersection, union, _, label = (sum(areas) for areas in zip(*results, strict=True))
        for index, name in enumerate(self.dataset_meta['classes']):
            metrics[f'IoU.{name}'] = (100 * intersection[index] / union[index]).item()
            metrics[f'share.{name}'] = (100 * label[index] / label.sum()).item()
        return metrics


def model_config(size: str, name: str, backbone: str) -> Config:
    """The config of a set with one of the backbones."""
    from mila_mm.engine.config.load import load_config
    from mila_mm.swap import swap_backbone

    task = TASKS[size][name]
    path = str(CONFIGS / f'{task.config}.py')
    if task.swapped:
        cfg = swap_backbone(path, arch=backbones.MILA_ARCH[size], recipe='keep', drop_path_rate=0.0)
    else:
        cfg = load_config(path)
    backbones.put_backbone(cfg, size, backbone)
    return cfg


def complexity(size: str, name: str, backbone: str) -> dict[str, Any]:
    """Multiply-adds of the whole model on one test image, and its parameters."""
    from mila_mm.engine.complexity import count_complexity

    counted = count_complexity(model_config(size, name, backbone), TASKS[size][name].shape)
    return {'macs': counted.macs, 'params': counted.params, 'macs_shape': list(counted.padded_shape)}


def part_of(ann_file: Path, keep: slice, out: Path) -> str:
    """Write COCO annotations of some of the images; the path of the file."""
    whole = json.loads(ann_file.read_text(encoding='utf-8'))
    images = whole['images'][keep]
    kept = {image['id'] for image in images}
    annotations = [each for each in whole['annotations'] if each['image_id'] in kept]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**whole, 'images': images, 'annotations': annotations}), encoding='utf-8')
    return str(out.resolve())


def place_data(cfg: Config, task: Task, root: Path, folder: Path, quick: bool) -> None:
    """Point loaders and metrics at a set: training and test at all of it, validation, for the curve, at a part.

    Args:
        cfg: Changed.
        root: Folder of the set.
        folder: Where annotations of parts are written.
        quick: Whether to take ten images of each split only.
    """
    parts = {
        'train': slice(QUICK_IMAGES if quick else None),
        'val': slice(3) if quick else slice(None, None, task.curve),
        'test': slice(QUICK_IMAGES if quick else None),
    }
    for stage, keep in parts.items():
        loader = deepcopy(cfg[f'{stage}_dataloader'])  # those of validation and test may be one object
        loader.update(num_workers=0, persistent_workers=False)
        dataset = loader.dataset
        dataset.data_root = str(root)
        if task.detects:
            dataset.ann_file = part_of(root / dataset.ann_file, keep, folder / f'{stage}.json')
        else:
            images = sorted((root / dataset.data_prefix['img_path']).iterdir())
            dataset.indices = list(range(len(images)))[keep]
        cfg[f'{stage}_dataloader'] = loader
        if task.detects and stage != 'train':
            cfg[f'{stage}_evaluator'] = {**cfg[f'{stage}_evaluator'], 'ann_file': dataset.ann_file}
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.train_dataloader.pop('batch_sampler', None)


def schedule(cfg: Config, row: Row, steps: int) -> None:
    """AdamW with a warm-up over a tenth of the steps and a cosine, the same for every backbone and set."""
    from mila_mm.engine.optimizers.amp import use_amp

    warmup = max(1, steps // 10)
    cfg.optim_wrapper = dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=row['lr'], weight_decay=0.05),
        clip_grad=dict(max_norm=10.0),
        paramwise_cfg=dict(norm_decay_mult=0.0, bypass_duplicate=True),
    )
    if torch.cuda.is_available():
        use_amp(cfg, 'bf16')
    cfg.param_scheduler = [dict(type='LinearLR', start_factor=0.01, begin=0, end=warmup, by_epoch=False)]
    if steps > warmup:
        last = dict(type='CosineAnnealingLR', eta_min_ratio=0.01, begin=warmup, end=steps, by_epoch=False)
        cfg.param_scheduler.append(last)
    # The last point of the curve is the test on all held-out images.
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=steps, val_interval=steps if row['quick'] else max(1, steps // POINTS)
    )
    cfg.val_cfg, cfg.test_cfg = dict(type='ValLoop'), dict(type='TestLoop')
    if row['schedule'] == 'try':
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None


def whole_config(row: Row, data: Path, folder: Path) -> Config:
    """All that a run is made from.

    Args:
        row: With its learning rate.
        data: Folder that holds the sets.
        folder: Work folder of the run.
    """
    task = TASKS[row['size']][row['set']]
    cfg = model_config(row['size'], row['set'], row['backbone'])
    place_data(cfg, task, (data / row['set']).resolve(), folder / 'annotations', row['quick'])
    schedule(cfg, row, row['steps'])
    keeps = row['schedule'] != 'try'
    checkpoint = dict(
        type='CheckpointHook', by_epoch=False, interval=10**9, save_last=keeps, save_optimizer=False, max_keep_ckpts=1
    )
    cfg.default_hooks.update(checkpoint=checkpoint, logger=dict(type='LoggerHook', interval=50))
    cfg.default_hooks.pop('visualization', None)
    cfg.log_processor = dict(by_epoch=False)
    cfg.custom_hooks = []
    cfg.randomness = dict(seed=row['seed'])
    cfg.work_dir = str(folder)
    return cfg


def machine() -> dict[str, Any]:
    """Where and with what a row was made."""
    found = measure.machine() if torch.cuda.is_available() else cpu_machine()
    packages = ('onedl-mmengine', 'onedl-mmdetection', 'onedl-mmsegmentation', 'onedl-mmpretrain', 'numpy')
    return found | {
        'commit': measure.commit(),
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
        'load': round(os.getloadavg()[0], 1),
        'versions': {name: version(name) for name in packages},
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
    }


def run(row: Row, data: Path, folder: Path, command: str) -> Row:
    """Train a row in this process, which must be a fresh one for its memory to mean something.

    Args:
        row: With its learning rate.
        data: Folder that holds the sets.
        folder: Work folder of the run.
        command: What was typed, for the record.

    Returns:
        The row with what came out.
    """
    from mila_mm.engine.config.prepare import prepare
    from mila_mm.engine.runner.runner import build_runner
    from mila_mm.engine.screen import quiet

    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '1')))
    counted = complexity(row['size'], row['set'], row['backbone']) if row['schedule'] != 'try' else {}
    cfg = whole_config(row, data, folder)
    settings = {key: cfg[key] for key in ('optim_wrapper', 'param_scheduler', 'train_cfg')}
    config = {
        'file': str((CONFIGS / f'{TASKS[row["size"]][row["set"]].config}.py').relative_to(measure.ROOT)),
        'backbone': cfg.model.backbone.to_dict(),
        'batch_size': cfg.train_dataloader.batch_size,
        **Config(settings).to_dict(),
    }
    before, start = measure.resident_bytes(), time.perf_counter()
    with quiet():
        prepare(cfg, 'mmdet' if TASKS[row['size']][row['set']].detects else 'mmseg')
        watch = WatchHook(row['seed'], cfg.train_dataloader.batch_size * get_world_size())
        runner = build_runner(cfg)
        runner.register_hook(watch, priority='VERY_LOW')
        try:
            runner.train()
            final = runner.test() if row['schedule'] != 'try' else None
        except DivergedError:
            final = None
    return {
        **row,
        **counted,
        'images': row['steps'] * watch.batch,
        'diverged': watch.diverged,
        'loss_at_end': loss_at_end(watch.losses, row['steps']),
        'losses': [round(loss, 4) for loss in watch.losses],
        'data_digest': watch.digest,
        'curve': watch.curve,
        'final': figures(final, row),
        'step_wall_s': statistics.median(watch.wall) if watch.wall else None,
        'step_cpu_s': statistics.median(watch.cpu) if watch.cpu else None,
        'peak_bytes': measure.grown_bytes(before),
        'seconds': round(time.perf_counter() - start, 1),
        'cpu_seconds': round(time.process_time(), 1),
        'command': command,
        'config': config,
        'machine': machine(),
    }


def figures(metrics: dict[str, float] | None, row: Row) -> dict[str, float] | None:
    """The figures of a test. mmdet gives none where no box is sure enough: that is an average precision of 0."""
    if metrics is None:
        return None
    metric = TASKS[row['size']][row['set']].metric
    return {metric: 0.0, **{key: number(value) for key, value in metrics.items() if not key.endswith('time')}}


def number(value: float) -> float | None:
    """A figure as JSON knows it: None for that of a class without a pixel."""
    return None if math.isnan(value) else float(value)


def loss_at_end(losses: list[float], steps: int) -> float | None:
    """Mean loss over the last quarter of a run; None where it did not get there."""
    last = losses[-max(1, steps // 4) :]
    return sum(last) / len(last) if len(losses) == steps and all(map(math.isfinite, last)) else None
