"""Label maps of mmseg's ``BaseSegDataset`` in two folders, read without mmseg; ``maps.py`` looks at built ones."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from PIL import Image

from mila_mm.datasets.checks.findings import Finding, error
from mila_mm.datasets.checks.label_maps import MapSummary, fault_of_labels, fault_of_map, judge_maps, spread
from mila_mm.engine.data.ignored import ignored_by
from mila_mm.engine.data.splits import Split, kind_name

# Maps of a split that are opened, and seconds after which no more are: the whole check opens more.
_MAPS, _SECONDS = 16, 0.5


def check_map_folder(cfg: Config, split: Split) -> list[Finding]:
    """Check label maps one by one and together; files that cannot be read are left to the whole check.

    Args:
        split: A ``BaseSegDataset`` that is not built.
    """
    ann_file = split.local_ann_file
    if ann_file is not None and ann_file.is_file() and not ann_file.read_bytes().strip():
        return [error(f'{split.key}.ann_file', f'{ann_file} is empty: it lists the names of images, one a line')]
    loads = [step for step in split.steps if kind_name(step) == 'LoadAnnotations']
    config = split.config
    named = [config.get(name) for name in ('ann_file', 'backend_args', 'indices')] + [
        loads[0].get(name) for name in ('imdecode_backend', 'backend_args') if loads
    ]
    if len(loads) != 1 or any(named) or not split.classes:
        return []
    reduced = loads[0].get('reduce_zero_label')
    reduced = bool(config.get('reduce_zero_label', False) if reduced is None else reduced)
    pairs = _pairs(config)
    if not pairs:
        return _no_image(split)
    summary = MapSummary(total=len(pairs))
    ignored = ignored_by(cfg, split.stage)
    deadline = time.monotonic() + _SECONDS
    found: dict[str, Finding] = {}
    for position in spread(len(pairs), _MAPS):
        if summary.seen and time.monotonic() > deadline:
            break
        try:
            finding = _look(*pairs[position], split.classes, ignored, reduced, summary)
        except (OSError, ValueError, SyntaxError, cv2.error):  # no image, or none that is whole
            return []
        if finding is not None:
            found.setdefault(' '.join(finding.message.split(maxsplit=2)[:2]), finding)
    return list(found.values()) or judge_maps(split.key, summary, split.classes, ignored, reduced)


def _no_image(split: Split) -> list[Finding]:
    """Say why no image is found in a folder that is there."""
    config = split.config
    prefix = config.get('data_prefix')
    name = prefix.get('img_path') if isinstance(prefix, dict) else None
    folder = Path(str(config.get('data_root') or ''), name) if isinstance(name, str) else Path()
    if not isinstance(name, str) or '://' in str(config.get('data_root')) + name or not folder.is_dir():
        return []  # told by its key, or left to the whole check
    suffix = config.get('img_suffix', '.jpg')
    names = [path.name for path in folder.rglob('*') if path.is_file()]
    if not isinstance(suffix, str) or any(name.endswith(suffix) for name in names):
        return []
    others = Counter(Path(name).suffix for name in names)
    there = f'{others.most_common(1)[0][1]} files of {others.most_common(1)[0][0]!r}' if others else 'no file'
    return [error(split.key, f'finds no image: img_suffix is {suffix!r}, and {folder} holds {there}')]


def _pairs(config: dict[str, Any]) -> list[tuple[Path, Path]]:
    """Return the image and label map of each sample, as ``BaseSegDataset`` finds them in folders."""
    root, prefix = str(config.get('data_root') or ''), config.get('data_prefix') or {}
    if not isinstance(prefix, dict) or not all(isinstance(prefix.get(n), str) for n in ('img_path', 'seg_map_path')):
        return []
    if any('://' in text for text in (root, *prefix.values())):
        return []
    images, maps = Path(root, prefix['img_path']), Path(root, prefix['seg_map_path'])
    ends, other = config.get('img_suffix', '.jpg'), config.get('seg_map_suffix', '.png')
    if not (isinstance(ends, str) and ends and isinstance(other, str) and images.is_dir()):
        return []
    names = sorted(str(path.relative_to(images)) for path in images.rglob(f'*{ends}') if path.name[0] != '.')
    return [(images / name, maps / f'{name[: -len(ends)]}{other}') for name in names]


def _look(
    image: Path, path: Path, classes: Sequence[str], ignored: Sequence[int], reduced: bool, summary: MapSummary
) -> Finding | None:
    with Image.open(path) as opened:  # as mmseg's loader, which keeps the indices of a palette
        raw, lossy = np.array(opened), opened.format == 'JPEG'
    shape = cv2.imread(str(image)).shape[:2] if image.is_file() else None
    fault = fault_of_map(str(path), raw, str(image), shape, lossy)
    if fault is not None:
        return fault
    raw = raw.squeeze().astype(np.int64)
    labels = raw.copy()
    if reduced:
        labels = np.where((raw == 0) | (raw == 255), 255, raw - 1)
    summary.add(raw, labels)
    return fault_of_labels(str(path), labels, raw, classes, ignored, reduced)
