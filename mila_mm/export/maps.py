"""Segmentors and classifiers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor, nn

from mila_mm.errors import UserError


class Segmentor(nn.Module):
    """A semantic segmentor of mmseg over the whole image, from normalised images to a map of labels.

    Args:
        model: An ``EncoderDecoder``, in eval mode.
        logits: Whether to return the logits as well; of a single channel its sigmoid, as mmseg does.

    Raises:
        UserError: If it is another kind of segmentor, or its head predicts in a way of its own.
    """

    def __init__(self, model: nn.Module, logits: bool = False) -> None:
        super().__init__()
        if type(model) is not EncoderDecoder:
            raise UserError(f'export: the segmentor {type(model).__name__} has no exported form')
        head = model.decode_head
        if any(
            getattr(type(head), name, None) is not getattr(BaseDecodeHead, name)
            for name in ('predict', 'predict_by_feat')
        ):
            raise UserError(
                f'export: the head {type(head).__name__} has no exported form: it predicts in a way of its own'
            )
        self.model = model
        self.logits = logits
        self.classes = head.num_classes
        self.dtype = torch.uint8 if self.classes <= 256 else torch.int32

    def forward(self, x: Tensor, shape: Any) -> dict[str, Tensor]:
        """Segment images (B, 3, H', W') and crop to ``shape``, height and width of the content."""
        head = self.model.decode_head
        logits = head(self.model.extract_feat(x)).float()
        logits = F.interpolate(logits, size=x.shape[2:], mode='bilinear', align_corners=head.align_corners)
        logits = logits[:, :, : shape[0], : shape[1]]
        if logits.shape[1] == 1:
            logits = logits.sigmoid()
            labels = logits[:, 0] > head.threshold
        else:
            labels = logits.argmax(dim=1)
        results = {'labels': labels.to(self.dtype)}
        return {**results, 'logits': logits} if self.logits else results


class Classifier(nn.Module):
    """MILA's classifier, from normalised images to the scores of a softmax."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.classes = model.num_classes

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Classify images (B, 3, H, W)."""
        return {'scores': self.model(x).float().softmax(dim=-1)}
