"""The layers of MILA, in plain PyTorch and timm: stem, block, downsampling.

Between convolutions tokens lie as (B, N, C), which is channels_last for the convolutions: no layer copies a layout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mila_mm.nn import batch_norm, down_node
from mila_mm.nn.plain import why_not_plain
from mila_mm.nn.precision import full_precision
from mila_mm.nn.step_weights import CastConvolutions, Parameters
from mila_mm.ops import cpe_norm, dwc_silu, layer_norm, mila_attention, relu_dwc_relu, why_not_triton_stencil
from mila_mm.ops.common import to_image, to_tokens
from mila_mm.ops.stencil.down import by_triton

NormLayer = Callable[[int], nn.Module]
FUSIONS = ('cpe_norm', 'dwc_silu', 'projections')


def _may_overwrite() -> bool:
    """True where no backward will ask for an intermediate result; False in a trace, which is one for both."""
    return not (torch.is_grad_enabled() or torch.jit.is_tracing())


def add_branch(branch: Tensor, shortcut: Tensor) -> Tensor:
    """shortcut + branch; without gradients into the memory of the branch, which is used up, where the dtype fits."""
    # Autocast keeps the shortcut in fp32. With gradients, writing into a view costs the backward two copies.
    inside = _may_overwrite() and branch.dtype == shortcut.dtype
    return branch.add_(shortcut) if inside else shortcut + branch


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution with bias on tokens, 3x3 unless said otherwise."""

    bias: Tensor  # there is always one

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    # its input is tokens, not an image
    def forward(  # type: ignore[override]
        self, x: Tensor, height: int, width: int, residual: bool = False
    ) -> Tensor:
        """Return conv(x), or x + conv(x) if ``residual``; x and the result (B, H * W, C)."""
        weight = self.weight
        # x + conv(x) is the convolution with 1 added to its middle tap: one pass over memory less. Not in 16 bits or
        # TF32, where the sum would round the small weight, and x, away.
        inside = residual and full_precision(x) and weight.dtype == x.dtype
        if inside:
            middle = torch.zeros(self.kernel_size, dtype=weight.dtype, device=weight.device)
            middle[tuple(size // 2 for size in self.kernel_size)] = 1
            weight = weight + middle
        y = to_tokens(F.conv2d(to_image(x, height, width), weight, self.bias, padding=self.padding, groups=self.groups))
        return x + y if residual and not inside else y


class ConvLayer(nn.Module):
    """Convolution, optional norm, optional ReLU: (B, C_in, H, W) to (B, C_out, H', W').

    A BatchNorm that is in eval mode is folded into the weights of its convolution on the fly, differentiably: a pass
    over the output less, and the state dict as it was. Where someone has hooked the two modules, they are called.
    One in training mode is computed with the ReLU where the convolution's parameters are given and the kernels run.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        norm_layer: NormLayer | None = None,
        act: bool = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias
        )
        self.norm = None if norm_layer is None else norm_layer(out_channels)
        self.act = act

    def _folded(self) -> _BatchNorm | None:
        """The norm, where it goes into the weights."""
        norm = self.norm
        if not isinstance(norm, _BatchNorm) or norm.training or norm.running_var is None or norm.weight is None:
            return None
        return None if any(m._forward_hooks or m._forward_pre_hooks for m in (self.conv, norm)) else norm

    def forward(self, x: Tensor, params: Parameters | None = None) -> Tensor:
        """Apply the layer; ``params`` are weight and bias of the convolution where they have been cast already."""
        conv, norm, folded = self.conv, self.norm, self._folded()
        if folded is not None:
            mean, variance = folded.running_mean, folded.running_var
            assert mean is not None and variance is not None
            scale = folded.weight * (variance + folded.eps).rsqrt()
            shift = -mean if conv.bias is None else conv.bias - mean
            weight = conv.weight * scale.to(conv.weight.dtype)[:, None, None, None]
            bias = (folded.bias + shift * scale).to(conv.weight.dtype)
            x = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        else:
            x = conv(x) if params is None else conv._conv_forward(x, *params)
            if params is not None and batch_norm.fits(norm, x):
                return batch_norm.run(norm, x, self.act)
            x = x if norm is None else norm(x)
        return F.relu(x, inplace=True) if self.act else x


class Stem(nn.Module):
    """Image (B, C_in, H, W) to tokens (B, N, dim) of stride 4; sizes are padded with zeros to multiples of 4."""

    def __init__(self, in_channels: int, dim: int, norm_layer: NormLayer) -> None:
        super().__init__()
        half = dim // 2
        self.conv1 = ConvLayer(in_channels, half, 3, 2, norm_layer=norm_layer)
        self.conv2 = nn.Sequential(
            ConvLayer(half, half, 3, norm_layer=norm_layer), ConvLayer(half, half, 3, norm_layer=norm_layer, act=False)
        )
        self.conv3 = nn.Sequential(
            ConvLayer(half, 4 * dim, 3, 2, norm_layer=norm_layer),
            ConvLayer(4 * dim, dim, 1, norm_layer=norm_layer, act=False),
        )

    def forward(self, x: Tensor, params: Sequence[Parameters] | None = None) -> tuple[Tensor, int, int]:
        """Return the tokens and their grid (H, W); ``params`` as for :class:`ConvLayer`, one for each in turn."""
        x = pad_to_multiple(x, 4).contiguous(memory_format=torch.channels_last)
        if params is None:
            x = self.conv1(x)
            x = self.conv3(add_branch(self.conv2(x), x))
        else:
            x = self.conv1(x, params[0])
            y = self.conv2[1](self.conv2[0](x, params[1]), params[2])
            x = self.conv3[1](self.conv3[0](add_branch(y, x), params[3]), params[4])
        return to_tokens(x), x.shape[2], x.shape[3]


class Downsample(nn.Module):
    """Tokens (B, N, C) to (B, N', 2C) on half the grid; an odd side is padded with zeros at its end first."""

    def __init__(self, dim: int, norm_layer: NormLayer) -> None:
        super().__init__()
        hidden = 8 * dim
        self.conv = nn.Sequential(
            ConvLayer(dim, hidden, 1, bias=True),
            ConvLayer(hidden, hidden, 3, 2, groups=hidden, bias=True),
            ConvLayer(hidden, 2 * dim, 1, bias=True, norm_layer=norm_layer, act=False),
        )

    def forward(
        self, x: Tensor, height: int, width: int, recompute: bool = False, params: CastConvolutions | None = None
    ) -> tuple[Tensor, int, int]:
        """Return the tokens and their grid (H', W').

        ``recompute`` stores nothing of the wide part for the backward; ``params`` are casts of what convolutions have.
        """
        # The padding comes before the 1x1 convolution, whose bias and ReLU make it non-zero: the published weights
        # were trained so.
        x = pad_to_multiple(to_image(x, height, width), 2)
        if params is not None and not torch.compiler.is_compiling() and down_node.fits(self.conv, x, params):
            return down_node.downsample(self.conv, x, params, recompute)
        cast = None if params is None else params.with_gradients()

        def widen(x: Tensor) -> Tensor:
            return self.conv[:2](x) if cast is None else self._widen(x, cast)

        # Without the last layer: its BatchNorm would count the batch twice.
        if recompute:
            x = checkpoint(widen, x, use_reentrant=False)
        elif cast is not None:
            x = widen(x)
        else:
            x = self.conv(x)
            return to_tokens(x), x.shape[2], x.shape[3]
        x = self.conv[2](x) if cast is None else self.conv[2](x, cast[2])
        return to_tokens(x), x.shape[2], x.shape[3]

    def _widen(self, x: Tensor, params: Sequence[Parameters]) -> Tensor:
        """The first two layers on parameters that have been cast, what lies between their products in one pass."""
        first, second = self.conv[0], self.conv[1]
        bias = params[1][1]
        if first.norm is not None or second.norm is not None or bias is None or not (first.act and second.act):
            return second(first(x, params[0]), params[1])
        if not down_node.is_strided(second.conv):
            return second(first(x, params[0]), params[1])
        x = first.conv._conv_forward(x, *params[0])
        height, width = x.shape[2:]
        if not by_triton(x.flatten(2).mT, height, width):
            return second(F.relu(x, inplace=True), params[1])
        y = relu_dwc_relu(to_tokens(x), params[1][0], bias, (height, width))
        return to_image(y, (height + 1) // 2, (width + 1) // 2)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) with zeros on the right and at the bottom."""
    # Written so, a compiler sees that the padded sides are multiples, and all later sizes stay short expressions.
    bottom, right = ((side + multiple - 1) // multiple * multiple - side for side in x.shape[2:])
    # Under a compiler the branch would be one program for each remainder, and a trace would keep the one that it saw.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or bottom or right:
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
        return mila_attention(
            self.qk(x), x, self.lepe.weight, self.lepe.bias, (height, width), self.num_heads, gate, backend=self.backend
        )


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
    """Mamba's block around an attention, and an MLP: by default the block of MILA (arXiv 2405.16605, figure 3).

    Args:
        dim: Width C of the tokens.
        make_attn: Makes the attention from the width of u, called as attn(u, height, width, gate) with u and the gate
            before its SiLU (B, N, inner_dim); it returns the attention times silu(gate).
        mlp_ratio: Hidden width of the MLP over C; 0 for none.
        drop_path: Rate of stochastic depth.
        inner_dim: Width of u. Defaults to C.
        cpe: Whether depthwise convolutions go before attention and MLP.
        kernel_size: Of the depthwise convolution before the attention.
        fused: Which of ``FUSIONS`` to compute as one: cpe, its sum and the norm after it, :func:`mila_mm.ops.cpe_norm`
            dwc, if it is a 3x3, and SiLU, :func:`mila_mm.ops.dwc_silu`; in_proj and act_proj as one product. 'auto' for
            all of them where their kernels run. The modules then only hold the parameters; where one of them has been
            replaced or hooked, all are called one after the other instead.
    """

    def __init__(
        self,
        dim: int,
        make_attn: Callable[[int], nn.Module],
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        inner_dim: int | None = None,
        cpe: bool = True,
        kernel_size: int = 3,
        fused: Collection[str] | Literal['auto'] = (),
    ) -> None:
        super().__init__()
        self.fused = fused if fused == 'auto' else frozenset(fused)
        inner_dim = dim if inner_dim is None else inner_dim
        self.cpe1 = DepthwiseConv(dim) if cpe else None
        self.norm1 = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, inner_dim)
        self.act_proj = nn.Linear(dim, inner_dim)
        self.dwc = DepthwiseConv(inner_dim, kernel_size)
        self.attn = make_attn(inner_dim)
        self.out_proj = nn.Linear(inner_dim, dim)
        self.drop_path = DropPath(drop_path)
        self.mlp = None
        if mlp_ratio > 0:
            self.cpe2 = DepthwiseConv(dim) if cpe else None
            self.norm2 = nn.LayerNorm(dim)
            self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map tokens (B, H * W, C) to the same shape."""
        fused = self._fusions(x)
        x, y = self._position_and_norm(self.cpe1, self.norm1, x, height, width, 'cpe_norm' in fused)
        if 'projections' in fused:
            u, gate = self._project(y)
        else:
            u, gate = self.in_proj(y), None
        if 'dwc_silu' in fused and self.dwc.kernel_size == (3, 3):
            u = dwc_silu(u, self.dwc.weight, self.dwc.bias, (height, width))
        else:
            u = F.silu(self.dwc(u, height, width), inplace=_may_overwrite())
        y = self.attn(u, height, width, gate=self.act_proj(y) if gate is None else gate)
        x = add_branch(self.drop_path(self.out_proj(y)), x)
        if self.mlp is None:
            return x
        x, y = self._position_and_norm(self.cpe2, self.norm2, x, height, width, 'cpe_norm' in fused)
        return add_branch(self.drop_path(self.mlp(y)), x)

    def _fusions(self, x: Tensor) -> Collection[str]:
        """What to compute as one on x (B, N, C)."""
        auto = self.fused == 'auto'
        # Of a trace or an export (other types of x) nobody knows where it will run.
        wins = not auto or (type(x) is Tensor and x.is_cuda and why_not_triton_stencil(x) is None)
        if not self.fused or not wins:
            return ()
        parts = [('in_proj', nn.Linear), ('act_proj', nn.Linear), ('dwc', DepthwiseConv), ('norm1', nn.LayerNorm)]
        parts += [('cpe1', DepthwiseConv)] if self.cpe1 is not None else []
        if self.mlp is not None:
            parts += [('norm2', nn.LayerNorm), *([('cpe2', DepthwiseConv)] if self.cpe2 is not None else [])]
        changed = any(why_not_plain(name, getattr(self, name), kind) is not None for name, kind in parts)
        return () if changed else FUSIONS if auto else self.fused

    def _position_and_norm(
        self, cpe: DepthwiseConv | None, norm: nn.LayerNorm, x: Tensor, height: int, width: int, fused: bool
    ) -> tuple[Tensor, Tensor]:
        """x + cpe(x), and the norm of that."""
        if fused and cpe is not None:
            return cpe_norm(x, cpe.weight, cpe.bias, norm.weight, norm.bias, (height, width), eps=norm.eps)
        if fused and cpe is None:
            return x, layer_norm(x, norm.weight, norm.bias, eps=norm.eps)
        x = x if cpe is None else cpe(x, height, width, residual=True)
        return x, norm(x)

    def _project(self, y: Tensor) -> tuple[Tensor, ...]:
        """in_proj(y) and act_proj(y) as halves of one (B, N, 2 * inner_dim), each read in place by what follows."""
        parts = self.in_proj, self.act_proj
        weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        return F.linear(y, weight, bias).chunk(2, dim=-1)


class Stage(nn.Module):
    """The blocks of one resolution, and the downsampling to the next one, if any."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
