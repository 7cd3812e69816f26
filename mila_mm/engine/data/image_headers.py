"""Sizes of a ``CocoDataset``'s images by their headers, read without mmdet; ``built.py`` loads whole ones."""

from __future__ import annotations

import os.path as osp
import time
from pathlib import Path

import cv2
from PIL import Image

from mila_mm.datasets.checks.absent import absent_files
from mila_mm.datasets.checks.coco_annotations import UnreadableError, read_coco
from mila_mm.datasets.checks.findings import Finding
from mila_mm.datasets.checks.image_sizes import judge_sizes
from mila_mm.datasets.checks.label_maps import spread
from mila_mm.datasets.checks.survival import loaded_images
from mila_mm.engine.data.files import filter_of
from mila_mm.engine.data.samples import CUT_SHORT, fault_of_image, is_cut_short, many
from mila_mm.engine.data.splits import Split, kind_name
from mila_mm.errors import printable_path

# Images of a split that are opened, as many as the whole check opens, and seconds after which no more are.
_IMAGES, _SECONDS = 32, 0.5
# Ways of loading that turn an image as its EXIF orientation bids; mmcv's others leave it as it is stored.
_TURNING = frozenset({'color', 'grayscale'})


def check_image_sizes(split: Split) -> list[Finding]:
    """Check that a sample of images is there, whole and of the sizes in the annotation file.

    Args:
        split: A ``CocoDataset`` that is not built, whose file is well-formed.
    """
    path, folder = split.local_ann_file, _folder(split)
    chosen = split.config.get('indices') is not None
    if path is None or folder is None or chosen or not is_loaded_plainly(split):
        return []
    try:
        images = loaded_images(read_coco(path), filter_of(split))
    except UnreadableError:
        return []
    wrong, broken, seen = [], [], 0
    deadline = time.monotonic() + _SECONDS
    sample = [images[position] for position in spread(len(images), _IMAGES)]
    absent = absent_files(split.key, 'image', [_joined(folder, image['file_name']) for image in sample])
    for entry in sample if not absent else []:
        if seen and time.monotonic() > deadline:
            break
        image = folder / entry['file_name']
        told = entry['height'], entry['width']
        got = _size_as_loaded(image, told)
        suspect = got is None or is_cut_short(image)
        fault = (fault_of_image(image) or (None if got is None else CUT_SHORT)) if suspect else None
        if fault is not None:
            broken.append(f'image {printable_path(image)} {fault}')
            continue
        if got is None:
            return []
        seen += 1
        if got != told:
            wrong.append((image, got, told))
    return [*absent, *many(split.key, broken), *judge_sizes(split.key, wrong, seen, len(images))]


def _joined(folder: Path, name: str) -> str:
    """Join as mmdet's loader does, so that the path is told as it tells it."""
    return osp.join(folder, name)


def _folder(split: Split) -> Path | None:
    """Return the folder of the images, None where something else than a plain list of files there is read."""
    config = split.config
    prefix = config.get('data_prefix')
    name, root = prefix.get('img') if isinstance(prefix, dict) else None, str(config.get('data_root') or '')
    if not isinstance(name, str) or '://' in root + name or config.get('backend_args'):
        return None
    return Path(root, name)


def is_loaded_plainly(split: Split) -> bool:
    """Tell whether a pipeline loads images from files, with OpenCV and turned by EXIF, and by nothing else."""
    loads = [step for step in split.steps if kind_name(step).startswith('Load') and 'Image' in kind_name(step)]
    if len(loads) != 1 or kind_name(loads[0]) != 'LoadImageFromFile':
        return False
    options = {name: value for name, value in loads[0].items() if value is not None}
    return (
        options.get('color_type', 'color') in _TURNING
        and options.get('imdecode_backend', 'cv2') == 'cv2'
        and options.keys() <= {'type', 'color_type', 'imdecode_backend', 'to_float32', 'ignore_empty'}
    )


def _size_as_loaded(path: Path, told: tuple[int, int]) -> tuple[int, int] | None:
    """Return an image's (height, width), None where it is not read.

    A header that says what is expected is believed. Where it does not, or may bid a turn, OpenCV has the last word:
    which kinds of files it turns differs between its versions.
    """
    try:
        with Image.open(path) as image:
            size, may_turn = (image.height, image.width), 'exif' in image.info
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    if size == told and not may_turn:
        return size
    loaded = cv2.imread(str(path))
    return None if loaded is None else (loaded.shape[0], loaded.shape[1])
