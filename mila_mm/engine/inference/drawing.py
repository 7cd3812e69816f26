"""Drawing of predictions: supervision's for boxes and masks where it is installed, else the config's visualizer.

mmdet's visualizer goes through matplotlib and takes a second for a picture with twenty masks; supervision's annotators
paint on the array.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mmengine.registry import VISUALIZERS
from mmengine.structures import BaseDataElement

if TYPE_CHECKING:
    import supervision

# On a smaller picture, in pixels of its shorter side, names would hide what they name.
_NAMED = 160
_SMALLEST_TEXT = 0.35
_DEFAULTS = {'mmdet': 'mmdet.DetLocalVisualizer', 'mmseg': 'mmseg.SegLocalVisualizer'}


class VisualizerDrawing:
    """Draws with a visualizer of mmdet or mmseg.

    Args:
        config: The config's ``visualizer``; None for the library's own.
        scope: ``'mmdet'`` or ``'mmseg'``.
        meta: ``classes`` and ``palette``.
    """

    def __init__(self, config: dict[str, Any] | None, scope: str, meta: dict[str, Any]) -> None:
        options = {**(config or {'type': _DEFAULTS[scope]}), 'vis_backends': None, 'save_dir': None}
        # mmengine keeps visualizers by name
        self._visualizer = VISUALIZERS.build({**options, 'name': f'{type(self).__name__}{id(self)}'})
        self._visualizer.dataset_meta = meta
        self._drawn: list[np.ndarray] = []
        self._visualizer.add_image = lambda name, image, step=0: self._drawn.append(image)
        self._takes_threshold = scope == 'mmdet'

    def __call__(self, image: np.ndarray, sample: BaseDataElement, score_thr: float) -> np.ndarray:
        """Return the picture (H, W, 3) uint8, BGR, with what was predicted on it."""
        options = {'pred_score_thr': score_thr} if self._takes_threshold else {}
        self._visualizer.add_datasample('', image[..., ::-1].copy(), sample, draw_gt=False, **options)
        return np.ascontiguousarray(self._drawn.pop()[..., ::-1])


class SupervisionDrawing:
    """Draws boxes, masks and labels with supervision.

    Args:
        classes: Names of the classes.
        palette: RGB colour of each; None for supervision's own.
    """

    def __init__(self, classes: Sequence[str], palette: Sequence[Sequence[int]] | None) -> None:
        import supervision as sv

        colors = (
            sv.ColorPalette([sv.Color(*map(int, color)) for color in palette]) if palette else sv.ColorPalette.DEFAULT
        )
        self._classes, self._colors = classes, colors
        self._masks = sv.MaskAnnotator(colors, opacity=0.45)

    def __call__(self, image: np.ndarray, sample: BaseDataElement, score_thr: float) -> np.ndarray:
        """Return the picture (H, W, 3) uint8, BGR, with what was predicted on it."""
        import supervision as sv

        found = detections(sample, score_thr)
        found = found[np.argsort(found.confidence)]  # the surest on top
        height, width = image.shape[:2]
        side = min(height, width)
        thickness = max(1, sv.calculate_optimal_line_thickness((width, height)))
        drawn = image.copy()
        if found.mask is not None:
            drawn = self._masks.annotate(drawn, found)
        drawn = sv.BoxAnnotator(self._colors, thickness=thickness if side >= _NAMED else 1).annotate(drawn, found)
        if side < _NAMED:
            return drawn
        names = [
            f'{self._classes[label]} {score:.2f}' for label, score in zip(found.class_id, found.confidence, strict=True)
        ]
        scale = max(_SMALLEST_TEXT, sv.calculate_optimal_text_scale((width, height)))
        labels = sv.LabelAnnotator(self._colors, text_scale=scale, text_padding=max(2, round(10 * scale)))
        return labels.annotate(drawn, found, names)


def detections(sample: BaseDataElement, score_thr: float) -> supervision.Detections:
    """Return the boxes and masks of a sample whose scores reach a threshold, as supervision has them."""
    import supervision as sv

    instances = sample.pred_instances
    instances = instances[instances.scores >= score_thr]
    return sv.Detections(
        xyxy=instances.bboxes.numpy().reshape(-1, 4),
        confidence=instances.scores.numpy(),
        class_id=instances.labels.numpy().astype(int),
        mask=np.asarray(instances.masks, bool) if 'masks' in instances and len(instances) else None,
    )


def has_supervision() -> bool:
    """Tell whether supervision is installed."""
    return importlib.util.find_spec('supervision') is not None
