"""Name the file when an image or a label map of a dataset cannot be read."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import BaseTransform

from mila_mm.errors import UserError


class NamedLoading:
    """A loading transform that tells which file it failed on, also from a dataloader's worker.

    Args:
        transform: The transform to call.
    """

    def __init__(self, transform: BaseTransform) -> None:
        self.transform = transform

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Call the transform.

        Args:
            results: Sample with ``img_path`` and, for label maps, ``seg_map_path``.

        Returns:
            What the transform returns.

        Raises:
            UserError: If the transform fails and the image or the label map is at fault.
        """
        try:
            return self.transform(results)
        except Exception as error:
            fault = _fault_of_sample(results)
            if fault is None:
                raise
            raise UserError(fault) from error

    def __repr__(self) -> str:
        return repr(self.transform)


def name_unreadable_files(dataset: Any) -> None:
    """Make the loading transforms of a dataset, and of those it wraps, name the file they fail on.

    Args:
        dataset: A dataset of mmengine's kind; one without ``pipeline`` is left as it is.
    """
    for inner in _datasets_in(dataset):
        transforms = getattr(getattr(inner, 'pipeline', None), 'transforms', None)
        if isinstance(transforms, list):
            for index, transform in enumerate(transforms):
                if type(transform).__name__.startswith('Load') and not isinstance(transform, NamedLoading):
                    transforms[index] = NamedLoading(transform)


def _datasets_in(dataset: Any) -> Iterator[Any]:
    yield dataset
    inner = getattr(dataset, 'dataset', None)
    for child in [*([inner] if inner is not None else []), *(getattr(dataset, 'datasets', None) or [])]:
        yield from _datasets_in(child)


def _fault_of_sample(results: dict[str, Any]) -> str | None:
    for kind, key in (('image', 'img_path'), ('label map', 'seg_map_path')):
        path = results.get(key)
        if isinstance(path, (str, os.PathLike)) and '://' not in str(path):
            fault = _fault_of_image(Path(path))
            if fault:
                return f'{kind} {path} {fault}'
    return None


def _fault_of_image(path: Path) -> str | None:
    try:
        content = path.read_bytes()
    except OSError as error:
        return f'cannot be read: {error.strerror}'
    if not content:
        return 'is empty (0 bytes)'
    if cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED) is None:
        return f'cannot be decoded: {len(content)} bytes that are no image that OpenCV knows'
    return None
