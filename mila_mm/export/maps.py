"""Segmentors and classifiers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor, nn

from mila_mm.errors import UserError


class Segmentor(nn.Module):
    """A semantic segmentor of mmseg over the whole image, from normalised images to a map of labels.

    Args:
        model: An ``EncoderDecoder``, in eval mode.
        logits: Whether to return the logits as well.

    Raises:
        UserError: If it is another kind of segmentor.
    """

    def __init__(self, model: nn.Module, logits: bool = False) -> None:
        super().__init__()
        if type(model) is not EncoderDecoder or not hasattr(model.decode_head, 'predict_by_feat'):
            raise UserError(f'export: the segmentor {type(model).__name__} has no exported form')
        if hasattr(model.decode_head, 'pixel_decoder'):
            raise UserError(f'export: the head {type(model.decode_head).__name__} has no exported form')
        self.model = model
        self.logits = logits
        classes = model.decode_head.num_classes
        self.dtype = torch.uint8 if classes <= 256 else torch.int32
        self.threshold = getattr(model.decode_head, 'threshold', None) or 0.3

    def forward(self, x: Tensor, shape: Any) -> dict[str, Tensor]:
        """Segment images (B, 3, H', W') and crop to ``shape``, height and width of the content."""
        head = self.model.decode_head
        logits = head(self.model.extract_feat(x)).float()
        logits = F.interpolate(logits, size=x.shape[2:], mode='bilinear', align_corners=head.align_corners)
        logits = logits[:, :, : shape[0], : shape[1]]
        labels = logits.argmax(dim=1) if logits.shape[1] > 1 else logits[:, 0].sigmoid() > self.threshold
        results = {'labels': labels.to(self.dtype)}
        return {**results, 'logits': logits} if self.logits else results


class Classifier(nn.Module):
    """MILA's classifier, from normalised images to the scores of a softmax."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Classify images (B, 3, H, W)."""
        return {'scores': self.model(x).float().softmax(dim=-1)}
