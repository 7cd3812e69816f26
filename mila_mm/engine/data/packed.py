"""What comes out of a pipeline, against what the model or the metric reads of it."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from mila_mm.datasets.checks.findings import Finding, error, shown
from mila_mm.engine.data.ignored import ignored_by
from mila_mm.engine.data.loaded import counts_otherwise
from mila_mm.engine.data.metrics import metrics_of
from mila_mm.engine.data.samples import datasets_in, has_own_transforms
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
    except Exception as fault:
        if any(counts_otherwise(inner) for inner in datasets_in(dataset)):
            return None  # which may not be ready to be asked
        if 'Cannot find valid image after' not in str(fault):
            raise
        return error(f'{key}.pipeline', 'leaves no sample: its transforms drop every one, or all of its boxes')
    absent = _absent(sample, dataset, cfg, stage, scope)
    return None if absent is None else error(f'{key}.pipeline', absent)


def _absent(sample: Any, dataset: Any, cfg: Config, stage: str, scope: str) -> str | None:
    """Say what a sample lacks; one of another kind than a plain detector's or segmentor's is left alone."""
    pack = 'PackDetInputs' if scope == 'mmdet' else 'PackSegInputs'
    if not isinstance(sample, dict) or kind_name(cfg.model.get('data_preprocessor')) not in _PREPROCESSORS:
        return None
    if 'inputs' not in sample:
        return f'gives {", ".join(sorted(map(str, sample))[:4])}, ... and no inputs: it must end with {pack}'
    packed = sample.get('data_samples')
    name = type(packed).__name__
    if scope == 'mmseg' and name == 'SegDataSample':
        return _fault_of_map(packed, dataset, cfg, stage)
    if scope == 'mmdet' and name == 'DetDataSample' and stage == 'train' and 'gt_instances' in packed:
        return _absent_of_instances(packed, cfg)
    return None


def _fault_of_map(packed: Any, dataset: Any, cfg: Config, stage: str) -> str | None:
    if 'gt_sem_seg' in packed:
        own = any(has_own_transforms(inner) for inner in datasets_in(dataset))
        return _labels_of_no_class(packed, dataset, cfg, stage) if own else None
    judged = [metric for _, metric in metrics_of(cfg, stage) if kind_name(metric) == 'IoUMetric']
    reads = stage == 'train' or any(not metric.get('format_only') for metric in judged)
    return 'gives no label map: it needs LoadAnnotations' if reads else None


def _absent_of_instances(packed: Any, cfg: Config) -> str | None:
    if 'labels' not in packed.gt_instances:
        return 'gives no labels and boxes: it needs LoadAnnotations with with_bbox=True'
    roi_head = cfg.model.get('roi_head')
    reads_masks = isinstance(roi_head, dict) and roi_head.get('mask_head') is not None
    if reads_masks and 'masks' not in packed.gt_instances:
        return 'gives no masks, which model.roi_head.mask_head learns from: LoadAnnotations with with_mask=True'
    return None


def _labels_of_no_class(packed: Any, dataset: Any, cfg: Config, stage: str) -> str | None:
    """Check what transforms of the user's have made of a label map, which nothing else has looked at."""
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    labels = set(packed.gt_sem_seg.data.unique().tolist()) - set(ignored_by(cfg, stage))
    outside = sorted(labels - set(range(len(classes)))) if classes else []
    if not outside:
        return None
    return f'gives labels {shown(outside)}, which no class has: the {len(classes)} classes are 0 to {len(classes) - 1}'


_PREPROCESSORS = ('DetDataPreprocessor', 'SegDataPreProcessor')
