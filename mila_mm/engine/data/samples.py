"""Errors of single samples: which file, which position, which transform, also from a dataloader's worker."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from mila_mm.datasets.checks.findings import Finding, error
from mila_mm.engine.config.load import one_line
from mila_mm.errors import UserError, printable_path


class NamedTransform:
    """A transform of a pipeline that tells which sample it failed on.

    Args:
        transform: The transform to call; everything else that is asked of this one is asked of it.
    """

    def __init__(self, transform: Any) -> None:
        self.transform_itself = transform

    def __call__(self, results: dict[str, Any]) -> Any:
        """Call the transform.

        Raises:
            UserError: If the transform fails: the image or label map that cannot be read, else the sample, the
                transform and its error.
        """
        try:
            return self.transform_itself(results)
        except UserError:
            raise
        except Exception as error:
            fault = fault_of_sample(results) if type(self.transform_itself).__name__.startswith('Load') else None
            raise UserError(fault or _of_sample(results, self.transform_itself, error)) from error

    def __getattr__(self, name: str) -> Any:
        if name == 'transform_itself':  # while being unpickled in a worker
            raise AttributeError(name)
        return getattr(self.transform_itself, name)

    def __repr__(self) -> str:
        return repr(self.transform_itself)


def _of_sample(results: Any, transform: Any, error: Exception) -> str:
    known = results if isinstance(results, dict) else {}
    sample = f'sample {known["sample_idx"]}' if 'sample_idx' in known else 'a sample'
    files = [printable_path(known[key]) for key in ('img_path', 'seg_map_path') if known.get(key)]
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    place = '/'.join(Path(frame.f_code.co_filename).parts[-3:])
    name = getattr(transform, '__name__', type(transform).__name__)
    return (
        f'{sample} of the data set{f" ({chr(44).join(files)})" if files else ""}: '
        f'{name} fails with {type(error).__name__}: {one_line(error)} ({place}:{line})'
    )


def name_failing_samples(dataset: Any) -> None:
    """Make the transforms of a dataset, and of those it wraps, name the sample they fail on.

    Args:
        dataset: A dataset of mmengine's kind; one without ``pipeline`` is left as it is.
    """
    for inner in datasets_in(dataset):
        pipeline = getattr(inner, 'pipeline', None)
        # MultiImageMixDataset keeps a list of its own
        transforms = pipeline if isinstance(pipeline, list) else getattr(pipeline, 'transforms', None)
        if isinstance(transforms, list):
            for index, transform in enumerate(transforms):
                if not isinstance(transform, NamedTransform):
                    transforms[index] = NamedTransform(transform)


def datasets_in(dataset: Any) -> Iterator[Any]:
    """Go through a dataset and all that it wraps, outer ones first."""
    yield dataset
    inner = getattr(dataset, 'dataset', None)
    for child in [*([inner] if inner is not None else []), *(getattr(dataset, 'datasets', None) or [])]:
        yield from datasets_in(child)


def has_own_transforms(dataset: Any) -> bool:
    """Tell whether a pipeline holds a transform of the user's, after which images and labels may be anything else."""
    for transform in getattr(getattr(dataset, 'pipeline', None), 'transforms', None) or []:
        inner = getattr(transform, 'transform_itself', transform)
        if type(inner).__module__.partition('.')[0] not in _LIBRARIES:
            return True
    return False


def load_sample(load: Any, info: dict[str, Any], index: int) -> dict[str, Any] | None:
    """Load an image with a transform of the pipeline.

    Raises:
        UserError: If the file is at fault.
    """
    loaded = NamedTransform(load)({**info, 'sample_idx': index})
    path = info.get('img_path')
    if isinstance(path, (str, os.PathLike)) and Path(path).is_file() and is_cut_short(Path(path)):
        raise UserError(f'image {printable_path(path)} {CUT_SHORT}')
    return loaded if isinstance(loaded, dict) and 'ori_shape' in loaded else None


CUT_SHORT = 'is cut short: OpenCV reads it, and leaves the rest grey'


def many(key: str, faults: Sequence[str]) -> list[Finding]:
    """Return one finding for faults of several samples: the first in words, the others counted."""
    more = f' (and {len(faults) - 1} more that fail)' if len(faults) > 1 else ''
    return [error(key, f'{faults[0]}{more}')] if faults else []


def fault_of_sample(results: dict[str, Any]) -> str | None:
    """Say which file of a sample cannot be read, None where all can."""
    for kind, key in (('image', 'img_path'), ('label map', 'seg_map_path')):
        path = results.get(key)
        if isinstance(path, (str, os.PathLike)) and '://' not in str(path):
            fault = fault_of_image(Path(path))
            if fault:
                return f'{kind} {printable_path(path)} {fault}'
    return None


def fault_of_image(path: Path) -> str | None:
    """Say what is wrong with a file that should hold an image, None where it can be read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f'cannot be read: {error.strerror}'
    if not content:
        return 'is empty (0 bytes)'
    if path.suffix.lower() in _IMAGES and cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED) is None:
        return f'cannot be decoded: {len(content)} bytes that are no image that OpenCV knows'
    return None


def is_cut_short(path: Path) -> bool:
    """Tell whether a JPEG has no end. Some have something behind it; what has no end close to its own is decoded."""
    with path.open('rb') as file:
        if file.read(len(JPEG)) != JPEG:
            return False
        file.seek(max(0, path.stat().st_size - _TAIL))
        if _END in file.read():
            return False
    try:
        with Image.open(path) as image:
            image.load()
    except OSError:
        return True
    return False


# How a JPEG begins and ends, and bytes among which its end is looked for.
JPEG, _END, _TAIL = b'\xff\xd8\xff', b'\xff\xd9', 4096
_LIBRARIES = frozenset({'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'mmengine', 'mila_mm'})
# Others, arrays and volumes, are read by transforms of their own.
_IMAGES = frozenset({'.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.ppm', '.pgm', '.gif', ''})
