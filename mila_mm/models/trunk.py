"""MILA's computation from image to feature maps, free of any framework but PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.attention import BACKENDS
from .arch import resolve_arch
from .layers import Block, Downsample, NormLayer, Stage, Stem


class MILATrunk(nn.Module):
    """Stem, stages and output norms of MILA (arXiv 2405.16605) as an ordinary module.

    :class:`mila_mm.MILA` adds OpenMMLab's contract. State-dict names are those of the released code. Stages behind the
    last output are not built: a parameter without a gradient would stop distributed training.

    Args:
        arch: 'nano', 'tiny', 'small', 'base', or dict(embed_dim, depths, num_heads).
        in_channels: Channels of the image.
        out_indices: Stages whose maps are returned, in this order; -1 is the last stage.
        mlp_ratio: Hidden width of the MLPs over the width of the tokens.
        drop_path_rate: Stochastic depth of the last block, in [0, 1); rises linearly from 0 in the first block.
        with_cp: Recompute each block in the backward instead of storing what is inside it.
        attn_backend: 'auto', 'triton' or 'reference'; see :func:`mila_mm.ops.mila_attention`.
        norm_layer: Makes the norm of a convolution from its number of channels.
        **kwargs: For the next class in the method resolution order.

    Raises:
        ValueError: An argument that makes no model; the message says expected and got.
    """

    def __init__(self, arch: str | Mapping[str, Any] = 'tiny', in_channels: int = 3,
                 out_indices: Sequence[int] = (0, 1, 2, 3), mlp_ratio: float = 4.0, drop_path_rate: float = 0.0,
                 with_cp: bool = False, attn_backend: str = 'auto', norm_layer: NormLayer = nn.BatchNorm2d,
                 **kwargs: Any) -> None:
        super().__init__(**kwargs)
        spec = resolve_arch(arch)
        self.dims = spec.dims
        self.out_indices = _check_out_indices(out_indices, len(spec.depths))
        self.with_cp = with_cp
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'MILA: expected drop_path_rate in [0, 1), got {drop_path_rate!r}')
        if attn_backend not in BACKENDS:
            raise ValueError(f'MILA: expected attn_backend to be one of {", ".join(BACKENDS)}, got {attn_backend!r}')
        if mlp_ratio <= 0:
            raise ValueError(f'MILA: expected mlp_ratio above 0, got {mlp_ratio!r}')

        self.patch_embed = Stem(in_channels, spec.embed_dim, norm_layer)
        # Rates are those of the whole model, also where only its first stages are built.
        last_block = max(sum(spec.depths) - 1, 1)
        rates = (drop_path_rate * i / last_block for i in count())
        self.layers = nn.ModuleList()
        last = max(self.out_indices)
        for i, (dim, depth, heads) in enumerate(zip(self.dims, spec.depths, spec.num_heads, strict=True)):
            if i > last:
                break
            blocks = [Block(dim, heads, mlp_ratio, next(rates), attn_backend) for _ in range(depth)]
            self.layers.append(Stage(blocks, Downsample(dim, norm_layer) if i < last else None))
        for i in self.out_indices:
            self.add_module(f'norm{i}', nn.LayerNorm(self.dims[i]))
        self._init_linears()

    def _init_linears(self) -> None:
        """Truncated normal of std 0.02 and zero biases; convolutions and norms keep PyTorch's defaults."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps.

        Args:
            x: (B, in_channels, H, W), any size from 1 x 1.

        Returns:
            For each of ``out_indices`` the map of stage i, (B, embed_dim * 2**i, H_i, W_i) with H_0 = ceil(H / 4) and
            H_(i+1) = ceil(H_i / 2); channels_last if x is, else contiguous.
        """
        # A 1-channel or 1 x 1 image is both contiguous and channels_last: take it as contiguous.
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        x, height, width = self.patch_embed(x)
        maps = {}
        for i, stage in enumerate(self.layers):
            for block in stage.blocks:
                if self.with_cp and torch.is_grad_enabled():
                    x = checkpoint(block, x, height, width, use_reentrant=False)
                else:
                    x = block(x, height, width)
            if i in self.out_indices:
                y = getattr(self, f'norm{i}')(x).unflatten(1, (height, width)).permute(0, 3, 1, 2)
                maps[i] = y if channels_last else y.contiguous()
            if stage.downsample is not None:
                x, height, width = stage.downsample(x, height, width)
        return tuple(maps[i] for i in self.out_indices)


def _check_out_indices(out_indices: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Resolve negative indices; raise ValueError for any that names no stage, or one twice."""
    indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    resolved = tuple(i + num_stages if i < 0 else i for i in indices)
    if not resolved or len(set(resolved)) < len(resolved) or not all(0 <= i < num_stages for i in resolved):
        raise ValueError(f'MILA: expected out_indices to be different stages from 0 to {num_stages - 1}, '
                         f'got {out_indices!r}')
    return resolved
