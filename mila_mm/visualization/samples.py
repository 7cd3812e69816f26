"""Predictions as a test run dumps them, beside the truth, ready to be drawn."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mila_mm.visualization.predictions import Labels, Sample


def read_detections(dump: str | Path, ann_file: str | Path, count: int, score_thr: float = 0.5) -> list[Sample]:
    """Read the first predictions of an instance segmentor.

    Args:
        dump: Pickle that mmdet's ``DumpDetResults`` wrote.
        ann_file: COCO annotations of the same images; their categories must be the model's classes, in this order.
        count: How many images to take.
        score_thr: Detections with a lower score are left out. Defaults to 0.5.

    Returns:
        At most ``count`` samples in the order of the test run.
    """
    coco = COCO(str(ann_file))
    class_of = {category: index for index, category in enumerate(coco.getCatIds())}
    samples = []
    for result in _read(dump, count):
        truth = coco.imgToAnns[result['img_id']]
        found = {key: np.asarray(value) for key, value in result['pred_instances'].items() if key != 'masks'}
        # The surest last, so that it is drawn on top
        kept = [i for i in np.argsort(found['scores']) if found['scores'][i] >= score_thr]
        samples.append(
            Sample(
                image=_read_image(result['img_path']),
                truth=Labels(
                    masks=_stack([coco.annToMask(ann) for ann in truth], result['ori_shape']),
                    classes=np.array([class_of[ann['category_id']] for ann in truth], dtype=int),
                    boxes=np.array([_corners(ann['bbox']) for ann in truth]).reshape(-1, 4),
                ),
                prediction=Labels(
                    masks=_stack(
                        [coco_mask.decode(result['pred_instances']['masks'][i]) for i in kept], result['ori_shape']
                    ),
                    classes=found['labels'][kept].astype(int),
                    boxes=found['bboxes'][kept],
                    scores=found['scores'][kept],
                ),
            )
        )
    return samples


def read_segmentations(dump: str | Path, count: int, num_drawn: int, reduce_zero_label: bool = True) -> list[Sample]:
    """Read the first predictions of a segmentor.

    Args:
        dump: Pickle that :class:`mila_mm.engine.DumpSegResults` wrote.
        count: How many images to take.
        num_drawn: Classes from 0 to below this number become masks; the others stay as they are in the image.
        reduce_zero_label: Whether the label maps on disk count classes from 1. Defaults to True.

    Returns:
        At most ``count`` samples in the order of the test run.
    """
    samples = []
    for result in _read(dump, count):
        stored = cv2.imread(result['seg_map_path'], cv2.IMREAD_UNCHANGED)
        truth = stored.astype(int) - int(reduce_zero_label)
        prediction = np.asarray(result['pred_sem_seg']['data'])[0]
        samples.append(
            Sample(
                image=_read_image(result['img_path']),
                truth=_class_masks(truth, num_drawn),
                prediction=_class_masks(prediction, num_drawn),
            )
        )
    return samples


def _read(dump: str | Path, count: int) -> list[dict[str, Any]]:
    with Path(dump).open('rb') as file:
        return pickle.load(file)[:count]


def _read_image(path: str) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def _stack(masks: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
    """Stack masks to (N, H, W) bool, also where there is none."""
    return np.array(masks, dtype=bool).reshape(-1, *shape[:2])


def _corners(box: Sequence[float]) -> list[float]:
    """Turn x, y, width, height into the two corners."""
    x, y, width, height = box
    return [x, y, x + width, y + height]


def _class_masks(labels: np.ndarray, num_drawn: int) -> Labels:
    classes = np.intersect1d(labels, np.arange(num_drawn))
    return Labels(masks=labels[None] == classes[:, None, None], classes=classes)
