"""Checks of data sets that are built: what their own loaders give, whatever their kind."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mila_mm.datasets.checks.absent import absent_files
from mila_mm.datasets.checks.findings import Finding, brief, error, warning
from mila_mm.datasets.checks.image_sizes import judge_sizes
from mila_mm.datasets.checks.label_maps import spread
from mila_mm.datasets.checks.voc_xml import check_object_names
from mila_mm.engine.data.loaded import info_of, length_of
from mila_mm.engine.data.maps import check_label_maps, check_panoptic_maps
from mila_mm.engine.data.samples import datasets_in, has_own_transforms, load_sample, many
from mila_mm.engine.data.splits import is_coco, reads_voc
from mila_mm.errors import UserError


@dataclass(frozen=True)
class Effort:
    """How much is looked at.

    Attributes:
        samples: Images and label maps of a split that are opened, 0 for all.
        seconds: Time after which opening stops, whatever ``samples`` says.
    """

    samples: int = 16
    seconds: float = math.inf


@dataclass
class Looked:
    """What a check of a built data set saw.

    Attributes:
        findings: What is wrong.
        counts: Numbers for the report.
    """

    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)

    def has_errors(self) -> bool:
        """Tell whether something is wrong, not only doubtful."""
        return any(finding.level == 'error' for finding in self.findings)


def check_built(
    dataset: Any,
    key: str,
    stage: str,
    effort: Effort,
    ignored: Sequence[int] = (255,),
    stuff: Sequence[str] = (),
) -> Looked:
    """Check a data set that is built: images, boxes, labels, label maps, as its own loader gives them.

    Args:
        dataset: A data set of mmengine's kind, wrapped or not.
        key: Where it stands in the config.
        stage: 'train', 'val' or 'test'.
        effort: How much is looked at.
        ignored: Labels that the loss ignores.
        stuff: Names of what a detector's semantic branch tells apart, () where it has none.
    """
    looked = Looked()
    leaves = [inner for inner in datasets_in(dataset) if hasattr(inner, 'get_data_info') and not _wraps(inner)]
    for leaf in leaves:
        if getattr(leaf, 'data_address', None) is None and not getattr(leaf, 'data_list', None):
            looked.findings.append(error(key, 'finds no image that it can use'))
            continue
        deadline = time.monotonic() + effort.seconds / len(leaves)
        _one(leaf, key, stage, effort, deadline, ignored, stuff, looked)
    return looked


def _wraps(dataset: Any) -> bool:
    return getattr(dataset, 'dataset', None) is not None or bool(getattr(dataset, 'datasets', None))


def _one(
    leaf: Any,
    key: str,
    stage: str,
    effort: Effort,
    deadline: float,
    ignored: Sequence[int],
    stuff: Sequence[str],
    looked: Looked,
) -> None:
    total = length_of(leaf)
    classes = (getattr(leaf, 'metainfo', None) or {}).get('classes')
    classes = classes if isinstance(classes, (list, tuple)) else None
    looked.counts['images'] = looked.counts.get('images', 0) + total
    chosen = spread(total, effort.samples)
    infos = [info_of(leaf, index) for index in chosen]
    if 'instances' in infos[0] and not is_coco(type(leaf)):
        if reads_voc(type(leaf)) and classes:
            looked.findings += check_object_names(key, [Path(info['xml_path']) for info in infos], classes)
        _check_instances(leaf, key, stage, classes, deadline, looked)
    _check_paths(key, chosen, infos, looked)
    if looked.has_errors():
        return
    load_image, load_map = _loaders(leaf)
    has_maps = load_map is not None and infos[0].get('seg_map_path')
    # A detector's semantic branch has classes of its own, which only the model knows.
    own = stuff if 'instances' in infos[0] else classes
    if has_maps and own and not has_own_transforms(leaf):
        looked.findings += check_label_maps(
            leaf, key, load_image, load_map, chosen, own, tuple(ignored), deadline, looked.counts
        )
    if load_image is None or (has_maps and 'instances' not in infos[0]):
        return
    _check_sizes(leaf, key, load_image, chosen, deadline, looked)
    if infos[0].get('segments_info') and infos[0].get('seg_map_path') and not looked.has_errors():
        looked.findings += check_panoptic_maps(leaf, load_image, chosen, deadline)


def _loaders(leaf: Any) -> tuple[Any, Any]:
    """Return the transforms of a pipeline that load an image and a label map, None where it has none of the usual."""
    found: dict[str, Any] = {}
    for transform in getattr(getattr(leaf, 'pipeline', None), 'transforms', None) or []:
        inner = getattr(transform, 'transform_itself', transform)
        found.setdefault(type(inner).__name__, inner)
    load_map = found.get('LoadAnnotations')
    is_map = load_map is not None and getattr(load_map, 'with_seg', False)
    return found.get('LoadImageFromFile'), load_map if is_map else None


def _check_instances(
    leaf: Any, key: str, stage: str, classes: Sequence[str] | None, deadline: float, looked: Looked
) -> None:
    """Check boxes and labels as the loader gives them, one by one."""
    first: dict[str, tuple[str, str]] = {}
    count: Counter[str] = Counter()
    per_class: Counter[int] = Counter()
    seen = without_box = 0
    for index in range(length_of(leaf)):
        if seen and not index % 64 and time.monotonic() > deadline:
            break
        seen += 1
        info = info_of(leaf, index)
        for position, instance in enumerate(info.get('instances') or []):
            without_box += 'bbox' not in instance  # phrases have masks alone
            for kind, what in _faults_of_instance(instance, classes):
                count[kind] += 1
                where = f'sample {index} ({info.get("img_path")}), instances[{position}]'
                first.setdefault(kind, (where, what))
            if not instance.get('ignore_flag') and isinstance(instance.get('bbox_label'), (int, np.integer)):
                per_class[int(instance['bbox_label'])] += 1
    for kind, (where, what) in first.items():
        more = f' (and {count[kind] - 1} more like it)' if count[kind] > 1 else ''
        level = warning if kind == 'empty' else error
        looked.findings.append(level(key, f'{where}: {what}{more}'))
    looked.counts['boxes_loaded'] = looked.counts.get('boxes_loaded', 0) + sum(per_class.values())
    if classes:
        looked.counts['per_class'] = {name: per_class.get(index, 0) for index, name in enumerate(classes)}
    if seen == length_of(leaf) and not per_class and not first and not without_box:
        text = f'no box is left in {length_of(leaf)} images'
        looked.findings.append(error(key, f'{text}: nothing to learn') if stage == 'train' else warning(key, text))


def _faults_of_instance(instance: dict[str, Any], classes: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    bbox, label = instance.get('bbox'), instance.get('bbox_label')
    if bbox is not None:
        try:
            numbers = np.asarray(bbox, dtype=float)
        except (TypeError, ValueError):
            numbers = np.full(0, np.nan)
        if numbers.size < 4 or not np.isfinite(numbers).all():
            yield 'bbox', f'bbox is {brief(bbox)}, expected [x1, y1, x2, y2]'
        elif numbers.shape == (4,) and (numbers[2] <= numbers[0] or numbers[3] <= numbers[1]):
            yield 'empty', f'bbox {brief(bbox)} has no area (expected [x1, y1, x2, y2], not width and height)'
    if instance.get('ignore_flag'):
        return  # CrowdHuman's loader gives what is ignored the label -1
    if (
        classes
        and isinstance(label, (int, np.integer))
        and not isinstance(label, bool)
        and label not in range(len(classes))
    ):
        yield 'label', f'bbox_label is {label}, the {len(classes)} classes are 0 to {len(classes) - 1}'
    elif label is not None and not isinstance(label, (int, np.integer, list, np.ndarray)):
        yield 'label type', f'bbox_label is {brief(label)}, expected a whole number'


def _check_paths(key: str, chosen: Sequence[int], infos: Sequence[dict[str, Any]], looked: Looked) -> None:
    """Check that images and label maps of the sample exist."""
    for kind, name in (('image', 'img_path'), ('label map', 'seg_map_path')):
        local = [
            info[name]
            for info in infos
            if isinstance(info.get(name), (str, os.PathLike)) and '://' not in str(info[name])
        ]
        looked.findings += absent_files(key, kind, local)


def _check_sizes(leaf: Any, key: str, load: Any, chosen: Sequence[int], deadline: float, looked: Looked) -> None:
    """Compare the size of the image that is loaded with that which its annotations are for."""
    wrong, broken, seen = [], [], 0
    for index in chosen:
        if seen and time.monotonic() > deadline:
            break
        info = info_of(leaf, index)
        told = info.get('height'), info.get('width')
        try:
            loaded = load_sample(load, info, index)
        except UserError as fault:
            broken.append(str(fault))
            continue
        if loaded is None:
            return
        seen += 1
        got = loaded['ori_shape'][:2]
        if all(isinstance(side, (int, float)) for side in told) and tuple(got) != tuple(told):
            wrong.append((info['img_path'], got, told))
    looked.findings += many(key, broken)
    looked.findings += judge_sizes(key, wrong, seen, length_of(leaf))
