"""A plain transcription of MILA's published formulas: the yardstick of the benchmarks, and of nothing else.

It writes each formula of the paper (Demystify Mamba in Vision, arXiv 2405.16605) as the nearest PyTorch expression,
in the order in which the released model computes it: tokens as (B, N, C), a permutation around every convolution,
``elu(x) + 1``, and the rotation angles computed anew in every block. Its state-dict names are those of
``mila_mm.MILA``, so both run on the same weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ARCHS = {
    'tiny': ((64, 128, 256, 512), (2, 4, 8, 4), (2, 4, 8, 16)),
    'small': ((64, 128, 256, 512), (3, 6, 21, 6), (2, 4, 8, 16)),
    'base': ((96, 192, 384, 768), (3, 6, 21, 6), (3, 6, 12, 24)),
}


def rope(x: Tensor, height: int, width: int, base: float = 10000.0) -> Tensor:
    """Turn the channel pairs of x (B, H, W, C) by row * theta (first half) and column * theta (second half)."""
    channels = x.shape[-1]
    k = channels // 4
    theta = 1.0 / base ** (torch.arange(k, device=x.device, dtype=torch.float32) / k)
    rows = torch.arange(height, device=x.device, dtype=torch.float32)[:, None, None].expand(height, width, 1) * theta
    cols = torch.arange(width, device=x.device, dtype=torch.float32)[None, :, None].expand(height, width, 1) * theta
    angles = torch.cat((rows, cols), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().reshape(*x.shape[:-1], channels // 2, 2).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


class LinearAttention(nn.Module):
    """The attention of one block on u (B, N, C)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk = nn.Linear(dim, 2 * dim)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return (B, N, C)."""
        b, n, c = x.shape
        head = c // self.num_heads

        def split(t: Tensor) -> Tensor:
            return t.reshape(b, n, self.num_heads, head).permute(0, 2, 1, 3)

        q, k = self.qk(x).reshape(b, n, 2, c).permute(2, 0, 1, 3).unbind(0)
        q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
        q_rope = split(rope(q.reshape(b, height, width, c), height, width).reshape(b, n, c))
        k_rope = split(rope(k.reshape(b, height, width, c), height, width).reshape(b, n, c))
        q, k, v = split(q), split(k), split(x)
        z = 1 / (q @ k.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
        kv = (k_rope.transpose(-2, -1) * n**-0.5).to(v.dtype) @ (v * n**-0.5)
        out = (q_rope.to(v.dtype) @ kv * z).transpose(1, 2).reshape(b, n, c)
        grid = x.reshape(b, height, width, c).permute(0, 3, 1, 2)
        return out + self.lepe(grid).permute(0, 2, 3, 1).reshape(b, n, c)


class Mlp(nn.Module):
    """fc1, GELU, fc2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the shape of x."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One MILA block on x (B, N, C)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.cpe1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.in_proj, self.act_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.attn = LinearAttention(dim, num_heads)
        self.out_proj = nn.Linear(dim, dim)
        self.cpe2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Return the shape of x."""
        b, _, c = x.shape

        def conv(module: nn.Conv2d, t: Tensor) -> Tensor:
            return module(t.reshape(b, height, width, c).permute(0, 3, 1, 2)).flatten(2).permute(0, 2, 1)

        x = x + conv(self.cpe1, x)
        y = self.norm1(x)
        gate = F.silu(self.act_proj(y))
        u = F.silu(conv(self.dwc, self.in_proj(y)))
        x = x + self.out_proj(self.attn(u, height, width) * gate)
        x = x + conv(self.cpe2, x)
        return x + self.mlp(self.norm2(x))


class ConvNorm(nn.Module):
    """Convolution, optional BatchNorm, optional ReLU."""

    def __init__(
        self,
        cin: int,
        cout: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm: bool = True,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(cout) if norm else None
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, cout, H', W')."""
        x = self.conv(x)
        x = x if self.norm is None else self.norm(x)
        return F.relu(x) if self.act else x


class Stem(nn.Module):
    """Image to tokens of stride 4."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, dim // 2, 3, 2)
        self.conv2 = nn.Sequential(ConvNorm(dim // 2, dim // 2, 3), ConvNorm(dim // 2, dim // 2, 3, act=False))
        self.conv3 = nn.Sequential(ConvNorm(dim // 2, 4 * dim, 3, 2), ConvNorm(4 * dim, dim, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, dim, ceil(H / 4), ceil(W / 4))."""
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        x = self.conv1(x)
        return self.conv3(self.conv2(x) + x)


class Downsample(nn.Module):
    """Tokens to half the resolution and twice the width."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            ConvNorm(dim, 8 * dim, 1, bias=True, norm=False),
            ConvNorm(8 * dim, 8 * dim, 3, 2, groups=8 * dim, bias=True, norm=False),
            ConvNorm(8 * dim, 2 * dim, 1, bias=True, act=False),
        )

    def forward(self, x: Tensor, height: int, width: int) -> tuple[Tensor, int, int]:
        """Return the tokens (B, N', 2C) and their grid."""
        b, _, c = x.shape
        x = x.reshape(b, height, width, c).permute(0, 3, 1, 2)
        x = self.conv(F.pad(x, (0, width % 2, 0, height % 2)))
        return x.flatten(2).permute(0, 2, 1), x.shape[2], x.shape[3]


class Stage(nn.Module):
    """The blocks of one stage, and the downsampling behind them."""

    def __init__(self, dim: int, depth: int, num_heads: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads) for _ in range(depth))
        self.downsample = None if last else Downsample(dim)


class TranscribedMILA(nn.Module):
    """MILA's dense backbone by its formulas: (B, 3, H, W) to four maps (B, C_i, H_i, W_i)."""

    def __init__(self, arch: str = 'tiny') -> None:
        super().__init__()
        dims, depths, heads = ARCHS[arch]
        self.patch_embed = Stem(dims[0])
        sizes = zip(dims, depths, heads, strict=True)
        self.layers = nn.ModuleList(Stage(c, d, h, i == 3) for i, (c, d, h) in enumerate(sizes))
        for i, c in enumerate(dims):
            self.add_module(f'norm{i}', nn.LayerNorm(c))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of strides 4, 8, 16, 32."""
        x = self.patch_embed(image)
        height, width = x.shape[2:]
        x = x.flatten(2).permute(0, 2, 1)
        outs = []
        for i, stage in enumerate(self.layers):
            for block in stage.blocks:
                x = block(x, height, width)
            y = getattr(self, f'norm{i}')(x)
            outs.append(y.reshape(y.shape[0], height, width, -1).permute(0, 3, 1, 2).contiguous())
            if stage.downsample is not None:
                x, height, width = stage.downsample(x, height, width)
        return tuple(outs)
