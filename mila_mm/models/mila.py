"""``MILA``, the backbone for MMDetection and MMSegmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mmengine.registry import MODELS as ROOT_MODELS

from mila_mm.models.backbone import Backbone, norm_factory
from mila_mm.nn.trunk import MILATrunk
from mila_mm.registry import MODELS


# In mmengine's own registry as well: mmdet and mmseg fall back to it for a bare ``type='MILA'``.
@ROOT_MODELS.register_module()
@MODELS.register_module()
class MILA(MILATrunk, Backbone):
    """MILA (Mamba-Inspired Linear Attention, arXiv 2405.16605) as an OpenMMLab backbone.

    Args:
        arch (str | dict): 'tiny', 'small', 'base', 'nano' (ours, not in the paper), or a dict with ``embed_dim``,
            ``depths`` and ``num_heads``. Defaults to 'tiny'.
        in_channels (int): Channels of the image. Defaults to 3.
        out_indices (Sequence[int]): Stages whose maps are returned. Stages behind the last of them are not built.
            Defaults to (0, 1, 2, 3).
        mlp_ratio (float): Hidden width of the MLPs over the width of the tokens. Defaults to 4.0.
        drop_path_rate (float): Stochastic depth of the last block; rises linearly from 0. Defaults to 0.0.
        frozen_stages (int): -1 freezes nothing, 0 the stem, n the stem and the first n stages: no gradient, and eval
            mode. Defaults to -1.
        norm_eval (bool): Keep all BatchNorms in eval mode during training. Defaults to False.
        norm_cfg (dict): Norm of the convolutions in stem and downsampling, say dict(type='SyncBN').
            Defaults to dict(type='BN').
        with_cp (bool | str): Trade time for memory: recompute in the backward each block (True or 'block'), or all
            blocks of a stage together ('stage'), which stores less and needs more while it recomputes.
            Defaults to False.
        attn_backend (str): 'auto', 'triton' or 'reference'; see :func:`mila_mm.ops.mila_attention`.
            Defaults to 'auto'.
        fused (bool | str | Sequence[str]): What else of a block to compute as one: True for the block as a whole,
            'auto' for the same where it wins (on a GPU that runs the kernels, and in 16 bits on a CPU), names of
            'cpe_norm', 'dwc_silu' and 'projections' for these parts. Weights keep their names. Defaults to 'auto'.
        init_cfg (dict, optional): dict(type='Pretrained', checkpoint=...) or any of mmengine's. Without it linear
            layers start from a truncated normal of std 0.02. Defaults to None.

    Raises:
        ValueError: An argument that makes no model; the message says expected and got.

    Example:
        >>> import torch
        >>> from mila_mm import MILA
        >>> model = MILA('tiny').eval()
        >>> for feature in model(torch.rand(1, 3, 75, 101)):
        ...     print(tuple(feature.shape))
        (1, 64, 19, 26)
        (1, 128, 10, 13)
        (1, 256, 5, 7)
        (1, 512, 3, 4)
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        norm_cfg: Mapping[str, Any] | None = None,
        with_cp: bool | str = False,
        attn_backend: str = 'auto',
        fused: bool | Literal['auto'] | Sequence[str] = 'auto',
        init_cfg: Any = None,
    ) -> None:
        super().__init__(
            arch=arch,
            in_channels=in_channels,
            out_indices=out_indices,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            with_cp=with_cp,
            attn_backend=attn_backend,
            fused=fused,
            norm_layer=norm_factory(norm_cfg),
            init_cfg=init_cfg,
        )
        self._freeze(frozen_stages, norm_eval)
