"""What predictions are written as: pictures, a video, COCO's JSON, label maps."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.structures import BaseDataElement

from mila_mm.engine.config.checks import check_work_dir
from mila_mm.engine.inference.predictor import Predictor
from mila_mm.engine.inference.sources import PICTURES, Picture, Source
from mila_mm.errors import UserError

_WRITABLE = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
_INSTANCE_OFFSET = 1000  # mmdet.evaluation.functional: a panoptic value is class + 1000 x number of the instance


class Outputs:
    """Writes predictions below a folder: ``pictures/`` or a video, ``masks/``, ``predictions.json``.

    Args:
        out: The folder.
        predictor: The model that predicts, for drawing and the names of classes.
        source: Where the images come from.
        pictures: Whether to draw.
        write_json: Whether to write COCO's JSON.
        masks: Whether to write label maps as PNG.
        score_thr: Boxes and instances of lower scores are left out everywhere.

    Raises:
        UserError: If the folder cannot be written.
    """

    def __init__(
        self,
        out: str | Path,
        predictor: Predictor,
        source: Source,
        *,
        pictures: bool = True,
        write_json: bool = False,
        masks: bool = False,
        score_thr: float = 0.3,
    ) -> None:
        check_work_dir(out, '--out')
        Path(out).mkdir(parents=True, exist_ok=True)
        self.out, self.predictor, self.source, self.score_thr = Path(out), predictor, source, score_thr
        self.pictures, self.write_json, self.masks = pictures, write_json, masks
        self.found = 0
        self._video: cv2.VideoWriter | None = None
        self._written: dict[str, int] = {}
        categories = [{'id': index + 1, 'name': name} for index, name in enumerate(predictor.classes)]
        self._content: dict[str, list[dict[str, Any]]] = {'images': [], 'annotations': [], 'categories': categories}

    def add(self, picture: Picture, sample: BaseDataElement) -> None:
        """Write what was predicted on an image."""
        if 'pred_instances' in sample:
            self.found += int((sample.pred_instances.scores >= self.score_thr).sum())
        if self.pictures:
            self._draw(picture, sample)
        label_map = None
        if self.masks or (self.write_json and 'pred_panoptic_seg' in sample):
            label_map = self._mask_file(picture)
            _write(label_map, _label_map(sample, self.score_thr))
            self._note('masks')
        if self.write_json:
            self._describe(picture, sample, label_map)

    def close(self) -> list[str]:
        """Finish the files; return a line for each kind that was written."""
        if self._video is not None:
            self._video.release()
        if self.write_json:
            path = self.out / 'predictions.json'
            path.write_text(json.dumps(self._content), encoding='utf-8')
            self._written[str(path)] = len(self._content['annotations'])
        return [f'{where}  ({count})' for where, count in self._written.items()]

    def _note(self, kind: str) -> None:
        place = f'{self.out / kind}'
        self._written[place] = self._written.get(place, 0) + 1

    def _draw(self, picture: Picture, sample: BaseDataElement) -> None:
        drawn = self.predictor.draw(picture.image, sample, self.score_thr)
        if self.source.fps is None:
            path = self.out / 'pictures' / picture.name
            path = path if path.suffix.lower() in _WRITABLE else path.with_suffix('.png')
            if path.exists() and path.resolve() == Path(picture.origin).resolve():
                raise UserError(f'--out {self.out}: {path} would replace the picture that it is drawn on')
            _write(path, drawn)
            self._note('pictures')
            return
        path = self.out / f'{self.source.name}.mp4'
        height, width = drawn.shape[:2]
        if self._video is None:
            if str(path.resolve()) == str(Path(self.source.where).resolve()):  # type: ignore[attr-defined]
                raise UserError(f'--out {self.out}: {path} would replace the video that it is drawn on')
            self._video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'mp4v'), self.source.fps, (width, height))
            if not self._video.isOpened():
                raise UserError(f'{path}: this OpenCV cannot write mp4 videos; --no-pictures --json writes none')
        self._video.write(drawn)
        self._note(path.name)

    def _mask_file(self, picture: Picture) -> Path:
        name = Path(picture.name)
        return self.out / 'masks' / (name.with_suffix('.png') if name.suffix.lower() in PICTURES else f'{name}.png')

    def _describe(self, picture: Picture, sample: BaseDataElement, label_map: Path | None) -> None:
        number = len(self._content['images']) + 1
        height, width = picture.image.shape[:2]
        self._content['images'].append({'id': number, 'file_name': picture.name, 'height': height, 'width': width})
        annotations = self._content['annotations']
        if 'pred_panoptic_seg' in sample:
            segments = list(_segments(sample, len(self.predictor.classes)))
            file_name = label_map.relative_to(self.out / 'masks').as_posix() if label_map is not None else ''
            annotations.append({'image_id': number, 'file_name': file_name, 'segments_info': segments})
            return
        each = _instances(sample, self.score_thr) if 'pred_instances' in sample else _regions(sample)
        for entry in each:
            annotations.append({'id': len(annotations) + 1, 'image_id': number, 'iscrowd': 0, **entry})


def _write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    there, data = cv2.imencode(path.suffix, image)
    assert there, path
    path.write_bytes(data.tobytes())


def _kept(sample: BaseDataElement, score_thr: float) -> BaseDataElement:
    instances = sample.pred_instances
    return instances[instances.scores >= score_thr]


def _label_map(sample: BaseDataElement, score_thr: float) -> np.ndarray:
    """Return labels as an image: class indices (H, W); numbers of instances (H, W), 0 for none; panoptic (H, W, 3)."""
    if 'pred_sem_seg' in sample:
        labels = sample.pred_sem_seg.data[0].numpy()
        return labels.astype(np.uint8 if labels.max() < 256 else np.uint16)
    if 'pred_panoptic_seg' in sample:
        ids = sample.pred_panoptic_seg.sem_seg[0].numpy().astype(np.int64) + 1
        return np.stack([ids >> 16 & 255, ids >> 8 & 255, ids & 255], axis=-1).astype(np.uint8)  # BGR of COCO's RGB
    instances = _kept(sample, score_thr)
    if 'masks' not in instances:
        raise UserError('--masks: the model predicts boxes without masks; --json writes them')
    numbers = np.zeros(sample.ori_shape, np.uint16)
    for index in reversed(range(len(instances))):  # the highest score comes first and lies on top
        numbers[np.asarray(instances.masks[index], bool)] = index + 1
    return numbers


def _instances(sample: BaseDataElement, score_thr: float) -> Iterator[dict[str, Any]]:
    kept = _kept(sample, score_thr)
    for index in range(len(kept)):
        left, top, right, bottom = (float(value) for value in kept.bboxes[index][:4])
        entry: dict[str, Any] = {
            'category_id': int(kept.labels[index]) + 1,
            'score': float(kept.scores[index]),
            'bbox': [left, top, right - left, bottom - top],
            'area': (right - left) * (bottom - top),
        }
        if 'masks' in kept:
            entry.update(_run_lengths(np.asarray(kept.masks[index])))
        yield entry


def _regions(sample: BaseDataElement) -> Iterator[dict[str, Any]]:
    labels = sample.pred_sem_seg.data[0].numpy()
    for label in np.unique(labels):
        yield {'category_id': int(label) + 1, **_run_lengths(labels == label)}


def _segments(sample: BaseDataElement, num_classes: int) -> Iterator[dict[str, Any]]:
    values, areas = np.unique(sample.pred_panoptic_seg.sem_seg[0].numpy(), return_counts=True)
    for value, area in zip(values, areas, strict=True):
        label = int(value) % _INSTANCE_OFFSET
        if label < num_classes:  # that number is for what belongs to nothing
            yield {'id': int(value) + 1, 'category_id': label + 1, 'area': int(area), 'iscrowd': 0}


def _run_lengths(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as coco

    encoded = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    area = int(coco.area(encoded))
    return {'segmentation': {'size': encoded['size'], 'counts': encoded['counts'].decode()}, 'area': area}
