"""The model of the study from image to feature maps, and with a head, free of any framework but PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from mila_mm.arch import ARCHS, Arch, resolve_arch
from mila_mm.nn.layers import Downsample, NormLayer, Stem
from mila_mm.nn.trunk import Trunk
from mila_mm.study.model.attention import Delta, StudyAttention
from mila_mm.study.model.design import LAYOUTS, NAME, SWIN_ARCHS, Design, resolve_design
from mila_mm.study.model.layers import AbsolutePositions, MambaBlock, PatchEmbed, PatchMerging, TransformerBlock


class LinearAttentionTrunk(Trunk):
    """Swin's layout with linear attention and any of Mamba's designs (arXiv 2405.16605, section 4).

    ``block`` to ``gate_reduction`` are those of :class:`Design`, ``in_channels`` to ``norm_layer`` those of MILA.

    :class:`mila_mm.LinearAttentionTransformer` adds OpenMMLab's contract; see there for the arguments.

    Args:
        arch: 'nano', 'tiny', or dict(embed_dim, depths, num_heads); MILA's names on MILA's layout.
        layout: 'swin' or 'mila'.
        img_size: Side, or (height, width), of the image that the tables of APE are made for.
        **kwargs: For the next class in the method resolution order.

    Raises:
        ValueError: An argument that makes no model; the message says expected and got.
    """

    _name = NAME

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
        with_cp: bool | str = False,
        attn_backend: str = 'auto',
        norm_layer: NormLayer = nn.BatchNorm2d,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if layout not in LAYOUTS:
            raise ValueError(f'{NAME}: expected layout to be one of {", ".join(LAYOUTS)}, got {layout!r}')
        spec = resolve_arch(arch, SWIN_ARCHS if layout == 'swin' else ARCHS, NAME)
        self._check_backend(attn_backend)
        design = resolve_design(
            block,
            positional_encoding,
            expansion,
            qk_ratio,
            conv_kernel_size,
            gate_reduction,
            input_gate=input_gate,
            forget_gate=forget_gate,
            shortcut=shortcut,
            normalization=normalization,
            single_head=single_head,
        )
        sizes = _height_and_width(img_size)
        if layout == 'swin':
            make_stem, make_downsample = partial(PatchEmbed, in_channels, spec.embed_dim), PatchMerging
        else:
            make_stem = partial(Stem, in_channels, spec.embed_dim, norm_layer)
            make_downsample = partial(Downsample, norm_layer=norm_layer)
        self._build(
            spec,
            out_indices,
            mlp_ratio,
            drop_path_rate,
            with_cp,
            make_stem=make_stem,
            make_block=partial(_make_block, spec, design, sizes, mlp_ratio, attn_backend),
            make_downsample=lambda stage: make_downsample(spec.dims[stage]),
        )

    def _init_linears(self) -> None:
        """As in MILA; where Delta starts is not 0."""
        super()._init_linears()
        for module in self.modules():
            if isinstance(module, Delta):
                module.reset_bias()


def _height_and_width(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """Check the size of the image; a number stands for both sides."""
    sizes = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f'{NAME}: expected img_size to be a side or (height, width), got {img_size!r}')
    return sizes


def _make_block(
    spec: Arch,
    design: Design,
    img_size: tuple[int, int],
    mlp_ratio: float,
    attn_backend: str,
    stage: int,
    drop_path: float,
) -> nn.Module:
    """Make a block of a stage."""
    dim, heads = spec.dims[stage], spec.num_heads[stage]
    inner, qk_dim = int(dim * design.expansion), int(dim * design.qk_ratio)
    if design.single_head:
        heads, qk_dim = 1, dim // heads
    if inner % heads or qk_dim % heads or ('rope' in design.positional_encoding and qk_dim % 4):
        raise ValueError(
            f'{NAME}: expected widths divisible by {heads} heads, and that of q and k with RoPE by 4; got '
            f'{inner} and {qk_dim} in stage {stage}'
        )

    def make_attn(width: int) -> StudyAttention:
        return StudyAttention(width, heads, qk_dim, design, design.block == 'transformer', attn_backend)

    ape = None
    if 'ape' in design.positional_encoding:
        stride = 4 * 2**stage
        ape = AbsolutePositions(dim, (-(-img_size[0] // stride), -(-img_size[1] // stride)))
    options = dict(ape=ape, drop_path=drop_path, cpe='cpe' in design.positional_encoding)
    if design.block == 'transformer':
        return TransformerBlock(dim, make_attn, mlp_ratio=mlp_ratio, **options)
    return MambaBlock(
        dim,
        make_attn,
        mlp_ratio=mlp_ratio if design.block == 'mila' else 0.0,
        inner_dim=inner,
        kernel_size=design.conv_kernel_size,
        **options,
    )


class LinearAttentionClassifier(nn.Module):
    """The model of the study with the head that its costs are counted with: norm, mean over tokens, Linear.

    Args:
        **options: As for :class:`LinearAttentionTrunk`.
    """

    def __init__(self, arch: str | Mapping[str, Any] = 'tiny', num_classes: int = 1000, **options: Any) -> None:
        super().__init__()
        self.backbone = LinearAttentionTrunk(arch, out_indices=(-1,), **options)
        self.head = nn.Linear(self.backbone.dims[-1], num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_channels, H, W) to logits (B, num_classes)."""
        return self.head(self.backbone(x)[0].mean(dim=(2, 3)))
