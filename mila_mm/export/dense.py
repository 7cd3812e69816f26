"""Detectors with one stage: heads over a pyramid, from boxes or points, with or without a factor of the scores."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from torch import Tensor, nn

from mila_mm.errors import UserError
from mila_mm.export.boxes import NOTHING, Suppression, best, check_coder, decode, gather_rows, most_of


class Candidates(nn.Module):
    """The best candidates of every level of a head, decoded.

    States what ``_predict_by_feat_single`` of mmdet's ``BaseDenseHead`` and ``RPNHead`` does before suppression.

    Args:
        head: The trained head.
        by_class: Whether each class of a prior is a candidate; else a prior has one score, as in an RPN.

    Raises:
        UserError: If the head predicts in a way of its own.
    """

    def __init__(self, head: nn.Module, by_class: bool = True) -> None:
        super().__init__()
        name = type(head).__name__
        base = BaseDenseHead if by_class else RPNHead
        for method in ('predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process'):
            if getattr(type(head), method, None) is not getattr(base, method):
                raise UserError(f'export: {name} predicts in a way of its own ({method}), which has no exported form')
        if getattr(head.loss_cls, 'custom_cls_channels', False) or getattr(head.loss_cls, 'custom_activation', False):
            raise UserError(f'export: {name} has a loss with an activation of its own, which has no exported form')
        check_coder(head.bbox_coder, name)
        self.head = head
        self.by_class = by_class
        self.cfg = head.test_cfg
        self.per_level = int(self.cfg.get('nms_pre', -1))
        if self.per_level <= 0:
            raise UserError(f'export: {name} keeps all candidates; set nms_pre in its test_cfg')
        self.threshold = float(self.cfg.get('score_thr', 0)) if by_class else None

    def forward(self, maps: Any, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the candidates.

        Args:
            maps: What the neck returns.
            size: (B, 2), height and width of the content.

        Returns:
            Boxes (B, N, 4), scores (B, N) with NOTHING for what is out, and groups (B, N): class, or level.
        """
        outputs = self.head(maps)
        factors = outputs[2] if len(outputs) > 2 else [None] * len(outputs[0])
        shapes = [x.shape[-2:] for x in outputs[0]]
        device = outputs[0][0].device
        priors = self.head.prior_generator.grid_priors(shapes, dtype=torch.float32, device=device)
        parts = [
            self._level(i, *level, size)
            for i, level in enumerate(zip(outputs[0], outputs[1], factors, priors, strict=True))
        ]
        boxes, scores, groups = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
        return boxes, self._without_small(boxes, scores), groups

    def _level(
        self, number: int, scores: Tensor, deltas: Tensor, factor: Tensor | None, priors: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, classes = scores.shape[0], self.head.cls_out_channels
        scores = scores.float().permute(0, 2, 3, 1).reshape(batch, -1, classes)
        scores = scores.sigmoid() if self.head.use_sigmoid_cls else scores.softmax(-1)[..., :-1]
        classes = scores.shape[-1]
        flat = scores.flatten(1)
        if self.threshold is not None:
            flat = torch.where(flat > self.threshold, flat, torch.full_like(flat, NOTHING))
        length = flat.shape[1]
        # Of a small level all are taken; where its size is not a number yet, it is filled up.
        most = min(self.per_level, length) if isinstance(length, int) else self.per_level
        values, index = best(flat, most)
        prior = torch.div(index, classes, rounding_mode='floor')
        deltas = deltas.float().permute(0, 2, 3, 1).reshape(batch, -1, 4)
        priors = priors[None].expand(batch, -1, -1)
        boxes = decode(self.head.bbox_coder, gather_rows(priors, prior), gather_rows(deltas, prior), size[:, None])
        if factor is not None:
            factor = factor.float().permute(0, 2, 3, 1).reshape(batch, -1).sigmoid().gather(1, prior)
            values = torch.where(values > NOTHING, values * factor, values)
        return boxes, values, (index % classes if self.by_class else torch.full_like(index, number))

    def _without_small(self, boxes: Tensor, scores: Tensor) -> Tensor:
        least = self.cfg.get('min_bbox_size', -1)
        if least < 0:
            return scores
        extent = boxes[..., 2:] - boxes[..., :2]
        large = (extent > least).all(-1)
        return torch.where(large, scores, torch.full_like(scores, NOTHING))


def finish(scores: Tensor, boxes: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Fill up results (B, K) with zeros and -1 behind the last detection, and count."""
    found = scores > NOTHING
    return {
        'boxes': torch.where(found[..., None], boxes, torch.zeros_like(boxes)),
        'scores': torch.where(found, scores, torch.zeros_like(scores)),
        'labels': torch.where(found, labels, torch.full_like(labels, -1)),
        'count': found.sum(1),
    }


class DenseDetector(nn.Module):
    """RetinaNet, ATSS, RTMDet, FCOS and their like, from normalised images to padded detections.

    Args:
        model: A ``SingleStageDetector``, in eval mode.

    Raises:
        UserError: If its head or its settings have no exported form.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.candidates = Candidates(model.bbox_head)
        self.classes = model.bbox_head.num_classes
        cfg = self.candidates.cfg
        self.suppress = Suppression(cfg.get('nms'), type(model.bbox_head).__name__)
        self.most = most_of(cfg, type(model.bbox_head).__name__)

    def forward(self, x: Tensor, size: Tensor) -> dict[str, Tensor]:
        """Detect in images (B, 3, H, W) with content of ``size`` (B, 2)."""
        maps = self.model.extract_feat(x)
        boxes, scores, labels = self.candidates(maps, size)
        results = []
        for i in range(x.shape[0]):
            values, index = self.suppress(boxes[i], scores[i], labels[i], self.most)
            results.append((values, boxes[i][index], labels[i][index]))
        return finish(*(torch.stack(part) for part in zip(*results, strict=True)))
