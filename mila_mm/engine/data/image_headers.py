"""Sizes of a ``CocoDataset``'s images by their headers, read without mmdet; ``built.py`` loads whole ones."""

from __future__ import annotations

import time
from pathlib import Path

import cv2
from PIL import Image

from mila_mm.datasets.checks.coco_annotations import UnreadableError, read_coco
from mila_mm.datasets.checks.findings import Finding
from mila_mm.datasets.checks.image_sizes import judge_sizes
from mila_mm.datasets.checks.label_maps import spread
from mila_mm.datasets.checks.survival import loaded_images
from mila_mm.engine.data.files import filter_of
from mila_mm.engine.data.splits import Split, kind_name

# Images of a split that are opened, as many as the whole check opens, and seconds after which no more are.
_IMAGES, _SECONDS = 32, 0.5
# Ways of loading that turn an image as its EXIF orientation bids; mmcv's others leave it as it is stored.
_TURNING = frozenset({'color', 'grayscale'})


def check_image_sizes(split: Split) -> list[Finding]:
    """Compare a sample of images with the sizes in the annotation file; what cannot be read is left to the whole check.

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
    wrong, seen = [], 0
    deadline = time.monotonic() + _SECONDS
    for position in spread(len(images), _IMAGES):
        if seen and time.monotonic() > deadline:
            break
        image = folder / images[position]['file_name']
        told = images[position]['height'], images[position]['width']
        got = _size_as_loaded(image, told)
        if got is None:
            return []
        seen += 1
        if got != told:
            wrong.append((image, got, told))
    return judge_sizes(split.key, wrong, seen, len(images))


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
