"""What the metrics of a config read and write, before the work that they judge."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mila_mm.datasets.checks.findings import Finding, error, shown
from mila_mm.engine.config.checks import check_work_dir
from mila_mm.engine.data.kinds import names_of
from mila_mm.engine.data.splits import Split, kind_name
from mila_mm.errors import UserError

# CocoMetric and those that evaluate the same files the same way.
COCO_METRICS = ('CocoMetric', 'CocoFastMetric', 'FasterCocoMetric', 'CocoOccludedSeparatedMetric')
COCO_FIGURES = ('bbox', 'segm', 'proposal', 'proposal_fast')
IOU_METRICS = ('mIoU', 'mDice', 'mFscore')
_PREFIXES = ('outfile_prefix', 'out_file_path')
_FOLDERS = ('output_dir',)


def metrics_of(cfg: Config, stage: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the metrics of a stage with the keys under which they stand."""
    evaluator = cfg.get(f'{stage}_evaluator')
    if isinstance(evaluator, dict) and 'metrics' in evaluator:
        evaluator = evaluator['metrics']
    if isinstance(evaluator, dict):
        return [(f'{stage}_evaluator', evaluator)]
    if isinstance(evaluator, (list, tuple)):
        return [(f'{stage}_evaluator.{i}', metric) for i, metric in enumerate(evaluator) if isinstance(metric, dict)]
    return []


def check_metrics(cfg: Config, stages: Sequence[str], splits: Sequence[Split]) -> list[Finding]:
    """Check the metrics of validation and test against their data sets and the model.

    Args:
        cfg: A config.
        stages: Those that will run.
        splits: Its data sets.
    """
    findings = []
    for stage in stages:
        own = [split for split in splits if split.stage == stage]
        for key, metric in metrics_of(cfg, stage):
            findings += _same_file(key, metric, own)
            findings += _package(key, metric)
            findings += _figures(key, metric)
            findings += _masks(key, metric, cfg.model)
            findings += _format_only(key, metric)
    return findings


def _same_file(key: str, metric: dict[str, Any], own: Sequence[Split]) -> list[Finding]:
    name = metric.get('ann_file')
    if not isinstance(name, str) or not name or '://' in name or len(own) != 1 or own[0].local_ann_file is None:
        return []
    # CocoMetric may judge the instances in what a panoptic data set loads, by another file of the same images
    kinds = ('CocoPanopticMetric',) if _is_panoptic(own[0]) else (*COCO_METRICS, 'LVISMetric')
    if kind_name(metric) not in kinds:
        return []
    read, compared = own[0].local_ann_file, Path(name)
    if read.suffix != compared.suffix or _real(read) == _real(compared):
        return []
    return [
        error(
            f'{key}.ann_file',
            f'the metric compares with {compared}, but {own[0].key} reads {read}: they must be one file',
        )
    ]


def _is_panoptic(split: Split) -> bool:
    return any('Panoptic' in name for name in names_of(split.kind))


def _package(key: str, metric: dict[str, Any]) -> list[Finding]:
    """Name the package that a metric lacks, which shows after a whole validation."""
    if kind_name(metric) != 'FasterCocoMetric' or importlib.util.find_spec('faster_coco_eval') is not None:
        return []
    told = 'FasterCocoMetric needs faster_coco_eval, which is not installed: pip install faster-coco-eval'
    return [error(key, f'{told}; CocoMetric gives the same figures without it')]


def _figures(key: str, metric: dict[str, Any]) -> list[Finding]:
    """Refuse figures that a metric does not know; mmseg's says so after a whole validation."""
    known = {'IoUMetric': ('iou_metrics', IOU_METRICS), 'CocoMetric': ('metric', COCO_FIGURES)}.get(kind_name(metric))
    if known is None:
        return []
    name, figures = known
    named = metric.get(name, ())
    unknown = [each for each in ([named] if isinstance(named, str) else named or ()) if each not in figures]
    return [error(f'{key}.{name}', f'has {shown(unknown)}, expected some of {shown(figures)}')] if unknown else []


def _real(path: Path) -> Path:
    return path.expanduser().resolve()


def _masks(key: str, metric: dict[str, Any], model: Any) -> list[Finding]:
    """Refuse to compare masks of a model that has none: it would show after a whole validation."""
    wanted = metric.get('metric', ())
    wanted = [wanted] if isinstance(wanted, str) else wanted or ()
    if 'segm' not in wanted or kind_name(metric) not in (*COCO_METRICS, 'LVISMetric') or _has_masks(model):
        return []
    return [
        error(f'{key}.metric', f"asks for 'segm', but the model ({kind_name(model)}) predicts no masks: metric='bbox'")
    ]


def _has_masks(model: dict[str, Any]) -> bool:
    """Tell whether a model may predict masks: in two stages by a head of that name, else by any word of its config."""
    roi_head = model.get('roi_head')
    if isinstance(roi_head, dict) and kind_name(roi_head) == 'StandardRoIHead':
        return bool(roi_head.get('mask_head') or model.get('mask_head'))
    parts = {name: part for name, part in model.items() if name not in ('data_preprocessor', 'backbone', 'init_cfg')}
    return 'mask' in repr(parts).lower()


def _format_only(key: str, metric: dict[str, Any]) -> list[Finding]:
    if metric.get('format_only') and kind_name(metric) in COCO_METRICS and not metric.get('outfile_prefix'):
        return [error(f'{key}.outfile_prefix', 'is not set, and format_only=True writes results there')]
    return []


def check_outputs(cfg: Config, stages: Sequence[str]) -> list[Finding]:
    """Try every path that the config writes to beside the work folder, before the work instead of after it.

    Args:
        cfg: A config.
        stages: Those that will run.
    """
    paths = []
    for stage in stages:
        for key, metric in metrics_of(cfg, stage):
            paths += [(f'{key}.{name}', Path(metric[name]).parent) for name in _PREFIXES if metric.get(name)]
            paths += [(f'{key}.{name}', Path(metric[name])) for name in _FOLDERS if metric.get(name)]
    checkpoint = (cfg.get('default_hooks') or {}).get('checkpoint')
    if isinstance(checkpoint, dict) and checkpoint.get('out_dir') and '://' not in str(checkpoint['out_dir']):
        paths.append(('default_hooks.checkpoint.out_dir', Path(checkpoint['out_dir'])))
    backends = (cfg.get('visualizer') or {}).get('vis_backends') or []
    for index, backend in enumerate(backends if isinstance(backends, (list, tuple)) else []):
        if isinstance(backend, dict) and backend.get('save_dir'):
            paths.append((f'visualizer.vis_backends.{index}.save_dir', Path(backend['save_dir'])))
    findings = []
    for key, path in paths:
        try:
            check_work_dir(path, key)
        except UserError as fault:
            findings.append(error('', str(fault)))
    return findings
