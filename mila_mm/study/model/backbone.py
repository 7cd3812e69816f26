"""``LinearAttentionTransformer``, the model of the study as a backbone for MMDetection and MMSegmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.registry import MODELS as ROOT_MODELS

from mila_mm.models.backbone import Backbone, norm_factory
from mila_mm.registry import MODELS
from mila_mm.study.model.trunk import LinearAttentionTrunk


@ROOT_MODELS.register_module()
@MODELS.register_module()
class LinearAttentionTransformer(LinearAttentionTrunk, Backbone):
    """Linear attention in Swin's layout, with each of Mamba's designs as a switch (arXiv 2405.16605, section 4).

    The baseline is Swin-T with global linear attention (kernel elu + 1) in place of the windows and without positional
    encoding. The rows of the paper's tables are :data:`mila_mm.models.STUDY_ROWS`. With a forget gate tokens are
    scanned row by row and see only those before them.

    Args:
        arch (str | dict): 'tiny' (Swin-T), 'nano' (ours, not in the paper), or a dict with ``embed_dim``, ``depths``
            and ``num_heads``. On MILA's layout MILA's names. Defaults to 'tiny'.
        layout (str): 'swin' (4x4 patches, patch merging) or 'mila' (MILA's stem and downsampling). Defaults to 'swin'.
        block (str): 'transformer'; 'mamba', where the whole block is Mamba's and there is no MLP; or 'mila', where
            only the attention half is. Defaults to 'transformer'.
        input_gate (bool): Multiply v by Delta. Defaults to False.
        forget_gate (bool): Let the state decay by exp(a * Delta). Defaults to False.
        shortcut (bool): Add D * x. Defaults to False.
        normalization (bool): Divide by the sum of the attention weights. Defaults to True.
        single_head (bool): One head of the width of one of several. Defaults to False.
        positional_encoding (str | Sequence[str]): Any of 'ape', 'lepe', 'cpe' and 'rope'. Defaults to ().
        expansion (float, optional): Width inside of Mamba's block over that of the tokens. Defaults to 2 in 'mamba'
            and 1 in 'mila'.
        qk_ratio (float, optional): Width of q, and of k, over that of the tokens, with several heads. Defaults to 1.5
            in 'mamba' and to the expansion elsewhere.
        conv_kernel_size (int): Of the depthwise convolution in Mamba's block. Defaults to 3.
        gate_reduction (int): Width of the tokens over the inner width of Delta's projection. Defaults to 16.
        img_size (int | tuple[int, int]): Image that the tables of APE are made for; they are resized to others.
            Defaults to 224.
        in_channels (int): Channels of the image. Defaults to 3.
        out_indices (Sequence[int]): Stages whose maps are returned. Stages behind the last of them are not built.
            Defaults to (0, 1, 2, 3).
        mlp_ratio (float): Hidden width of the MLPs over the width of the tokens. Defaults to 4.0.
        drop_path_rate (float): Stochastic depth of the last block; rises linearly from 0. Defaults to 0.0.
        frozen_stages (int): -1 freezes nothing, 0 the stem, n the stem and the first n stages. Defaults to -1.
        norm_eval (bool): Keep all BatchNorms, which only MILA's layout has, in eval mode. Defaults to False.
        norm_cfg (dict): Norm of the convolutions of MILA's layout. Defaults to dict(type='BN').
        with_cp (bool | str): Trade time for memory by recomputing in the backward: True or 'block' each block, 'stage'
            all blocks of a stage at once. Defaults to False.
        attn_backend (str): For what :func:`mila_mm.ops.mila_attention` covers. Defaults to 'auto'.
        init_cfg (dict, optional): dict(type='Pretrained', checkpoint=...) or any of mmengine's. Defaults to None.

    Raises:
        ValueError: An argument that makes no model; the message says expected and got.

    Example:
        >>> import torch
        >>> from mila_mm import LinearAttentionTransformer
        >>> model = LinearAttentionTransformer(forget_gate=True, positional_encoding=('lepe', 'cpe')).eval()
        >>> [tuple(m.shape) for m in model(torch.rand(1, 3, 75, 101))]
        [(1, 96, 19, 26), (1, 192, 10, 13), (1, 384, 5, 7), (1, 768, 3, 4)]
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        layout: str = 'swin',
        block: str = 'transformer',
        input_gate: bool = False,
        forget_gate: bool = False,
        shortcut: bool = False,
        normalization: bool = True,
        single_head: bool = False,
        positional_encoding: str | Sequence[str] = (),
        expansion: float | None = None,
        qk_ratio: float | None = None,
        conv_kernel_size: int = 3,
        gate_reduction: int = 16,
        img_size: int | tuple[int, int] = 224,
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        norm_cfg: Mapping[str, Any] | None = None,
        with_cp: bool | str = False,
        attn_backend: str = 'auto',
        init_cfg: Any = None,
    ) -> None:
        super().__init__(
            arch=arch,
            layout=layout,
            block=block,
            input_gate=input_gate,
            forget_gate=forget_gate,
            shortcut=shortcut,
            normalization=normalization,
            single_head=single_head,
            positional_encoding=positional_encoding,
            expansion=expansion,
            qk_ratio=qk_ratio,
            conv_kernel_size=conv_kernel_size,
            gate_reduction=gate_reduction,
            img_size=img_size,
            in_channels=in_channels,
            out_indices=out_indices,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            with_cp=with_cp,
            attn_backend=attn_backend,
            norm_layer=norm_factory(norm_cfg),
            init_cfg=init_cfg,
        )
        self._freeze(frozen_stages, norm_eval)
