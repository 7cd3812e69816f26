"""What Swin's layout needs beyond MILA's layers: patch embedding and merging, the Transformer's block, APE."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mila_mm.nn.layers import Block, DepthwiseConv, Mlp, add_branch, pad_to_multiple
from mila_mm.ops.common import to_image, to_tokens


class PatchEmbed(nn.Module):
    """Image (B, C_in, H, W) to tokens (B, N, dim) by a 4x4 convolution of stride 4 and a LayerNorm, as in Swin."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, 4, 4)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Return the tokens and their grid (H, W); sizes are padded with zeros to multiples of 4."""
        x = self.proj(pad_to_multiple(x, 4).contiguous(memory_format=torch.channels_last))
        return self.norm(to_tokens(x)), x.shape[2], x.shape[3]


class PatchMerging(nn.Module):
    """Tokens (B, N, C) to (B, N', 2C): each 2x2 of tokens side by side, LayerNorm, Linear, as in Swin."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, height: int, width: int, recompute: bool = False) -> tuple[Tensor, int, int]:
        """Return the tokens and their grid (H', W'); an odd side is padded with zeros at its end.

        ``recompute`` stores x alone for the backward.
        """
        x = pad_to_multiple(to_image(x, height, width), 2)
        y = checkpoint(self._merge, x, use_reentrant=False) if recompute else self._merge(x)
        return y, x.shape[2] // 2, x.shape[3] // 2

    def _merge(self, x: Tensor) -> Tensor:
        """(B, C, H, W) of even sides to (B, H / 2 * W / 2, 2C)."""
        height, width = x.shape[2] // 2, x.shape[3] // 2
        x = x.permute(0, 2, 3, 1).unflatten(2, (width, 2)).unflatten(1, (height, 2)).transpose(2, 3)
        return self.reduction(self.norm(x.reshape(x.shape[0], height * width, -1)))  # from (B, H', W', 2, 2, C)


class AbsolutePositions(nn.Module):
    """APE: a learned table on the grid, resized bicubically to the grid at hand."""

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, dim, *size))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return x (B, H * W, C) plus the table."""
        table = self.table
        if tuple(table.shape[2:]) != (height, width):
            table = F.interpolate(table, (height, width), mode='bicubic', align_corners=False)
        return x + table.flatten(2).transpose(1, 2).to(x.dtype)


class MambaBlock(Block):
    """:class:`mila_mm.nn.layers.Block` with an optional APE in front."""

    def __init__(
        self, dim: int, make_attn: Callable[[int], nn.Module], ape: nn.Module | None = None, **kwargs: object
    ) -> None:
        super().__init__(dim, make_attn, **kwargs)
        self.ape = ape

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map tokens (B, H * W, C) to the same shape."""
        return super().forward(x if self.ape is None else self.ape(x, height, width), height, width)


class TransformerBlock(nn.Module):
    """The pre-norm block of a Transformer around an attention.

    Args:
        dim: Width C of the tokens.
        make_attn: Makes the attention from C, called as attn(x, height, width) with x (B, N, C).
        ape: What adds absolute positions to the tokens, or None.
        mlp_ratio: Hidden width of the MLP over C.
        drop_path: Rate of stochastic depth.
        cpe: Whether depthwise convolutions go before attention and MLP.
    """

    def __init__(
        self,
        dim: int,
        make_attn: Callable[[int], nn.Module],
        ape: nn.Module | None = None,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        cpe: bool = False,
    ) -> None:
        super().__init__()
        self.ape = ape
        self.cpe1 = DepthwiseConv(dim) if cpe else None
        self.norm1 = nn.LayerNorm(dim)
        self.attn = make_attn(dim)
        self.out_proj = nn.Linear(dim, dim)
        self.drop_path = DropPath(drop_path)
        self.cpe2 = DepthwiseConv(dim) if cpe else None
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map tokens (B, H * W, C) to the same shape."""
        x = x if self.ape is None else self.ape(x, height, width)
        x = x if self.cpe1 is None else self.cpe1(x, height, width, residual=True)
        x = add_branch(self.drop_path(self.out_proj(self.attn(self.norm1(x), height, width))), x)
        x = x if self.cpe2 is None else self.cpe2(x, height, width, residual=True)
        return add_branch(self.drop_path(self.mlp(self.norm2(x))), x)
