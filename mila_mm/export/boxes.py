"""Boxes in traceable form, with results of fixed size: decoding, the best of a level, suppression, RoIAlign.

Each function states what mmdet computes, from the settings of the trained module, without its branches on data. What
is left out on the way has the score :data:`NOTHING` and keeps its place.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from mila_mm.errors import UserError

NOTHING = -1.0
_WH_RATIO_CLIP = 16 / 1000  # the default of mmdet's decoders, which no config reaches


def check_coder(coder: Any, owner: str) -> None:
    """Refuse what :func:`decode` does not know.

    Raises:
        UserError: It names the coder.
    """
    if type(coder) not in (DeltaXYWHBBoxCoder, DistancePointBBoxCoder):
        raise UserError(
            f'export: {owner} has the box coder {type(coder).__name__}; '
            'expected DeltaXYWHBBoxCoder or DistancePointBBoxCoder'
        )


def most_of(cfg: Any, owner: str) -> int:
    """Return how many boxes a test_cfg keeps.

    Raises:
        UserError: If it keeps all: results have a fixed number of rows.
    """
    most = int(cfg.get('max_per_img', -1))
    if most <= 0:
        raise UserError(f'export: {owner} keeps all boxes; set max_per_img in its test_cfg')
    return most


def decode(coder: Any, priors: Tensor, deltas: Tensor, size: Tensor) -> Tensor:
    """Turn predicted deltas or distances into boxes (x1, y1, x2, y2).

    Args:
        coder: One that :func:`check_coder` takes.
        priors: (..., 4) boxes, or (..., 2) points for distances.
        deltas: (..., 4).
        size: (..., 2), height and width to clip to, broadcast against boxes.
    """
    if isinstance(coder, DistancePointBBoxCoder):
        points = priors[..., :2]
        boxes = torch.cat((points - deltas[..., :2], points + deltas[..., 2:]), dim=-1)
    else:
        deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
        shift, growth = deltas[..., :2], deltas[..., 2:]
        centre = (priors[..., :2] + priors[..., 2:]) * 0.5
        extent = priors[..., 2:] - priors[..., :2]
        shift = extent * shift
        most = abs(math.log(_WH_RATIO_CLIP))
        if coder.add_ctr_clamp:
            shift = shift.clamp(-coder.ctr_clamp, coder.ctr_clamp)
            growth = growth.clamp(max=most)
        else:
            growth = growth.clamp(-most, most)
        centre, half = centre + shift, extent * growth.exp() * 0.5
        boxes = torch.cat((centre - half, centre + half), dim=-1)
    if coder.clip_border:
        limit = size.flip(-1).to(boxes.dtype)
        boxes = torch.minimum(boxes.clamp(min=0), torch.cat((limit, limit), dim=-1))
    return boxes


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` highest of (B, N) and where they are, filled up with :data:`NOTHING` where N is less."""
    length = scores.shape[1]
    values, index = F.pad(scores, (0, count), value=NOTHING).topk(count, dim=1)
    return values, torch.where(index < length, index, torch.zeros_like(index))


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Pick rows: (B, N, D) by (B, K) to (B, K, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


_SPLIT = 10000  # mmcv's own


class Suppression:
    """Greedy suppression as mmcv's ``batched_nms`` does it: groups are moved apart, thresholds are those of fp32.

    Args:
        cfg: The ``nms`` entry of a test_cfg.
        owner: Whose it is, for messages.

    Raises:
        UserError: If it is another method, or has options that the operator of ONNX lacks.
    """

    def __init__(self, cfg: Any, owner: str) -> None:
        options = dict(cfg or {})
        kind = options.pop('type', 'nms')
        threshold = options.pop('iou_threshold', options.pop('iou_thr', None))
        self.agnostic = bool(options.pop('class_agnostic', False))
        if options.pop('split_thr', _SPLIT) != _SPLIT and self.agnostic:
            # From so many boxes on mmcv goes class by class, and forgets that classes were to meet.
            raise UserError(f'export: {owner} has class_agnostic and split_thr in its nms; leave split_thr out')
        if kind not in ('nms', nms) or threshold is None or any(options.values()):
            raise UserError(
                f"export: {owner} suppresses boxes with {dict(cfg or {})}; expected dict(type='nms', iou_threshold=...)"
            )
        self.threshold = float(np.float32(threshold))

    def __call__(self, boxes: Tensor, scores: Tensor, groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Suppress within one image.

        Args:
            boxes: (N, 4), not negative.
            scores: (N,), :data:`NOTHING` for what does not take part.
            groups: (N,), of any dtype; boxes of different groups do not meet.
            count: How many results to return.

        Returns:
            Scores (count,), falling and filled up with :data:`NOTHING`, and their places (count,).
        """
        taking_part = scores > NOTHING
        real = torch.where(taking_part[:, None], boxes, torch.zeros_like(boxes))
        reach = F.pad(real, (0, 0, 0, 1))  # there may be none
        moved = real if self.agnostic else real + (groups.to(boxes.dtype) * (reach.max() + 1))[:, None]
        # What takes no part lies in one place apart, where its first suppresses the rest at once. Two boxes more, there
        # and beside it, are always kept: torch writes into a graph that suppression keeps two, as torchvision tells it.
        apart = reach.min() + boxes.new_tensor([[-2.0, -2.0, -1.0, -1.0], [-4.0, -4.0, -3.0, -3.0]])
        placed = torch.cat((torch.where(taking_part[:, None], moved, apart[0]), apart))
        padded = F.pad(scores, (0, 2), value=NOTHING)
        kept = nms(placed, padded, self.threshold)
        marks = torch.zeros_like(padded).scatter(0, kept, torch.ones_like(kept, dtype=scores.dtype))[:-2]
        left = torch.where((marks > 0) & taking_part, scores, torch.full_like(scores, NOTHING))
        values, index = best(left[None], count)
        return values[0], index[0]


class RoIFeatures(nn.Module):
    """mmdet's ``SingleRoIExtractor`` over torchvision's operator, which ONNX knows as RoiAlign.

    Args:
        extractor: The trained model's extractor.

    Raises:
        UserError: If it is another kind of extractor or layer.
    """

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        kind = type(extractor).__name__
        layers = list(getattr(extractor, 'roi_layers', ()))
        modes = {getattr(layer, 'pool_mode', type(layer).__name__) for layer in layers}
        if kind != 'SingleRoIExtractor' or modes != {'avg'}:
            raise UserError(
                f'export: the RoI extractor is {kind} with {sorted(modes)}; expected SingleRoIExtractor with RoIAlign '
                "of pool_mode 'avg'"
            )
        self.finest_scale = extractor.finest_scale
        self.layers = [(x.output_size, x.spatial_scale, x.sampling_ratio, x.aligned) for x in layers]

    def forward(self, maps: list[Tensor], rois: Tensor) -> Tensor:
        """Return (R, C, h, w) of rois (R, 5): image index, x1, y1, x2, y2; each from the level of its size."""
        maps = maps[: len(self.layers)]
        height, width = self.layers[0][0]
        scale = torch.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
        level = torch.floor(torch.log2(scale / self.finest_scale + 1e-6)).clamp(0, len(maps) - 1).long()
        features = maps[0].new_zeros(rois.shape[0], maps[0].shape[1], height, width)
        for i, (x, (size, spatial_scale, ratio, aligned)) in enumerate(zip(maps, self.layers, strict=True)):
            here = (level == i).nonzero()[:, 0]
            # Coordinates stay in fp32: at 1000 pixels fp16 is off by one.
            pooled = roi_align(x.float(), rois[here], size, spatial_scale, ratio, aligned)
            features = features.index_put((here,), pooled.to(features.dtype))
        return features
