"""What comes out of a pipeline, against what the model or the metric reads of it."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from mila_mm.datasets.checks.findings import Finding, error
from mila_mm.engine.data.metrics import metrics_of
from mila_mm.engine.data.splits import kind_name
from mila_mm.errors import UserError


def try_pipeline(dataset: Any, key: str, cfg: Config, stage: str, scope: str) -> Finding | None:
    """Take one sample through the whole pipeline; what fails or lacks there would in the first batch or after an epoch.

    Args:
        dataset: The data set.
        key: Where it stands in the config.
        cfg: The config.
        stage: 'train', 'val' or 'test'.
        scope: 'mmdet' or 'mmseg'.
    """
    try:
        sample = dataset[0]
    except UserError as fault:
        return error(key, str(fault))
    absent = _absent(sample, cfg, stage, scope)
    return None if absent is None else error(f'{key}.pipeline', absent)


def _absent(sample: Any, cfg: Config, stage: str, scope: str) -> str | None:
    """Say what a sample lacks; one of another kind than a plain detector's or segmentor's is left alone."""
    pack = 'PackDetInputs' if scope == 'mmdet' else 'PackSegInputs'
    if not isinstance(sample, dict) or kind_name(cfg.model.get('data_preprocessor')) not in _PREPROCESSORS:
        return None
    if 'inputs' not in sample:
        return f'gives {", ".join(sorted(map(str, sample))[:4])}, ... and no inputs: it must end with {pack}'
    packed = sample.get('data_samples')
    name = type(packed).__name__
    if scope == 'mmseg' and name == 'SegDataSample':
        judged = [metric for _, metric in metrics_of(cfg, stage) if kind_name(metric) == 'IoUMetric']
        reads = stage == 'train' or any(not metric.get('format_only') for metric in judged)
        return 'gives no label map: it needs LoadAnnotations' if reads and 'gt_sem_seg' not in packed else None
    if scope == 'mmdet' and name == 'DetDataSample' and stage == 'train' and 'gt_instances' in packed:
        if 'labels' not in packed.gt_instances:
            return 'gives no labels and boxes: it needs LoadAnnotations with with_bbox=True'
        roi_head = cfg.model.get('roi_head')
        reads_masks = isinstance(roi_head, dict) and roi_head.get('mask_head') is not None
        if reads_masks and 'masks' not in packed.gt_instances:
            return 'gives no masks, which model.roi_head.mask_head learns from: LoadAnnotations with with_mask=True'
    return None


_PREPROCESSORS = ('DetDataPreprocessor', 'SegDataPreProcessor')
