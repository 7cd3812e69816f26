"""Labels that a segmentor ignores: heads, padding and metric must mean the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import Config

from mila_mm.datasets.checks.findings import Finding, error, note, warning
from mila_mm.engine.data.metrics import metrics_of
from mila_mm.engine.data.splits import kind_name

_USUAL = 255


def ignored_by(cfg: Config, stage: str) -> list[int]:
    """Return the labels that a segmentor ignores in a stage: all of its heads in training, its metric in validation."""
    if stage != 'train':
        metrics = [metric for _, metric in metrics_of(cfg, stage) if kind_name(metric) == 'IoUMetric']
        return sorted({metric.get('ignore_index', _USUAL) for metric in metrics} or {_USUAL})
    heads = [label for _, label in _heads(cfg.model)] or [_USUAL]
    return sorted(set(heads)) if len(set(heads)) == 1 else []


def check_ignored(cfg: Config, classes: Sequence[str] = ()) -> list[Finding]:
    """Check that the heads of a segmentor ignore the same label, with which what is padded is filled too.

    Args:
        classes: Class names, of which none should be ignored. Defaults to none known.
    """
    heads = list(_heads(cfg.model))
    if not heads:
        return []
    findings = _ignored_by_metrics(cfg, classes)
    first_key, first = heads[0]
    for key, label in heads[1:]:
        if label != first:
            return [
                error(
                    f'{key}.ignore_index',
                    f'is {label}, but {first_key} ignores {first}: they learn from the same label maps; --cfg-options '
                    f'{key}.ignore_index={first}',
                )
            ]
    if isinstance(first, int) and 0 <= first < len(classes):
        told = f'is {first}, the label of {classes[first]!r}: that class is never learnt'
        return [*findings, warning(f'{first_key}.ignore_index', told)]
    preprocessor = cfg.model.get('data_preprocessor')
    if not isinstance(preprocessor, dict) or not (preprocessor.get('size') or preprocessor.get('size_divisor')):
        return findings
    padded = preprocessor.get('seg_pad_val', _USUAL)
    if padded == first:
        return findings
    return [  # no harm is done where nothing is padded, and a label of no class is told in the step
        note(
            'model.data_preprocessor.seg_pad_val',
            f'is {padded}, but {first_key} ignores {first}: what is padded would be learnt as label {padded}; '
            f'--cfg-options model.data_preprocessor.seg_pad_val={first}',
        ),
        *findings,
    ]


def _ignored_by_metrics(cfg: Config, classes: Sequence[str]) -> list[Finding]:
    heads = {label for _, label in _heads(cfg.model)}
    found = []
    for stage in ('val', 'test'):
        for key, metric in metrics_of(cfg, stage):
            label = metric.get('ignore_index', _USUAL)
            if kind_name(metric) == 'IoUMetric' and label in range(len(classes)) and label not in heads:
                told = (
                    f'is {label}, the label of {classes[label]!r}: that class is learnt, and its pixels are not judged'
                )
                found.append(warning(f'{key}.ignore_index', told))
    return found


def _heads(model: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the keys of the heads that learn from label maps, and what they ignore."""
    for name in ('decode_head', 'auxiliary_head'):
        heads = model.get(name)
        for index, head in enumerate(heads if isinstance(heads, (list, tuple)) else [heads]):
            if isinstance(head, dict) and 'Depth' not in kind_name(head):
                key = f'model.{name}.{index}' if isinstance(heads, (list, tuple)) else f'model.{name}'
                yield key, head.get('ignore_index', _USUAL)
