"""All checks of a config and its data together: some at the start of a run, everything with ``mila check-data``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmengine.config import Config

from mila_mm.datasets.checks.cache import cache_folder
from mila_mm.datasets.checks.findings import Finding, Report, error
from mila_mm.engine.config.build_errors import building
from mila_mm.engine.config.checks import needed_paths
from mila_mm.engine.data.built import Effort, check_built
from mila_mm.engine.data.files import check_files, is_labelled
from mila_mm.engine.data.heads import check_heads, reads_text, stuff_of
from mila_mm.engine.data.ignored import ignored_by
from mila_mm.engine.data.packed import try_pipeline
from mila_mm.engine.data.samples import name_failing_samples
from mila_mm.engine.data.splits import splits_of
from mila_mm.engine.data.static import check_static, is_video
from mila_mm.engine.random_state import capture_random_state, restore_random_state
from mila_mm.errors import UserError


def check_before_building(cfg: Config, stages: Sequence[str], scope: str, remember: bool = True) -> Report:
    """Check what needs no data set to be built: the config and its annotation files in COCO's layout.

    Args:
        cfg: A config.
        stages: Those that will run, of 'train', 'val', 'test'.
        scope: 'mmdet', 'mmseg' or 'mmpretrain', of which the last is left alone.
        remember: Whether results are kept for the next start. Defaults to True.
    """
    report = Report()
    if scope not in ('mmdet', 'mmseg'):
        return report
    splits = splits_of(cfg, stages, scope)
    report.add(check_static(cfg, stages, scope, splits))
    check_files(cfg, splits, cache_folder() if remember else None, report)
    return report


def check_everything(cfg: Config, stages: Sequence[str], scope: str, samples: int = 0) -> Report:
    """Check a config and all of its data, and report everything at once.

    Args:
        cfg: A config.
        stages: Some of 'train', 'val', 'test'.
        scope: 'mmdet' or 'mmseg'.
        samples: Images and label maps that are opened in each split, 0 for all. Defaults to 0.
    """
    report = Report()
    absent = [needed for stage in stages for needed in needed_paths(cfg, stage) if not needed.exists()]
    report.add(error(needed.key, f'{needed.kind} {needed.path} does not exist') for needed in absent)
    static = check_before_building(cfg, stages, scope, remember=False)
    report.add(static.findings)
    report.counts.update(static.counts)
    broken = {needed.key for needed in absent}
    for stage in stages:
        loader = cfg.get(f'{stage}_dataloader')
        if isinstance(loader, dict) and isinstance(loader.get('dataset'), dict):
            key = f'{stage}_dataloader.dataset'
            if not any(name.startswith(key) for name in broken):
                _check_split(cfg, key, stage, scope, Effort(samples), report)
    return report


def _check_split(cfg: Config, key: str, stage: str, scope: str, effort: Effort, report: Report) -> None:
    from mmengine.registry import DATASETS

    try:
        with building(key), DATASETS.switch_scope_and_registry(scope) as registry:
            dataset = registry.build(cfg[f'{stage}_dataloader']['dataset'])
    except UserError as fault:
        if 'need at least one array' in str(fault):  # mmengine packs an empty list
            report.add([error(key, 'finds no image that it can use: wrong folder or suffix?')])
        elif not report.of('error'):  # what was found is the reason, and says it better
            report.add([error('', str(fault))])
        return
    except Exception:
        if not any(finding.where.startswith(key) for finding in report.of('error')):
            raise
        return  # what was found of this data set is the reason
    report.add(judge_built(cfg, dataset, key, stage, scope, effort, report))


def judge_built(
    cfg: Config, dataset: Any, key: str, stage: str, scope: str, effort: Effort, report: Report
) -> list[Finding]:
    """Check a data set that is built, and take one sample through its pipeline.

    Args:
        dataset: The data set.
        key: Where it stands in the config.
        stage: 'train', 'val' or 'test'.
        scope: 'mmdet' or 'mmseg'.
        effort: How much is looked at.
        report: Takes the counts.
    """
    name_failing_samples(dataset)
    state = capture_random_state()
    try:
        looked = check_built(dataset, key, stage, effort, ignored_by(cfg, stage), stuff_of(cfg.model))
        findings = [*looked.findings, *_heads_of_built(cfg, dataset, key, stage, scope)]
        if not any(finding.level == 'error' for finding in findings):
            failed = try_pipeline(dataset, key, cfg, stage, scope)
            findings += [failed] if failed is not None else []
    except UserError as fault:
        looked, findings = None, [error(key, str(fault))]
    finally:
        restore_random_state(state)
    splits = [split for split in splits_of(cfg, [stage], scope) if split.key.startswith(key)]
    if not all(is_labelled(cfg, split) for split in splits):
        findings = [finding for finding in findings if 'no box is left' not in finding.message]
    if looked is not None and looked.counts:
        report.counts[key] = {**looked.counts, **report.counts.get(key, {})}
    return findings


def _heads_of_built(cfg: Config, dataset: Any, key: str, stage: str, scope: str) -> list[Finding]:
    """Check the heads where only the data set that is built knows its classes."""
    splits = [split for split in splits_of(cfg, [stage], scope) if split.key.startswith(key)]
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    known = any(split.classes for split in splits) or not isinstance(classes, (list, tuple))
    if known or not splits or is_video(splits[0]) or reads_text(cfg.model):
        return []
    split = replace(splits[0], config={**splits[0].config, 'metainfo': {'classes': tuple(classes)}})
    return check_heads(cfg.model, split, scope)
