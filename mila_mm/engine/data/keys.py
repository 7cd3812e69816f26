"""Keys of a config that are of another version, of another kind, or read by nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config

from mila_mm.datasets.checks.classes import check_names
from mila_mm.datasets.checks.findings import Finding, error, shown, warning
from mila_mm.engine.data.kinds import default_of, names_of, takes_of
from mila_mm.engine.data.splits import Split, kind_name

# What mmdet 2 and mmseg 0 called the arguments of a data set.
OLD_DATASET_KEYS = {
    'classes': "metainfo=dict(classes=('a', 'b'))",
    'CLASSES': "metainfo=dict(classes=('a', 'b'))",
    'palette': 'metainfo=dict(palette=[...])',
    'img_prefix': "data_prefix=dict(img='train2017/')",
    'seg_prefix': "data_prefix=dict(seg='...')",
    'img_dir': "data_prefix=dict(img_path='...')",
    'ann_dir': "data_prefix=dict(seg_map_path='...')",
    'split': "ann_file='...'",
    'samples_per_gpu': 'train_dataloader.batch_size',
    'workers_per_gpu': 'train_dataloader.num_workers',
    'filter_empty_gt': 'filter_cfg=dict(filter_empty_gt=True)',
}
OLD_LOADER_KEYS = {'samples_per_gpu': 'batch_size', 'workers_per_gpu': 'num_workers'}
_OLD_META_KEYS = {'CLASSES': 'classes', 'PALETTE': 'palette'}
OLD_TRANSFORMS = {
    'DefaultFormatBundle': 'PackDetInputs or PackSegInputs',
    'ImageToTensor': 'PackDetInputs or PackSegInputs',
    'Collect': 'PackDetInputs or PackSegInputs',
    'MultiScaleFlipAug': 'TestTimeAug, in tta_pipeline',
}
OLD_TRANSFORM_KEYS = {
    ('Resize', 'img_scale'): 'scale',
    ('Resize', 'ratio_range'): "type='RandomResize' with scale and ratio_range",
    ('Resize', 'multiscale_mode'): "type='RandomChoiceResize' with scales",
    ('RandomFlip', 'flip_ratio'): 'prob',
}
# Transforms of several images, which only a wrapper around a data set can give them.
_MIXING = ('Mosaic', 'MixUp', 'CopyPaste', 'RandomMosaic')
# Transforms that import a package of their own, some only when the first image comes.
_PACKAGES = {
    'Albu': ('albumentations', 'albumentations'),
    'Corrupt': ('imagecorruptions', 'imagecorruptions'),
    'InstaBoost': ('instaboostfast', 'instaboostfast'),
    'LoadBiomedicalImageFromFile': ('nibabel', 'nibabel'),
    'LoadBiomedicalAnnotation': ('nibabel', 'nibabel'),
    'LoadPanopticAnnotations': ('panopticapi', 'git+https://github.com/cocodataset/panopticapi.git'),
    'LoadSingleRSImageFromFile': ('osgeo', 'gdal'),
    'LoadMultipleRSImageFromFile': ('osgeo', 'gdal'),
}
_PREFIX_NAMES = ('img', 'img_path', 'seg', 'seg_map_path')
_PARTS_OF_A_STAGE = {
    'train': ('train_dataloader', 'train_cfg', 'optim_wrapper'),
    'val': ('val_dataloader', 'val_cfg', 'val_evaluator'),
    'test': ('test_dataloader', 'test_cfg', 'test_evaluator'),
}


def check_stages(cfg: Config, stages: Sequence[str]) -> list[Finding]:
    """Check that there is one dataloader each, and validation and test are complete or absent, as mmengine wants them.

    Args:
        cfg: A config.
        stages: Those that will run; with a training goes its validation.
    """
    findings = [
        error(f'{stage}_dataloader', 'is a list, expected one dataloader; a ConcatDataset in it joins data sets')
        for stage in stages
        if isinstance(cfg.get(f'{stage}_dataloader'), (list, tuple))
    ]
    wanted = [stage for stage in ('val', 'test') if stage in stages or (stage == 'val' and 'train' in stages)]
    for stage in wanted:
        names = _PARTS_OF_A_STAGE[stage]
        there = [name for name in names if cfg.get(name) is not None]
        if there and len(there) < len(names):
            absent = [name for name in names if name not in there]
            findings.append(
                error(
                    f'{" and ".join(absent)} {"is" if len(absent) == 1 else "are"} missing',
                    f'{" and ".join(there)} alone {"is" if len(there) == 1 else "are"} half a {_STAGE_NAMES[stage]}: '
                    f'give all of {", ".join(names)}, or set {" and ".join(f"{name}=None" for name in there)}',
                )
            )
    return findings


_STAGE_NAMES = {'val': 'validation', 'test': 'test'}


def check_keys(split: Split, loader: dict[str, Any]) -> list[Finding]:
    """Check the keys of one data set, of its metainfo, data_prefix and pipeline.

    Args:
        split: The data set.
        loader: Config of its dataloader.
    """
    findings = [
        error(f'{split.stage}_dataloader.{old}', f'is of mmdet 2 or mmseg 0; its successor is {new}')
        for old, new in OLD_LOADER_KEYS.items()
        if old in loader
    ]
    own_arguments = takes_of(split.kind)
    for old, new in OLD_DATASET_KEYS.items():
        if old in split.config and old not in own_arguments:
            value, successor = split.config[old], new
            if old in ('classes', 'CLASSES') and isinstance(value, (list, tuple)):
                successor = f'metainfo=dict(classes={tuple(value)!r})'
            findings.append(
                error(f'{split.key}.{old}', f'is of mmdet 2 or mmseg 0: {kind_name(split.config)} takes {successor}')
            )
    return [*findings, *_ann_file(split), *_meta(split), *_prefix(split), *_transforms(split)]


def _ann_file(split: Split) -> list[Finding]:
    name = split.config.get('ann_file')
    if not isinstance(name, (list, tuple)):
        return []
    told = f'names {len(name)} files, and a data set reads one: a ConcatDataset joins data sets, datasets=[...]'
    return [error(f'{split.key}.ann_file', told)]


def _meta(split: Split) -> list[Finding]:
    meta = split.config.get('metainfo')
    if meta is None:
        return []
    where = f'{split.key}.metainfo'
    if not isinstance(meta, dict):
        return [error(where, f"is {meta!r}, expected dict(classes=('a', 'b'), palette=[...])")]
    findings = [
        error(f'{where}.{old}', f'is read by nothing: since mmengine it is written {new!r}')
        for old, new in _OLD_META_KEYS.items()
        if old in meta and new not in meta
    ]
    if 'classes' in meta and (not isinstance(meta['classes'], str) or split.classes is None):
        findings += check_names(f'{where}.classes', meta['classes'])
    palette, classes = meta.get('palette'), meta.get('classes')
    if isinstance(palette, (list, tuple)) and isinstance(classes, (list, tuple)) and 0 < len(palette) < len(classes):
        findings.append(error(f'{where}.palette', f'has {len(palette)} colours for {len(classes)} classes'))
    return findings


def _prefix(split: Split) -> list[Finding]:
    prefix = split.config.get('data_prefix')
    if prefix is None or isinstance(prefix, dict):
        return _prefix_names(split, prefix or {})
    name = 'img_path' if 'BaseSegDataset' in names_of(split.kind) else 'img'
    return [error(f'{split.key}.data_prefix', f'is {prefix!r}, expected dict({name}={prefix!r})')]


def _prefix_names(split: Split, prefix: dict[str, Any]) -> list[Finding]:
    """Name keys of ``data_prefix`` that are of the other library's data sets, where the own one is missing."""
    if split.reads_coco and 'seg' not in prefix:
        own = 'img'
    elif 'BaseSegDataset' in names_of(split.kind):
        own = 'img_path'
    else:
        return []
    default = default_of(split.kind, 'data_prefix')
    if own in (prefix or (default if isinstance(default, dict) else {})):
        return []
    if not prefix:
        return [error(f'{split.key}.data_prefix', f'is missing: the folder of the images, dict({own}=...)')]
    given = next((name for name in prefix if name in _PREFIX_NAMES), next(iter(prefix)))
    return [
        error(
            f'{split.key}.data_prefix',
            f'has {shown(list(prefix))} and no {own!r}, which it reads: dict({own}=...); {given!r} is read by other '
            'data sets',
        )
    ]


def _transforms(split: Split) -> list[Finding]:
    findings = []
    for step in split.steps:
        name = kind_name(step)
        if name in OLD_TRANSFORMS:
            findings.append(
                error(
                    f'{split.key}.pipeline',
                    f'{name} is of mmdet 2 or mmseg 0; its successor is {OLD_TRANSFORMS[name]}',
                )
            )
        for (kind, old), new in OLD_TRANSFORM_KEYS.items():
            if name == kind and old in step:
                findings.append(
                    error(f'{split.key}.pipeline', f'{kind}: {old} is of mmdet 2 or mmseg 0; it is {new} now')
                )
        if name in _MIXING:
            told = f'{name} mixes images of the data set: it stands in the pipeline of a MultiImageMixDataset around it'
            findings.append(error(f'{split.key}.pipeline', told))
        package = _PACKAGES.get(name)
        if package and importlib.util.find_spec(package[0]) is None:
            findings.append(
                error(
                    f'{split.key}.pipeline',
                    f'{name} needs {package[0]}, which is not installed: pip install {package[1]}',
                )
            )
    return findings


def check_test_mode(split: Split) -> list[Finding]:
    """Warn where images would be left out of an evaluation because ``test_mode`` is not set."""
    filters = split.config.get('filter_cfg')
    if split.stage == 'train' or split.config.get('test_mode') or not filters:
        return []
    return [
        warning(f'{split.key}.test_mode', f'is not True: filter_cfg={dict(filters)} takes images out of the evaluation')
    ]
