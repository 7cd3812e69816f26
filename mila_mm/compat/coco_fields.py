"""Annotations of COCO's layout without "area" or "iscrowd", as many exporters write them."""

import functools
from types import ModuleType
from typing import Any

from mila_mm.compat.import_hook import when_imported


def fill_in_fields(module: ModuleType) -> None:
    """Let a reader of COCO's files give annotations what they lack; ``module`` is one with a class ``COCO``.

    pycocotools computes both for results (``COCO.loadRes``: the area of a box, no crowd), but takes them for given in
    the truth: mmdet's loader and COCO's evaluation then end with a KeyError. What a file says stays as it is.
    """
    index = module.COCO.createIndex
    if hasattr(index, '__wrapped__'):
        return

    @functools.wraps(index)
    def create_index(self: Any) -> None:
        for annotation in self.dataset.get('annotations', []):
            bbox = annotation.get('bbox') if isinstance(annotation, dict) else None
            if isinstance(bbox, list) and len(bbox) == 4:
                annotation.setdefault('iscrowd', 0)
                if 'area' not in annotation:
                    annotation['area'] = bbox[2] * bbox[3]
        index(self)

    module.COCO.createIndex = create_index


def install() -> None:
    """Patch both readers as soon as they are imported."""
    when_imported('pycocotools.coco', fill_in_fields)
    when_imported('faster_coco_eval.core.coco', fill_in_fields)
