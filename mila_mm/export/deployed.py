"""The whole of what is exported, as one module: which model has which form, and what goes in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mila_mm.errors import UserError
from mila_mm.export.pieces import Preprocess, deployable
from mila_mm.nn.classifier import MILAClassifier


class Deployed(nn.Module):
    """A trained model as it is exported: images in, a tuple of results out.

    Args:
        model: A detector of mmdet, a segmentor of mmseg or MILA's classifier; it is copied.
        precision: 'fp32', or 'fp16' for the network; what comes before and after it stays in fp32.
        pasted: For masks, see :class:`mila_mm.export.two_stage.TwoStageDetector`.
        logits: Whether a segmentor returns its logits as well.
        every_row: For masks, see :class:`mila_mm.export.two_stage.TwoStageDetector`.
        multiple: Of what sides of the images are multiples, see :class:`mila_mm.export.pieces.Preprocess`.

    Attributes:
        kind: 'detector', 'segmentor' or 'classifier'.
        input_names: 'image', uint8 RGB (B, H, W, 3), and for a detector 'size', int64 (B, 2): height and width of the
            content at the top left; the rest is taken for padding.
        classes: How many classes it tells apart.
        fixed: Whether it can only be traced, for one size and in fp32.
        ranked: Whether rounding may swap two proposals and change what becomes of both, as DINO's queries by rank do.
        output_names: Of the results, in their order.

    Raises:
        UserError: If the model has no exported form; it names the part.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: str = 'fp32',
        *,
        pasted: bool = False,
        every_row: bool = False,
        logits: bool = False,
        multiple: int = 1,
    ) -> None:
        super().__init__()
        source = deployable(model)
        self.kind, self.core = _core(source, pasted, every_row, logits)
        self.classes = int(self.core.classes)
        self.fixed = bool(getattr(self.core, 'fixed', False))
        self.ranked = bool(getattr(self.core, 'ranked', False))
        preprocessor = source.data_preprocessor
        self.preprocess = Preprocess(preprocessor, _divisor(preprocessor), multiple)
        self.pasted = pasted
        self.half_precision = precision == 'fp16'
        if self.half_precision:
            self.core.model.half()
        self.input_names = ('image', 'size') if self.kind == 'detector' else ('image',)
        self.output_names = _output_names(self.core, self.kind, logits)

    def forward(self, image: Tensor, size: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compute the results, in the order of ``output_names``."""
        x = self.preprocess(image, size)
        x = x.half() if self.half_precision else x
        if self.kind == 'detector':
            results = self.core(x, size)
            if self.pasted and 'masks' in results:
                results['masks'] = results['masks'][:, :, : image.shape[1], : image.shape[2]]
        elif self.kind == 'segmentor':
            results = self.core(x, (image.shape[1], image.shape[2]))
        else:
            results = self.core(x)
        return tuple(results[name] for name in self.output_names)


def _core(model: nn.Module, pasted: bool, every_row: bool, logits: bool) -> tuple[str, nn.Module]:
    if isinstance(model, MILAClassifier):
        from mila_mm.export.maps import Classifier

        return 'classifier', Classifier(model)
    if type(model).__module__.startswith('mmdet.'):
        return 'detector', _detector(model, pasted, every_row)
    from mmseg.models.segmentors.base import BaseSegmentor

    if isinstance(model, BaseSegmentor):
        from mila_mm.export.maps import Segmentor

        return 'segmentor', Segmentor(model, logits)
    raise UserError(
        f'export: {type(model).__name__} has no exported form; expected a detector of mmdet, a segmentor of mmseg or '
        "MILA's classifier"
    )


def _detector(model: nn.Module, pasted: bool, every_row: bool) -> nn.Module:
    from mmdet.models.detectors import DINO, SingleStageDetector, TwoStageDetector

    from mila_mm.export import dense, dino, two_stage

    if isinstance(model, TwoStageDetector) and type(model).predict is TwoStageDetector.predict:
        if not model.with_rpn:
            raise UserError(f'export: {type(model).__name__} has no RPN, and no exported form without one')
        return two_stage.TwoStageDetector(model, pasted, every_row)
    if type(model) is DINO:
        return dino.DINODetector(model)
    if isinstance(model, SingleStageDetector) and type(model).predict is SingleStageDetector.predict:
        return dense.DenseDetector(model)
    raise UserError(f'export: the detector {type(model).__name__} has no exported form')


def _divisor(preprocessor: nn.Module) -> int:
    test_cfg: Mapping[str, Any] = getattr(preprocessor, 'test_cfg', None) or {}
    if test_cfg.get('size'):
        raise UserError(
            "export: the data_preprocessor pads test images to one size; take 'size' out of its test_cfg, and give "
            '--size'
        )
    return int(getattr(preprocessor, 'pad_size_divisor', None) or test_cfg.get('size_divisor') or 1)


def _output_names(core: nn.Module, kind: str, logits: bool) -> tuple[str, ...]:
    if kind == 'detector':
        masks = ('masks',) if getattr(core, 'mask_heads', None) else ()
        return ('boxes', 'scores', 'labels', *masks, 'count')
    if kind == 'classifier':
        return ('scores',)
    return ('labels', 'logits') if logits else ('labels',)


def example_inputs(deployed: Deployed, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    """Make inputs of a size to record a graph with: noise of fixed seed, all of it content."""
    noise = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=noise)
    size = torch.tensor([[height, width]] * batch)
    return (image, size) if deployed.kind == 'detector' else (image,)
