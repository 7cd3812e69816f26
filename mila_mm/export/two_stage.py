"""Detectors with two stages and more: Faster, Mask and Cascade R-CNN."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.necks import FPN
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from torch import Tensor, nn

from mila_mm.errors import UserError
from mila_mm.export.boxes import NOTHING, RoIFeatures, Suppression, check_coder, decode, most_of
from mila_mm.export.dense import Candidates, finish
from mila_mm.export.pieces import PooledPyramid


class TwoStageDetector(nn.Module):
    """An RPN and a standard or cascaded RoI head, from normalised images to padded detections.

    Args:
        model: A ``TwoStageDetector``, in eval mode.
        pasted: Whether masks are (B, K, H, W) of bool; else (B, K, 28, 28), probabilities in a grid over each box.
        every_row: Whether masks are computed for rows without a detection, too: slower, and of fixed shape.

    Raises:
        UserError: If a part of it has no exported form.
    """

    def __init__(self, model: nn.Module, pasted: bool = False, every_row: bool = False) -> None:
        super().__init__()
        head = model.roi_head
        if type(head) not in (StandardRoIHead, CascadeRoIHead):
            raise UserError(
                f'export: the RoI head {type(head).__name__} has no exported form; '
                'expected StandardRoIHead or CascadeRoIHead'
            )
        if head.with_shared_head:
            kind = type(head.shared_head).__name__
            raise UserError(f'export: the RoI head has the shared_head {kind}, which has no exported form')
        self.model = model
        if type(getattr(model, 'neck', None)) is FPN and not model.neck.add_extra_convs:
            model.neck = PooledPyramid(model.neck)
        self.proposals = Candidates(model.rpn_head, by_class=False)
        cfg = model.rpn_head.test_cfg
        self.suppress_proposals = Suppression(cfg.get('nms'), 'rpn_head')
        self.most_proposals = most_of(cfg, 'rpn_head')
        self.box_heads = _stages(head.bbox_head)
        for box_head in self.box_heads:
            _check_box_head(box_head)
        self.classes = self.box_heads[-1].num_classes
        self.box_features = nn.ModuleList([RoIFeatures(x) for x in _stages(head.bbox_roi_extractor)])
        cfg = head.test_cfg
        self.threshold, self.most = float(cfg.score_thr), most_of(cfg, 'roi_head')
        self.suppress = Suppression(cfg.get('nms'), 'roi_head')
        self.mask_heads: list[nn.Module] = []
        if head.with_mask:
            self.mask_heads = _stages(head.mask_head)
            for mask_head in self.mask_heads:
                _check_mask_head(mask_head)
            extractors = _stages(head.mask_roi_extractor if head.mask_roi_extractor else head.bbox_roi_extractor)
            self.mask_features = nn.ModuleList([RoIFeatures(x) for x in extractors])
        self.pasted, self.every_row = pasted, every_row
        self.mask_threshold = float(cfg.get('mask_thr_binary', 0.5))
        if self.mask_threshold < 0:
            raise UserError('export: roi_head gives masks in grey; set mask_thr_binary in its test_cfg to 0 or more')

    def forward(self, x: Tensor, size: Tensor) -> dict[str, Tensor]:
        """Detect in images (B, 3, H, W) with content of ``size`` (B, 2)."""
        maps = list(self.model.extract_feat(x))
        rois, proposed = self._propose(maps, size)
        scores, deltas, rois = self._classify(maps, rois, size)
        results = self._select(x.shape[0], scores, deltas, rois, proposed, size)
        if self.mask_heads:
            results['masks'] = self._masks(maps, results, x.shape[2:])
        return results

    def _propose(self, maps: list[Tensor], size: Tensor) -> tuple[Tensor, Tensor]:
        """Return rois (B * P, 5) and which of them there are, (B * P,)."""
        boxes, scores, levels = self.proposals(maps, size)
        rois, found = [], []
        for i in range(size.shape[0]):
            values, index = self.suppress_proposals(boxes[i], scores[i], levels[i], self.most_proposals)
            rois.append(F.pad(boxes[i][index], (1, 0), value=float(i)))
            found.append(values > NOTHING)
        return torch.cat(rois), torch.cat(found)

    def _classify(self, maps: list[Tensor], rois: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (R, classes + 1), the mean over the stages; the last stage's deltas, and its rois."""
        logits: Tensor | float = 0.0
        per_image = rois.shape[0] // size.shape[0]
        limits = size.repeat_interleave(per_image, dim=0)
        for stage, (head, features) in enumerate(zip(self.box_heads, self.box_features, strict=True)):
            scores, deltas = head(features(maps, rois))
            scores, deltas = scores.float(), deltas.float()
            logits = logits + scores
            if stage < len(self.box_heads) - 1:
                if not head.reg_class_agnostic:
                    label = scores[:, :-1].argmax(1)
                    deltas = deltas.unflatten(1, (-1, 4))
                    deltas = deltas.gather(1, label[:, None, None].expand(-1, 1, 4))[:, 0]
                rois = torch.cat((rois[:, :1], decode(head.bbox_coder, rois[:, 1:], deltas, limits)), dim=1)
        return logits / float(len(self.box_heads)), deltas, rois

    def _select(
        self, batch: int, logits: Tensor, deltas: Tensor, rois: Tensor, proposed: Tensor, size: Tensor
    ) -> dict[str, Tensor]:
        """From the last stage to detections, as ``multiclass_nms`` of mmdet."""
        head = self.box_heads[-1]
        scores = logits.softmax(-1)[:, :-1]
        scores = torch.where(proposed[:, None], scores, torch.full_like(scores, NOTHING))
        classes = scores.shape[1]
        per_image = rois.shape[0] // batch
        deltas = deltas.unflatten(1, (-1, 4))
        limits = size.repeat_interleave(per_image, dim=0)[:, None]
        boxes = decode(head.bbox_coder, rois[:, None, 1:], deltas, limits).expand(-1, classes, 4)
        results = []
        for i in range(batch):
            part = slice(i * per_image, (i + 1) * per_image)
            flat, pairs = scores[part].flatten(), boxes[part].flatten(0, 1)
            # Of many thousand pairs few pass: only they are compared with each other.
            passing = (flat > self.threshold).nonzero()[:, 0]
            values, index = self.suppress(pairs[passing], flat[passing], passing % classes, self.most)
            index = F.pad(passing, (0, 1))[index]  # there may be none
            results.append((values, pairs[index], index % classes))
        return finish(*(torch.stack(part) for part in zip(*results, strict=True)))

    def _masks(self, maps: list[Tensor], results: dict[str, Tensor], shape: Any) -> Tensor:
        boxes, labels = results['boxes'], results['labels']
        batch, most = labels.shape
        image = torch.arange(batch, device=boxes.device).to(boxes.dtype)[:, None, None].expand(-1, most, 1)
        rois = torch.cat((image, boxes), dim=-1).flatten(0, 1)
        found = labels.flatten() >= 0
        rows = torch.arange(batch * most, device=boxes.device)
        if not self.every_row:  # of those with a detection, and of one more, since there may be none
            rows = F.pad(found.nonzero()[:, 0], (0, 1))
        masks = self._predict_masks(maps, rois[rows], labels.flatten()[rows].clamp(min=0))
        if self.pasted:
            masks = paste(masks[:, None], rois[rows][:, None, 1:], shape)[:, 0] >= self.mask_threshold
        masks = masks if self.every_row else masks[(found.cumsum(0) - 1).clamp(min=0)]
        found = found[:, None, None]
        # onnxruntime has no Where of booleans.
        masks = masks & found if self.pasted else torch.where(found, masks, torch.zeros_like(masks))
        return masks.unflatten(0, (batch, most))

    def _predict_masks(self, maps: list[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Return probabilities (R, 28, 28) of rois (R, 5) with labels (R,), the mean over the stages."""
        total: Tensor | float = 0.0
        for head, features in zip(self.mask_heads, self.mask_features, strict=True):
            masks = head(features(maps, rois)).float().sigmoid()
            if not head.class_agnostic:
                masks = masks.gather(1, labels[:, None, None, None].expand(-1, 1, *masks.shape[-2:]))
            total = total + masks[:, 0]
        return total / len(self.mask_heads)


def paste(masks: Tensor, boxes: Tensor, shape: Any) -> Tensor:
    """Sample masks (B, K, h, w) over boxes (B, K, 4) at the pixels of an image: (B, K, H, W), 0 outside."""
    most = masks.shape[1]
    y, x = (torch.arange(side, device=boxes.device).to(boxes.dtype) + 0.5 for side in (shape[0], shape[1]))
    flat = boxes.flatten(0, 1)
    x1, y1, x2, y2 = (flat[:, i : i + 1] for i in range(4))
    # Boxes of no size are out of the image.
    x = torch.where(x2 > x1, (x - x1) / (x2 - x1).clamp(min=1e-6) * 2 - 1, torch.full_like(x1, 9.0))
    y = torch.where(y2 > y1, (y - y1) / (y2 - y1).clamp(min=1e-6) * 2 - 1, torch.full_like(y1, 9.0))
    grid_x = x[:, None, :].expand(-1, y.shape[1], -1)
    grid_y = y[:, :, None].expand(-1, -1, x.shape[1])
    pasted = F.grid_sample(masks.flatten(0, 1)[:, None], torch.stack((grid_x, grid_y), dim=-1), align_corners=False)
    return pasted[:, 0].unflatten(0, (-1, most))


def _stages(part: Any) -> list[nn.Module]:
    return list(part) if isinstance(part, nn.ModuleList) else [part]


def _check_box_head(head: nn.Module) -> None:
    name = type(head).__name__
    own = [
        m for m in ('predict_by_feat', '_predict_by_feat_single') if getattr(type(head), m) is not getattr(BBoxHead, m)
    ]
    if own or not (head.with_cls and head.with_reg) or head.custom_activation or head.custom_cls_channels:
        raise UserError(f'export: the box head {name} predicts in a way of its own, which has no exported form')
    check_coder(head.bbox_coder, name)


def _check_mask_head(head: nn.Module) -> None:
    name = type(head).__name__
    if any(
        getattr(type(head), method, None) is not getattr(FCNMaskHead, method)
        for method in ('predict_by_feat', '_predict_by_feat_single')
    ):
        raise UserError(f'export: the mask head {name} predicts in a way of its own, which has no exported form')
