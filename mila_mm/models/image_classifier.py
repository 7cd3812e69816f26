"""``MILAImageClassifier``: the classifier as an OpenMMLab model, for training on ImageNet with mmpretrain's data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor, nn

from mila_mm.nn.classifier import MILAClassifier
from mila_mm.registry import MODELS


def mesa_loss(logits: Tensor, averaged_logits: Tensor) -> Tensor:
    """Compute the trajectory loss of MESA, a divergence from the predictions of averaged weights.

    With p the softmax of the logits of the model and q that of the average, constant, it is the mean over the batch
    of KL(q || p) = sum_k q_k (log q_k - log p_k): Du et al., "Sharpness-Aware Training for Free", NeurIPS 2022, with
    their temperature at 1, as MILA was trained. Cross-entropy against q has the same gradient.

    Args:
        logits: (B, K), any float dtype.
        averaged_logits: (B, K); no gradient flows into it.

    Returns:
        A scalar in fp32 (fp64 for fp64), at least 0.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    p, q = (F.log_softmax(x.to(dtype), dim=-1) for x in (logits, averaged_logits.detach()))
    return F.kl_div(p, q, reduction='batchmean', log_target=True)


@MODELS.register_module()
class MILAImageClassifier(MILAClassifier, BaseModel):
    """MILA with its ImageNet head under mmengine's contract, with mmpretrain's samples.

    State-dict names are those of :class:`mila_mm.MILAClassifier`, so checkpoints load into timm's models and into
    backbones of detectors, and published ones into this.

    Args:
        arch (str | dict): As for :class:`mila_mm.MILA`. Defaults to 'tiny'.
        num_classes (int): Defaults to 1000.
        in_chans (int): Channels of the image. Defaults to 3.
        drop_rate (float): Dropout before the head. Defaults to 0.0.
        drop_path_rate (float): Stochastic depth of the last block. Defaults to 0.0.
        label_smoothing (float): Share of the target that all classes divide evenly, in [0, 1). Defaults to 0.0.
        with_cp (bool): Recompute each block in the backward. Defaults to False.
        attn_backend (str): See :func:`mila_mm.ops.mila_attention`. Defaults to 'auto'.
        data_preprocessor (dict, optional): Say dict(type='mmpretrain.ClsDataPreprocessor', ...). Defaults to None.
        init_cfg (dict, optional): Any of mmengine's. Defaults to None.

    Raises:
        ValueError: An argument that makes no model; the message says expected and got.
    """

    def __init__(
        self,
        arch: Any = 'tiny',
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        label_smoothing: float = 0.0,
        with_cp: bool = False,
        attn_backend: str = 'auto',
        data_preprocessor: Any = None,
        init_cfg: Any = None,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f'MILAImageClassifier: expected label_smoothing in [0, 1), got {label_smoothing!r}')
        if num_classes < 1:
            raise ValueError(f'MILAImageClassifier: expected num_classes of at least 1, got {num_classes!r}')
        super().__init__(
            arch=arch,
            num_classes=num_classes,
            in_chans=in_chans,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            with_cp=with_cp,
            attn_backend=attn_backend,
            data_preprocessor=data_preprocessor,
            init_cfg=init_cfg,
        )
        self.label_smoothing = label_smoothing
        self._average: tuple[nn.Module | None, float] = (None, 0.0)

    def set_average(self, average: nn.Module | None, ratio: float = 1.0) -> None:
        """Compare predictions with those of averaged weights from now on, see :func:`mesa_loss`.

        Args:
            average: A model of this class in eval mode; None ends it. It becomes no part of this module.
            ratio: Weight of the divergence in the loss.
        """
        self._average = (average, ratio)  # in a tuple, where Module.__setattr__ does not register it

    def forward(self, inputs: Tensor, data_samples: list[Any] | None = None, mode: str = 'tensor') -> Any:
        """Compute logits, losses or predictions.

        Args:
            inputs: (B, in_chans, H, W), normalised.
            data_samples: mmpretrain's ``DataSample`` for each image; with ``gt_score`` (K,) or ``gt_label`` for losses.
            mode: 'tensor', 'loss' or 'predict'.

        Returns:
            The logits (B, K); a dict of losses; or the samples with ``pred_score`` and ``pred_label``.

        Raises:
            ValueError: For another mode.
        """
        if mode not in ('tensor', 'loss', 'predict'):
            raise ValueError(f"MILAImageClassifier: expected mode 'tensor', 'loss' or 'predict', got {mode!r}")
        logits = super().forward(inputs)
        if mode == 'tensor':
            return logits
        return self._losses(inputs, logits, data_samples) if mode == 'loss' else _predictions(logits, data_samples)

    def _losses(self, inputs: Tensor, logits: Tensor, data_samples: list[Any]) -> dict[str, Tensor]:
        mixed = 'gt_score' in data_samples[0]
        target = (
            torch.stack([s.gt_score for s in data_samples]) if mixed else torch.cat([s.gt_label for s in data_samples])
        )
        losses = {'loss_cls': F.cross_entropy(logits.float(), target, label_smoothing=self.label_smoothing)}
        average, ratio = self._average
        if average is not None:
            with torch.no_grad():
                averaged = average(inputs)
            losses['loss_mesa'] = ratio * mesa_loss(logits, averaged)
        return losses


def _predictions(logits: Tensor, data_samples: list[Any] | None) -> list[Any]:
    scores = logits.float().softmax(dim=-1)
    if data_samples is None:
        from mmpretrain.structures import DataSample

        data_samples = [DataSample() for _ in scores]
    for sample, score in zip(data_samples, scores, strict=True):
        sample.set_pred_score(score).set_pred_label(score.argmax(dim=0, keepdim=True))
    return data_samples
