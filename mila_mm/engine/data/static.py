"""What a config alone shows to be wrong, without a look at its files."""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.config import Config

from mila_mm.datasets.checks.classes import check_same_names
from mila_mm.datasets.checks.findings import Finding, error, warning
from mila_mm.engine.data.arguments import check_arguments
from mila_mm.engine.data.channels import check_channels
from mila_mm.engine.data.heads import check_heads, reads_text
from mila_mm.engine.data.ignored import check_ignored
from mila_mm.engine.data.keys import check_keys, check_stages, check_test_mode
from mila_mm.engine.data.kinds import default_of, names_of
from mila_mm.engine.data.metrics import check_metrics, check_outputs
from mila_mm.engine.data.monitored import check_monitored
from mila_mm.engine.data.splits import Split, kind_name


def check_static(cfg: Config, stages: Sequence[str], scope: str, splits: Sequence[Split]) -> list[Finding]:
    """Check a config's keys, classes, heads, metrics and written paths.

    Args:
        cfg: A config.
        stages: Those that will run, of 'train', 'val', 'test'.
        scope: 'mmdet' or 'mmseg'.
        splits: Its data sets.
    """
    findings = check_stages(cfg, stages) + check_arguments(cfg, stages, scope)
    for split in splits:
        findings += check_keys(split, cfg[f'{split.stage}_dataloader'])
        findings += check_test_mode(split)
    # Of classes that are not said as they are read nothing follows.
    if not any(word in finding.where for finding in findings for word in ('classes', 'CLASSES', 'metainfo')):
        findings += _classes(cfg, splits, scope)
    findings += check_channels(cfg.model)
    findings += check_metrics(cfg, stages, splits)
    findings += check_outputs(cfg, stages)
    findings += _same_images(splits)
    if 'val' in stages:
        findings += check_monitored(cfg)
    if scope == 'mmseg':
        findings += check_ignored(cfg, splits[0].classes or () if splits else ())
    return findings


def _classes(cfg: Config, splits: Sequence[Split], scope: str) -> list[Finding]:
    """Check that all data sets name the same classes and the heads have as many."""
    named = [split for split in splits if split.classes and not is_video(split)]
    if not named or reads_text(cfg.model):
        return []
    findings = check_same_names({split.key: list(split.classes or ()) for split in named})
    findings += _same_zero(named)
    return findings + check_heads(cfg.model, named[0], scope)


def _same_zero(splits: Sequence[Split]) -> list[Finding]:
    """Check that all data sets of a segmentor take label 0 for the same."""
    name = 'reduce_zero_label'
    settings = [(split, split.config.get(name, default_of(split.kind, name))) for split in splits]
    settings = [(split, bool(value)) for split, value in settings if isinstance(value, bool)]
    return [
        error(
            f'{split.key}.{name}',
            f'is {value}, but that of {settings[0][0].key} is {settings[0][1]}: labels of one would be shifted by one',
        )
        for split, value in settings[1:]
        if value != settings[0][1]
    ]


def _same_images(splits: Sequence[Split]) -> list[Finding]:
    """Warn where a validation judges the images that a model learns from: it shows no overfitting."""
    learnt = {source: split.key for split in splits if split.stage == 'train' for source in [_source(split)] if source}
    return [
        warning(split.key, f'reads the same files as {learnt[source]}: a validation on training images is always good')
        for split in splits
        for source in [_source(split)]
        if split.stage == 'val' and source in learnt
    ]


def _source(split: Split) -> tuple[str, ...] | None:
    """Return what decides which images a data set reads, None where that is not known."""
    if split.config.get('indices') is not None or not (split.reads_coco or kind_name(split.config) == 'BaseSegDataset'):
        return None
    prefix = split.config.get('data_prefix')
    folders = sorted(map(str, prefix.values())) if isinstance(prefix, dict) else []
    return (str(split.config.get('data_root') or ''), str(split.config.get('ann_file') or ''), *folders)


def is_video(split: Split) -> bool:
    """Tell whether a data set is a video's: a tracker learns one class and is judged beside many others."""
    return not {'BaseVideoDataset', 'ReIDDataset'}.isdisjoint(names_of(split.kind))
