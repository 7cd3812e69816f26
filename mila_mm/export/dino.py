"""DINO (arXiv 2203.03605): a transformer detector, without suppression."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import DINOHead
from torch import Tensor, nn

from mila_mm.errors import UserError
from mila_mm.export.dense import finish


class DINODetector(nn.Module):
    """From normalised images to padded detections; all ``max_per_img`` of them count, as in mmdet.

    Args:
        model: mmdet's ``DINO``, in eval mode.

    Raises:
        UserError: If its head has no exported form.
    """

    fixed = True
    # The n-th best proposal meets the n-th of the learnt queries (section 3.4 of the paper, mixed query selection): two
    # with scores that are equal up to rounding swap queries, and both of their results change, in PyTorch as well.
    ranked = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        head = model.bbox_head
        if type(head) is not DINOHead or not head.loss_cls.use_sigmoid:
            raise UserError(f'export: the head {type(head).__name__} of {type(model).__name__} has no exported form')
        self.model = model
        self.classes = head.num_classes
        self.most = int(head.test_cfg.get('max_per_img', model.num_queries))
        if not 0 < self.most <= model.num_queries * self.classes:
            raise UserError(
                f'export: expected max_per_img of test_cfg from 1 to {model.num_queries * self.classes}, '
                f'got {self.most}'
            )

    def forward(self, x: Tensor, size: Tensor) -> dict[str, Tensor]:
        """Detect in images (B, 3, H, W) with content of ``size`` (B, 2)."""
        model = self.model
        maps = model.extract_feat(x)
        encoder, decoder = self._flatten(maps, x, size)
        start, _ = model.pre_decoder(**model.forward_encoder(**encoder))
        outputs = model.forward_decoder(**{**decoder, **start})
        logits, boxes = (part[-1] for part in model.bbox_head(**outputs))
        classes = logits.shape[-1]
        scores, index = logits.sigmoid().flatten(1).topk(self.most, dim=1)
        query = torch.div(index, classes, rounding_mode='floor')
        boxes = boxes.gather(1, query[..., None].expand(-1, -1, 4))
        half = boxes[..., 2:] * 0.5
        boxes = torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), dim=-1)
        limit = size.flip(-1).to(boxes.dtype)
        limit = torch.cat((limit, limit), dim=-1)[:, None]
        boxes = torch.minimum((boxes * limit).clamp(min=0), limit)
        return finish(scores, boxes, index % classes)

    def _flatten(
        self, maps: tuple[Tensor, ...], x: Tensor, size: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Make the inputs of encoder and decoder, as ``pre_transformer`` of mmdet with a mask for every level."""
        model = self.model
        rows = torch.arange(x.shape[2], device=x.device) >= size[:, :1]
        columns = torch.arange(x.shape[3], device=x.device) >= size[:, 1:]
        outside = (rows[:, :, None] | columns[:, None, :]).to(x.dtype)
        features, positions, masks, shapes, ratios = [], [], [], [], []
        for level, feature in enumerate(maps):
            mask = F.interpolate(outside[None], size=feature.shape[-2:]).to(torch.bool)[0]
            position = model.positional_encoding(mask).flatten(2).transpose(1, 2)
            features.append(feature.flatten(2).transpose(1, 2))
            positions.append(position + model.level_embed[level])
            masks.append(mask.flatten(1))
            shapes.append([feature.shape[2], feature.shape[3]])
            ratios.append(model.get_valid_ratio(mask))
        # Constants: mmdet's attention cuts the features by them, so that a graph is for one size.
        spatial_shapes = torch.tensor(shapes, device=x.device)
        areas = spatial_shapes.prod(1).cumsum(0)[:-1]
        common = {
            'spatial_shapes': spatial_shapes,
            'level_start_index': torch.cat((spatial_shapes.new_zeros(1), areas)),
            'valid_ratios': torch.stack(ratios, 1),
        }
        mask = torch.cat(masks, 1)
        encoder = {'feat': torch.cat(features, 1), 'feat_mask': mask, 'feat_pos': torch.cat(positions, 1)}
        return {**encoder, **common}, {'memory_mask': mask, **common}
