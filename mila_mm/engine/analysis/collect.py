"""Keep what a test predicts, small enough for a whole set, beside the truth that the data set loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from pycocotools import mask as coco_mask

from mila_mm.engine.analysis.detections import Image, Objects
from mila_mm.engine.analysis.label_maps import confusion_of, intersection_over_union
from mila_mm.engine.data.samples import datasets_in


class CollectHook(Hook):
    """Collect the predictions of a test.

    Attributes:
        images: Of a detector, each image with truth and prediction.
        confusion: Of a segmentor, (C, C) pixels, None before the first image.
        scores: Of a segmentor, path and mIoU of each image.
        has_masks: Whether a detector predicts masks.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.images: list[Image] = []
        self.confusion: np.ndarray | None = None
        self.scores: list[tuple[str, float, np.ndarray, np.ndarray]] = []
        self.has_masks = False
        self.classes: list[str] = []
        self.palette: Any = None
        self._truth: dict[str, list[dict[str, Any]]] = {}

    def before_test(self, runner: Runner) -> None:
        """Read the truth as the data set loads it."""
        dataset = runner.test_dataloader.dataset
        self.classes = list(dataset.metainfo['classes'])
        self.palette = dataset.metainfo.get('palette')
        for leaf in datasets_in(dataset):
            if hasattr(leaf, 'get_data_info') and not getattr(leaf, 'datasets', None):
                infos = (leaf.get_data_info(index) for index in range(len(leaf)))
                self._truth.update({info['img_path']: info['instances'] for info in infos if 'instances' in info})

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence[BaseDataElement] | None = None
    ) -> None:
        """Take in a batch."""
        for sample in outputs or ():
            if 'pred_instances' in sample:
                self.images.append(self._image(sample))
            elif 'pred_sem_seg' in sample and 'gt_sem_seg' in sample:
                self._label_map(sample)

    def _image(self, sample: BaseDataElement) -> Image:
        size = tuple(int(side) for side in sample.ori_shape[:2])
        found = sample.pred_instances.cpu()
        masks = found.get('masks')
        if masks is not None:
            self.has_masks = True
            masks = masks if isinstance(masks, list) else [_encode(mask) for mask in np.asarray(masks)]
        boxes = getattr(found.bboxes, 'tensor', found.bboxes).numpy().reshape(-1, 4)
        labels, scores = found.labels.numpy(), found.scores.numpy()
        objects = Objects(boxes, labels, scores, np.zeros(len(boxes), bool), masks)
        return Image(sample.img_path, size, self._truth_of(sample.img_path, size), objects)  # type: ignore[arg-type]

    def _truth_of(self, path: str, size: tuple[int, ...]) -> Objects:
        instances = self._truth.get(path, [])
        boxes = np.asarray([instance['bbox'] for instance in instances], float).reshape(-1, 4)
        masks = [_as_runs(instance['mask'], size) for instance in instances if instance.get('mask')]
        return Objects(
            boxes,
            np.asarray([instance['bbox_label'] for instance in instances], int),
            np.ones(len(boxes)),
            np.asarray([bool(instance.get('ignore_flag')) for instance in instances], bool),
            masks if len(masks) == len(boxes) else None,
        )

    def _label_map(self, sample: BaseDataElement) -> None:
        truth = sample.gt_sem_seg.data.squeeze(0).cpu().numpy()
        found = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
        confusion = confusion_of(truth, found, len(self.classes))
        self.confusion = confusion if self.confusion is None else self.confusion + confusion
        iou = intersection_over_union(confusion)
        mean = float(np.nanmean(iou)) if np.isfinite(iou).any() else float('nan')
        small = np.uint8 if len(self.classes) < 255 else np.int16
        self.scores.append((sample.img_path, mean, truth.astype(small), found.astype(small)))
        self._forget()

    def _forget(self, worst: int = 20) -> None:
        """Keep the maps of the worst images only: those of a whole set would fill the memory."""
        order = sorted(range(len(self.scores)), key=lambda i: np.nan_to_num(self.scores[i][1], nan=2.0))
        for index in order[worst:]:
            path, mean, *_ = self.scores[index]
            self.scores[index] = (path, mean, np.zeros((0, 0), np.uint8), np.zeros((0, 0), np.uint8))


def _encode(mask: np.ndarray) -> dict[str, Any]:
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def _as_runs(mask: Any, size: tuple[int, ...]) -> dict[str, Any]:
    """Return a mask of a data set, polygons or runs of either kind, as compressed runs."""
    if isinstance(mask, dict) and not isinstance(mask['counts'], list):
        return mask
    runs = coco_mask.frPyObjects(mask, *size)
    return coco_mask.merge(runs) if isinstance(runs, list) else runs
