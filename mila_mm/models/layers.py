"""The layers of MILA, in plain PyTorch and timm: stem, block, downsampling.

Between convolutions tokens lie as (B, N, C), which is channels_last for the convolutions: no layer copies a layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from ..ops import mila_attention
from ..ops.attention import autocast_dtype

NormLayer = Callable[[int], nn.Module]


def to_image(x: Tensor, height: int, width: int) -> Tensor:
    """Tokens (B, H * W, C) as an image (B, C, H, W) in channels_last, without a copy."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """An image (B, C, H, W) as contiguous tokens (B, H * W, C); no copy where it is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _full_precision(x: Tensor) -> bool:
    """True where a convolution of x would compute in fp32 or fp64."""
    return x.dtype in (torch.float32, torch.float64) and autocast_dtype(x.device.type) is None


def _may_overwrite() -> bool:
    """True where no backward will ask for an intermediate result; False in a trace, which is one for both."""
    return not (torch.is_grad_enabled() or torch.jit.is_tracing())


def _add(branch: Tensor, shortcut: Tensor) -> Tensor:
    """shortcut + branch; without gradients into the memory of the branch, which is used up, where the dtype fits."""
    # Autocast keeps the shortcut in fp32. With gradients, writing into a view costs the backward two copies.
    inside = _may_overwrite() and branch.dtype == shortcut.dtype
    return branch.add_(shortcut) if inside else shortcut + branch


class DepthwiseConv(nn.Conv2d):
    """Depthwise 3x3 with bias on tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, height: int, width: int, residual: bool = False) -> Tensor:
        """Return conv(x), or x + conv(x) if ``residual``; x and the result (B, H * W, C)."""
        weight = self.weight
        # x + conv(x) is the convolution with 1 added to its middle tap: one pass over memory less. Not in 16 bits,
        # where the sum would round the small weight away.
        inside = residual and _full_precision(x) and weight.dtype == x.dtype
        if inside:
            middle = torch.zeros(3, 3, dtype=weight.dtype, device=weight.device)
            middle[1, 1] = 1
            weight = weight + middle
        y = to_tokens(F.conv2d(to_image(x, height, width), weight, self.bias, padding=1, groups=self.groups))
        return x + y if residual and not inside else y


class ConvLayer(nn.Module):
    """Convolution, optional norm, optional ReLU: (B, C_in, H, W) to (B, C_out, H', W').

    A BatchNorm that is in eval mode is folded into the weights of its convolution on the fly, differentiably: a pass
    over the output less, and the state dict as it was. Where someone has hooked the two modules, they are called.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1,
                 bias: bool = False, norm_layer: NormLayer | None = None, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups,
                              bias=bias)
        self.norm = None if norm_layer is None else norm_layer(out_channels)
        self.act = act

    def _folds(self) -> bool:
        norm = self.norm
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.training:
            return False
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in (self.conv, norm))
        return norm.running_var is not None and norm.weight is not None and not hooked

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        conv, norm = self.conv, self.norm
        if self._folds():
            scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
            shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
            x = F.conv2d(x, conv.weight * scale.to(conv.weight.dtype)[:, None, None, None],
                         (norm.bias + shift * scale).to(conv.weight.dtype),
                         conv.stride, conv.padding, conv.dilation, conv.groups)
        else:
            x = conv(x)
            x = x if norm is None else norm(x)
        return F.relu(x, inplace=True) if self.act else x


class Stem(nn.Module):
    """Image (B, C_in, H, W) to tokens (B, N, dim) of stride 4; sizes are padded with zeros to multiples of 4."""

    def __init__(self, in_channels: int, dim: int, norm_layer: NormLayer) -> None:
        super().__init__()
        half = dim // 2
        self.conv1 = ConvLayer(in_channels, half, 3, 2, norm_layer=norm_layer)
        self.conv2 = nn.Sequential(ConvLayer(half, half, 3, norm_layer=norm_layer),
                                   ConvLayer(half, half, 3, norm_layer=norm_layer, act=False))
        self.conv3 = nn.Sequential(ConvLayer(half, 4 * dim, 3, 2, norm_layer=norm_layer),
                                   ConvLayer(4 * dim, dim, 1, norm_layer=norm_layer, act=False))

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Return the tokens and their grid (H, W)."""
        x = _pad_to_multiple(x, 4).contiguous(memory_format=torch.channels_last)
        x = self.conv1(x)
        x = self.conv3(_add(self.conv2(x), x))
        return to_tokens(x), x.shape[2], x.shape[3]


class Downsample(nn.Module):
    """Tokens (B, N, C) to (B, N', 2C) on half the grid; an odd side is padded with zeros at its end first."""

    def __init__(self, dim: int, norm_layer: NormLayer) -> None:
        super().__init__()
        hidden = 8 * dim
        self.conv = nn.Sequential(ConvLayer(dim, hidden, 1, bias=True),
                                  ConvLayer(hidden, hidden, 3, 2, groups=hidden, bias=True),
                                  ConvLayer(hidden, 2 * dim, 1, bias=True, norm_layer=norm_layer, act=False))

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        """Return the tokens and their grid (H', W')."""
        # The padding comes before the 1x1 convolution, whose bias and ReLU make it non-zero: the published weights
        # were trained so.
        x = self.conv(_pad_to_multiple(to_image(x, height, width), 2))
        return to_tokens(x), x.shape[2], x.shape[3]


def _pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) with zeros on the right and at the bottom."""
    # Written so, a compiler sees that the padded sides are multiples, and all later sizes stay short expressions.
    bottom, right = ((side + multiple - 1) // multiple * multiple - side for side in x.shape[2:])
    # Under a compiler the branch would be one program for each remainder.
    if torch.compiler.is_compiling() or bottom or right:
        x = F.pad(x, (0, right, 0, bottom))
    return x


class LinearAttention(nn.Module):
    """The parameters of :func:`mila_mm.ops.mila_attention`, and the qk projection before it."""

    def __init__(self, dim: int, num_heads: int, backend: str = 'auto') -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qk = nn.Linear(dim, 2 * dim)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, height: int, width: int, gate: Tensor) -> Tensor:
        """Attend over x (B, N, C), times silu(gate); returns (B, N, C)."""
        return mila_attention(self.qk(x), x, self.lepe.weight, self.lepe.bias, (height, width), self.num_heads, gate,
                              backend=self.backend)


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One MILA block (arXiv 2405.16605, figure 3): Mamba's block with linear attention in place of the scan, an MLP."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0,
                 attn_backend: str = 'auto') -> None:
        super().__init__()
        self.cpe1 = DepthwiseConv(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, dim)
        self.act_proj = nn.Linear(dim, dim)
        self.dwc = DepthwiseConv(dim)
        self.attn = LinearAttention(dim, num_heads, attn_backend)
        self.out_proj = nn.Linear(dim, dim)
        self.drop_path = DropPath(drop_path)
        self.cpe2 = DepthwiseConv(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map tokens (B, H * W, C) to the same shape."""
        x = self.cpe1(x, height, width, residual=True)
        y = self.norm1(x)
        u = F.silu(self.dwc(self.in_proj(y), height, width), inplace=_may_overwrite())
        y = self.attn(u, height, width, gate=self.act_proj(y))
        x = _add(self.drop_path(self.out_proj(y)), x)
        x = self.cpe2(x, height, width, residual=True)
        return _add(self.drop_path(self.mlp(self.norm2(x))), x)


class Stage(nn.Module):
    """The blocks of one resolution, and the downsampling to the next one, if any."""

    def __init__(self, blocks: list[Block], downsample: Downsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
