"""The annotation files of a config in COCO's layout: read once, checked, counted, remembered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mila_mm.datasets.checks.cache import remembered
from mila_mm.datasets.checks.classes import check_categories
from mila_mm.datasets.checks.coco_annotations import UnreadableError, check_entries, read_coco
from mila_mm.datasets.checks.findings import ERROR, Finding, Report, error
from mila_mm.datasets.checks.needs import Needs
from mila_mm.datasets.checks.survival import Filter, count_survivors, judge_survivors
from mila_mm.engine.data.metrics import COCO_METRICS, metrics_of
from mila_mm.engine.data.splits import Split, kind_name


def check_files(cfg: Config, splits: Sequence[Split], cache: Path | None, report: Report) -> None:
    """Check the annotation files that are read as mmdet's ``CocoDataset`` reads them.

    Args:
        splits: Its data sets; those of other kinds are left alone.
        cache: Folder for what is remembered, or None.
        report: Takes findings and counts.
    """
    for split in splits:
        path = split.local_ann_file
        if path is None or split.classes is None or not split.reads_coco or not path.is_file():
            continue
        needs, keep = _needs(cfg, split), filter_of(split)
        question = [asdict(needs), asdict(keep)]
        answer = remembered(cache, path, question, lambda p=path, n=needs, k=keep: _examine(p, n, k))  # type: ignore[misc]
        findings = [Finding(**finding) for finding in answer['findings']]
        if answer['names'] is not None:
            findings += check_categories(_classes_key(split), str(path), split.classes, answer['names'])
        counts = answer['counts']
        if counts is not None:
            sound = not any(finding.level == ERROR for finding in findings)
            if sound and is_labelled(cfg, split):
                findings += judge_survivors(split.key, str(path), counts, split.stage == 'train')
            report.counts[split.key] = {'ann_file': str(path), **counts}
        report.add(findings)


def _classes_key(split: Split) -> str:
    meta = split.config.get('metainfo')
    named = isinstance(meta, dict) and 'classes' in meta
    return f'{split.key}.metainfo.classes' if named else f'{split.key} (classes of {kind_name(split.config)})'


def _examine(path: Path, needs: Needs, keep: Filter) -> dict[str, Any]:
    try:
        data = read_coco(path)
    except UnreadableError as fault:
        return {'findings': [asdict(error('', f'annotation file {path} {fault}'))], 'names': None, 'counts': None}
    findings = check_entries(data, str(path), needs)
    sound = not any(finding.level == ERROR for finding in findings)
    names = [str(item['name']) for item in data['categories'] if isinstance(item, dict) and 'name' in item]
    if findings and not names:
        names = None  # what it lacks is told already
    return {
        'findings': [asdict(finding) for finding in findings],
        'names': names,
        'counts': count_survivors(data, keep) if sound else None,
    }


def _needs(cfg: Config, split: Split) -> Needs:
    masks, evaluation = split.reads_masks, False
    if split.stage != 'train':
        for _, metric in metrics_of(cfg, split.stage):
            if kind_name(metric) in COCO_METRICS and metric.get('ann_file'):
                evaluation = True
                wanted = metric.get('metric', 'bbox')
                masks = masks or 'segm' in ([wanted] if isinstance(wanted, str) else list(wanted or ()))
    return Needs(
        labels=is_labelled(cfg, split), masks=masks, evaluation=evaluation, polygons_only=split.reads_polygons_only
    )


def is_labelled(cfg: Config, split: Split) -> bool:
    """Tell whether a data set needs annotations: not for a test server, nor where learning is semi-supervised."""
    if any(kind_name(step) == 'LoadEmptyAnnotations' for step in split.steps):
        return False
    metrics = [metric for _, metric in metrics_of(cfg, split.stage)]
    return not (split.stage == 'test' and metrics and all(metric.get('format_only') for metric in metrics))


def filter_of(split: Split) -> Filter:
    """Return which images and boxes a data set of COCO's kind keeps."""
    config = split.config.get('filter_cfg') or {}
    return Filter(
        classes=tuple(split.classes or ()),
        min_size=config.get('min_size', 0),
        filter_empty=bool(config.get('filter_empty_gt', False)),
        drop_images=bool(config) and not split.config.get('test_mode') and split.drops_as_coco,
    )
