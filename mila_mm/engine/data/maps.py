"""Label maps of a data set that is built, as its own transforms load them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmengine import fileio

from mila_mm.datasets.checks.findings import Finding, error, note, shown, warning
from mila_mm.datasets.checks.label_maps import MapSummary, fault_of_labels, fault_of_map, judge_maps
from mila_mm.datasets.checks.panoptic import fault_of_panoptic
from mila_mm.engine.data.loaded import info_of, length_of
from mila_mm.engine.data.samples import JPEG, NamedTransform, load_sample, many
from mila_mm.errors import UserError

_IMAGES = frozenset({'.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp'})
# Of sets above this size the folders are not compared.
_MANY_FILES = 50_000


def check_label_maps(
    leaf: Any,
    key: str,
    load_image: Any,
    load_map: Any,
    chosen: Sequence[int],
    classes: Sequence[str],
    ignored: Sequence[int],
    deadline: float,
    counts: dict[str, Any],
) -> list[Finding]:
    """Check label maps one by one and together.

    Args:
        leaf: The data set.
        key: Where it stands in the config.
        load_image: Transform that loads images, or None.
        load_map: Transform that loads label maps.
        chosen: Positions to look at.
        classes: Class names.
        ignored: Labels that the loss ignores.
        deadline: When to stop, on the monotonic clock.
        counts: Takes the numbers.
    """
    summary = MapSummary(total=length_of(leaf))
    reduced = bool(getattr(leaf, 'reduce_zero_label', False) or getattr(load_map, 'reduce_zero_label', False))
    broken: list[str] = []
    for index in chosen:
        if summary.seen and time.monotonic() > deadline:
            break
        try:
            finding = _look(info_of(leaf, index), index, load_image, load_map, classes, ignored, reduced, summary)
        except UserError as fault:
            broken.append(str(fault))
            continue
        if finding is not None:
            kind = finding.message.split(maxsplit=2)[:2]
            summary.findings.setdefault(' '.join(kind), finding)
    findings = [*many(key, broken), *summary.findings.values()]
    if not findings:
        findings += judge_maps(key, summary, classes, ignored, reduced)
    findings += _partners(leaf, key)
    pixels = sum(summary.labels.values())
    counts['label_maps'] = length_of(leaf)
    counts['label_maps_seen'] = summary.seen
    if pixels:
        known = {name: summary.labels.get(index, 0) for index, name in enumerate(classes)}
        counts['pixels_per_class'] = known
        counts['ignored_pixels'] = round(sum(summary.labels.get(label, 0) for label in ignored) / pixels, 4)
    return findings


def _look(
    info: dict[str, Any],
    index: int,
    load_image: Any,
    load_map: Any,
    classes: Sequence[str],
    ignored: Sequence[int],
    reduced: bool,
    summary: MapSummary,
) -> Finding | None:
    path = str(info['seg_map_path'])
    image = load_sample(load_image, info, index) if load_image is not None else None
    loaded = NamedTransform(load_map)({**info, **(image or {}), 'sample_idx': index, 'seg_fields': []})
    labels = loaded.get('gt_seg_map') if isinstance(loaded, dict) else None
    if labels is None:
        return None
    content = fileio.get(path, backend_args=load_map.backend_args)
    raw = mmcv.imfrombytes(content, flag='unchanged', backend=load_map.imdecode_backend)
    shape = None if image is None else image['img_shape'][:2]
    fault = fault_of_map(path, raw, str(info.get('img_path')), shape, lossy=content.startswith(JPEG))
    if fault is not None:
        return fault
    raw = raw.squeeze()
    if raw.shape != labels.shape:
        return None
    summary.add(raw.astype(np.int64), labels.astype(np.int64))
    return fault_of_labels(path, labels.astype(np.int64), raw, classes, ignored, reduced)


def check_panoptic_maps(leaf: Any, load_image: Any, chosen: Sequence[int], deadline: float) -> list[Finding]:
    """Check the maps of a panoptic data set against its annotations; the first fault of each kind is told.

    Args:
        leaf: The data set; its samples have ``segments_info``.
        load_image: Transform that loads images.
        chosen: Positions to look at.
        deadline: When to stop, on the monotonic clock.
    """
    first: dict[tuple[str, str], Finding] = {}
    count: Counter[tuple[str, str]] = Counter()
    for number, index in enumerate(chosen):
        if number and time.monotonic() > deadline:
            break
        info = info_of(leaf, index)
        image = load_sample(load_image, info, index)
        if image is None or not info.get('seg_map_path'):
            continue
        path = str(info['seg_map_path'])
        content = fileio.get(path, backend_args=getattr(load_image, 'backend_args', None))
        raw = mmcv.imfrombytes(content, flag='unchanged')
        if raw is None:
            return [error(f'panoptic map {path}', f'cannot be decoded: {len(content)} bytes')]
        segments = [segment['id'] for segment in info['segments_info']]
        fault = fault_of_panoptic(path, raw, segments, str(info['img_path']), image['ori_shape'])
        if fault is not None:
            kind = fault.level, fault.message.split(maxsplit=1)[0]
            count[kind] += 1
            first.setdefault(kind, fault)
    more = {kind: f' (and {count[kind] - 1} more like it)' if count[kind] > 1 else '' for kind in first}
    return [Finding(found.level, found.where, f'{found.message}{more[kind]}') for kind, found in first.items()]


def _partners(leaf: Any, key: str) -> list[Finding]:
    """Name images without a label map, label maps without an image, and images of a suffix that is not read."""
    prefix = getattr(leaf, 'data_prefix', None) or {}
    images, maps = prefix.get('img_path'), prefix.get('seg_map_path')
    suffixes = getattr(leaf, 'img_suffix', None), getattr(leaf, 'seg_map_suffix', None)
    local = all(isinstance(name, str) and Path(name).is_dir() for name in (images, maps))
    if not local or not all(isinstance(suffix, str) for suffix in suffixes) or length_of(leaf) > _MANY_FILES:
        return []
    infos = [info_of(leaf, index) for index in range(length_of(leaf))]
    lonely = [info['img_path'] for info in infos if not Path(info.get('seg_map_path') or images).exists()]
    if lonely:
        return [
            error(key, f'{len(lonely)} of {len(infos)} images have no label map ({suffixes[1]!r}): {shown(lonely, 2)}')
        ]
    listed = isinstance(getattr(leaf, 'ann_file', ''), str) and Path(getattr(leaf, 'ann_file', '') or '.').is_file()
    if listed or getattr(leaf, '_indices', None) is not None:
        return []  # some of the files are chosen
    findings = []
    known = {str(Path(info['seg_map_path'])) for info in infos}
    spare = [str(p) for p in sorted(Path(maps).rglob(f'*{suffixes[1]}')) if str(p) not in known]
    if spare:
        findings.append(note(key, f'{len(spare)} label maps have no image ({suffixes[0]!r}): {shown(spare, 2)}'))
    read = {str(Path(info['img_path'])) for info in infos}
    there = [p for p in sorted(Path(images).rglob('*')) if p.suffix.lower() in _IMAGES]
    others = [p for p in there if str(p) not in read | known and not p.name.endswith(suffixes[0])]
    if others and images != maps:
        share = len(others) / (len(others) + len(read))
        level = warning if share > 0.05 else note
        text = f'{len(others)} images in {images} are not read, for img_suffix is {suffixes[0]!r}: {others[0]}'
        findings.append(level(key, text))
    return findings
