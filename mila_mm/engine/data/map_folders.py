"""Label maps in two folders, as mmseg's ``BaseSegDataset`` pairs them, read without it; ``maps.py`` has built ones."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.fileio import list_dir_or_file, list_from_file
from PIL import Image

from mila_mm.datasets.checks.absent import absent_files
from mila_mm.datasets.checks.findings import Finding, error
from mila_mm.datasets.checks.label_maps import MapSummary, fault_of_labels, fault_of_map, judge_maps, spread
from mila_mm.engine.data.ignored import ignored_by
from mila_mm.engine.data.image_headers import is_loaded_plainly
from mila_mm.engine.data.kinds import default_of, keeps
from mila_mm.engine.data.samples import fault_of_sample, many
from mila_mm.engine.data.splits import Split, kind_name

# Maps of a split that are opened, and seconds after which no more are: the whole check opens more.
_MAPS, _SECONDS = 16, 0.5
# Maps of a split that must be there.
_LOOKED_FOR = 1000
_LOADING = (
    'load_data_list',
    'get_data_info',
    'get_label_map',
    '_join_prefix',
    'full_init',
    'prepare_data',
    '__getitem__',
)


def check_map_folder(cfg: Config, split: Split) -> list[Finding]:
    """Check label maps one by one and together; files that cannot be read are left to the whole check.

    Args:
        split: A data set of mmseg's that is not built.
    """
    ann_file = split.local_ann_file
    if ann_file is not None and ann_file.is_file() and not ann_file.read_bytes().strip():
        return [error(f'{split.key}.ann_file', f'{ann_file} is empty: it lists the names of images, one a line')]
    loads = [step for step in split.steps if kind_name(step) == 'LoadAnnotations']
    config = split.config
    named = [config.get(name) for name in ('backend_args', 'indices')] + [
        loads[0].get(name) for name in ('imdecode_backend', 'backend_args') if loads
    ]
    plain = len(loads) == 1 and loads[0] in (config.get('pipeline') or ()) and not any(named)
    if not plain or not split.classes or not _reads_folders(split):
        return []
    reduced = loads[0].get('reduce_zero_label')
    reduced = bool(_setting(split, 'reduce_zero_label') if reduced is None else reduced)
    folder, suffix = _folder(config, 'img_path'), _setting(split, 'img_suffix')
    if folder is None or not isinstance(suffix, str) or not suffix:
        return []  # told by its key, or left to the whole check
    names = _names(split, folder, suffix)
    if not names:
        return [_no_image(split.key, folder, suffix)] if names is not None else []
    maps, other = _folder(config, 'seg_map_path'), _setting(split, 'seg_map_suffix')
    if maps is None or not isinstance(other, str):
        return []
    pairs = [(folder / name, maps / f'{name[: -len(suffix)]}{other}') for name in names]
    sample = [pairs[position] for position in spread(len(pairs), _LOOKED_FOR)]
    absent = absent_files(split.key, 'image', [image for image, _ in sample])
    absent += absent_files(split.key, 'label map', [path for _, path in sample])
    return absent or _check_maps(split, pairs, split.classes, ignored_by(cfg, split.stage), reduced)


def _names(split: Split, folder: Path, suffix: str) -> list[str] | None:
    """Return the names of the images, listed or found, None where they are not known."""
    listed = split.local_ann_file
    if listed is not None:
        return [f'{line.strip()}{suffix}' for line in list_from_file(listed)] if listed.is_file() else None
    files = _files(folder) if not split.config.get('ann_file') else None
    return None if files is None else [name for name in files if name.endswith(suffix)]


def _reads_folders(split: Split) -> bool:
    """Tell whether a data set pairs the files of two folders as ``BaseSegDataset`` does, its labels as they are."""
    own = split.config.get('metainfo')
    renamed = isinstance(own, dict) and 'classes' in own and 'classes' in split.meta
    return not renamed and keeps(split.kind, 'mmseg', 'BaseSegDataset', _LOADING)


def _setting(split: Split, name: str) -> Any:
    return split.config.get(name, default_of(split.kind, name))


def _check_maps(
    split: Split, pairs: Sequence[tuple[Path, Path]], classes: Sequence[str], ignored: Sequence[int], reduced: bool
) -> list[Finding]:
    """Check label maps beside their images."""
    summary = MapSummary(total=len(pairs))
    plain = is_loaded_plainly(split)
    deadline = time.monotonic() + _SECONDS
    found: dict[str, Finding] = {}
    broken: list[str] = []
    for position in spread(len(pairs), _MAPS):
        if summary.seen and time.monotonic() > deadline:
            break
        image, path = pairs[position]
        try:
            finding = _look(image if plain else None, path, classes, ignored, reduced, summary)
        except (OSError, ValueError, SyntaxError, cv2.error, Image.DecompressionBombError):
            fault = fault_of_sample({'img_path': image, 'seg_map_path': path})
            if fault is None:
                return []  # which another library may read
            broken.append(fault)
            continue
        if finding is not None:
            found.setdefault(' '.join(finding.message.split(maxsplit=2)[:2]), finding)
    told = [*many(split.key, broken), *found.values()]
    return told or judge_maps(split.key, summary, classes, ignored, reduced)


def _folder(config: dict[str, Any], name: str) -> Path | None:
    """Return a folder of a data set, None where it is not there or a file backend serves it."""
    root, prefix = str(config.get('data_root') or ''), config.get('data_prefix')
    below = prefix.get(name) if isinstance(prefix, dict) else None
    if not isinstance(below, str) or '://' in root + below or not Path(root, below).is_dir():
        return None
    return Path(root, below)


def _files(folder: Path) -> list[str] | None:
    """List a folder as ``BaseSegDataset`` does, through links, None where that takes long or is not allowed."""
    deadline = time.monotonic() + _SECONDS
    names = []
    try:
        for name in list_dir_or_file(folder, list_dir=False, recursive=True):
            if time.monotonic() > deadline:
                return None
            names.append(name)
    except OSError:
        return None
    return sorted(names)


def _no_image(key: str, folder: Path, suffix: str) -> Finding:
    """Say that no image is found in a folder that is there."""
    others = Counter(Path(name).suffix for name in _files(folder) or ())
    there = f'{others.most_common(1)[0][1]} files of {others.most_common(1)[0][0]!r}' if others else 'no file'
    return error(key, f'finds no image: img_suffix is {suffix!r}, and {folder} holds {there}')


def _look(
    image: Path | None,
    path: Path,
    classes: Sequence[str],
    ignored: Sequence[int],
    reduced: bool,
    summary: MapSummary,
) -> Finding | None:
    """Check one label map, and its size where it is known how its image is loaded."""
    with Image.open(path) as opened:  # as mmseg's loader, which keeps the indices of a palette
        raw, lossy = np.array(opened), opened.format == 'JPEG'
    loaded = cv2.imread(str(image)) if image is not None else None
    if image is not None and loaded is None:
        raise ValueError
    shape = None if loaded is None else loaded.shape[:2]
    fault = fault_of_map(str(path), raw, str(image), shape, lossy)
    if fault is not None:
        return fault
    raw = raw.squeeze().astype(np.int64)
    labels = raw.copy()
    if reduced:
        labels = np.where((raw == 0) | (raw == 255), 255, raw - 1)
    summary.add(raw, labels)
    return fault_of_labels(str(path), labels, raw, classes, ignored, reduced)
