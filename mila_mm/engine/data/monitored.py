"""Names of figures that hooks and schedules wait for, against those that the validation gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

from mila_mm.datasets.checks.findings import Finding, error, nearest, shown
from mila_mm.engine.data.metrics import COCO_METRICS, metrics_of
from mila_mm.engine.data.splits import kind_name

_SHORT = ('default_hooks.checkpoint.save_best',)  # what takes a name without its prefix
_COCO_ITEMS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
# What mmseg's IoUMetric gives for each of its iou_metrics; aAcc comes with all.
IOU_ITEMS = {'mIoU': ('mIoU', 'mAcc'), 'mDice': ('mDice', 'mAcc'), 'mFscore': ('mFscore', 'mPrecision', 'mRecall')}


def check_monitored(cfg: Config) -> list[Finding]:
    """Check ``save_best``, and what an early end and a schedule watch, which else fail after an epoch.

    Nothing is said where a metric is of another kind than COCO's and mmseg's, whose names are known.
    """
    if kind_name(cfg.get('val_cfg') or {}) not in ('', 'ValLoop'):
        return []  # a loop of another kind names its figures in its own way: teacher/coco/bbox_mAP
    wanted = list(_wanted(cfg))
    given: set[str] = set()
    for _, metric in metrics_of(cfg, 'val'):
        names = _given_by(metric)
        if names is None:
            return []
        given |= names
    if not given:
        return []
    known = shown(sorted(given), 8)
    # bbox_mAP stands for coco/bbox_mAP where there is one of that name
    ends = Counter(name.rpartition('/')[2] for name in given)
    return [
        error(key, f'waits for {name!r}, which the validation does not give: it gives {known}{_like(name, given)}')
        for key, name in wanted
        if name not in given and not ('/' not in name and ends[name] == 1 and key in _SHORT)
    ]


def _wanted(cfg: Config) -> Iterator[tuple[str, str]]:
    checkpoint = (cfg.get('default_hooks') or {}).get('checkpoint')
    best = checkpoint.get('save_best') if isinstance(checkpoint, dict) else None
    for name in best if isinstance(best, (list, tuple)) else [best]:
        if isinstance(name, str) and name != 'auto':
            yield 'default_hooks.checkpoint.save_best', name
    for index, hook in enumerate(cfg.get('custom_hooks') or []):
        if kind_name(hook) == 'EarlyStoppingHook' and isinstance(hook.get('monitor'), str):
            yield f'custom_hooks.{index}.monitor', hook['monitor']
    schedules = cfg.get('param_scheduler') or []
    for index, schedule in enumerate(schedules if isinstance(schedules, (list, tuple)) else [schedules]):
        # of those with another name the figure is the loss
        if kind_name(schedule).startswith('ReduceOnPlateau') and '/' in str(schedule.get('monitor', '')):
            yield f'param_scheduler.{index}.monitor', schedule['monitor']


def _given_by(metric: dict[str, Any]) -> set[str] | None:
    kind, prefix = kind_name(metric), metric.get('prefix')
    if kind in COCO_METRICS[:3]:
        names = _listed(metric.get('metric', 'bbox'))
        plain = not (metric.get('classwise') or metric.get('metric_items') or metric.get('format_only'))
        if not plain or not set(names) <= {'bbox', 'segm'}:
            return None
        items = [f'{name}_{item}' for name in names for item in _COCO_ITEMS]
        prefix = 'coco' if prefix is None else prefix
    elif kind == 'IoUMetric':
        names = _listed(metric.get('iou_metrics', 'mIoU'))
        if metric.get('format_only') or not set(names) <= set(IOU_ITEMS):
            return None
        items = ['aAcc', *(item for name in names for item in IOU_ITEMS[name])]
    else:
        return None
    return {f'{prefix}/{item}' if prefix else item for item in items}


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _like(name: str, given: set[str]) -> str:
    ends = [known for known in sorted(given) if known.endswith(f'_{name.rpartition("/")[2]}')]
    return f'; nearest: {ends[0]!r}' if ends else nearest(name, sorted(given))
