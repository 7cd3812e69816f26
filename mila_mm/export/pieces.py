"""What every exported model has in front, and the layers that are stated anew so that a graph holds at any size."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mila_mm.errors import UserError
from mila_mm.nn.layers import ConvLayer


class Preprocess(nn.Module):
    """From uint8 RGB images (B, H, W, 3) to what the network takes: its order of colours, normalised, padded.

    Args:
        preprocessor: The ``data_preprocessor`` of a model of mmdet, mmseg or mmpretrain.
        divisor: Sides are padded at their ends to multiples of it.
        multiple: Sides of the images are multiples of it. A graph made for such sizes alone is silently wrong at
            others; this one fails there, in every runtime.
    """

    def __init__(self, preprocessor: nn.Module, divisor: int, multiple: int = 1) -> None:
        super().__init__()
        to_rgb = getattr(preprocessor, '_channel_conversion', None)
        to_rgb = getattr(preprocessor, 'channel_conversion', False) if to_rgb is None else to_rgb
        # Images are loaded in the order B, G, R, in which a model without a conversion takes them.
        self.swap = not (to_rgb or getattr(preprocessor, 'to_rgb', False))
        mean, std = (getattr(preprocessor, name, None) for name in ('mean', 'std'))
        one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
        self.register_buffer('mean', zero if mean is None else mean.detach().float().view(-1, 1, 1))
        self.register_buffer('std', one if std is None else std.detach().float().view(-1, 1, 1))
        pad_value = getattr(preprocessor, 'pad_value', getattr(preprocessor, 'pad_val', 0))
        if not isinstance(pad_value, (int, float)):
            raise UserError(f'export: expected one pad_value of the data_preprocessor, got {pad_value!r}')
        self.pad_value = float(pad_value)
        self.divisor = divisor
        self.multiple = multiple

    def forward(self, image: Tensor, size: Tensor | None = None) -> Tensor:
        """Return (B, 3, H', W') in fp32; beyond ``size`` (B, 2), the height and width of the content, is padding."""
        x = self._channels_first(image).float()
        if self.swap:
            x = x[:, [2, 1, 0]]
        x = (x - self.mean) / self.std
        height, width = x.shape[2], x.shape[3]
        if size is not None:
            rows = torch.arange(height, device=x.device) < size[:, :1]
            columns = torch.arange(width, device=x.device) < size[:, 1:]
            inside = rows[:, None, :, None] & columns[:, None, None, :]
            x = torch.where(inside, x, torch.full_like(x, self.pad_value))
        if self.divisor > 1:
            bottom, right = ((s + self.divisor - 1) // self.divisor * self.divisor - s for s in (height, width))
            x = F.pad(x, (0, right, 0, bottom), value=self.pad_value)
        return x

    def _channels_first(self, image: Tensor) -> Tensor:
        if self.multiple == 1:
            return image.permute(0, 3, 1, 2)
        # In blocks, into which no other image can be reshaped; the transpose keeps optimisers from joining both.
        batch, step = image.shape[0], self.multiple
        rows, columns = image.shape[1] // step, image.shape[2] // step
        blocks = image.reshape(batch, rows, step, columns, step, 3).permute(0, 5, 1, 2, 3, 4)
        return blocks.reshape(batch, 3, rows * step, columns * step)


class AdaptivePool(nn.Module):
    """:class:`torch.nn.AdaptiveAvgPool2d` as two matrix products, in a graph right for maps of every size.

    Exporters state the operator as an average pool whose window is that of the size they were shown: at another size
    the numbers are wrong, without an error.

    Args:
        output_size: Height and width of the result.
    """

    def __init__(self, output_size: tuple[int, int]) -> None:
        super().__init__()
        self.output_size = output_size

    def forward(self, x: Tensor) -> Tensor:
        """Average (B, C, H, W) to (B, C, *output_size)."""
        rows = averaging_matrix(x, x.shape[-2], self.output_size[0])
        columns = averaging_matrix(x, x.shape[-1], self.output_size[1])
        return rows @ x @ columns.transpose(0, 1)


def averaging_matrix(x: Tensor, length: int, bins: int) -> Tensor:
    """Return (bins, length): bin i averages from floor(i length / bins) up to ceil((i + 1) length / bins)."""
    index = torch.arange(bins, device=x.device)[:, None]
    start = torch.div(index * length, bins, rounding_mode='floor')
    end = torch.div((index + 1) * length + (bins - 1), bins, rounding_mode='floor')
    position = torch.arange(length, device=x.device)
    inside = ((position >= start) & (position < end)).to(x.dtype)
    return inside / (end - start).to(x.dtype)


class PooledPyramid(nn.Module):
    """mmdet's ``FPN`` whose last levels are pooled ones, with the pool stated as taking every second row and column.

    Both give the same maps. Of the pool, however, torch keeps in a graph for any size whether the sides were even.

    Args:
        pyramid: The trained ``FPN``, without ``add_extra_convs``; it is changed. Maps are (B, C, H, W), as there.
    """

    def __init__(self, pyramid: nn.Module) -> None:
        super().__init__()
        assert not pyramid.add_extra_convs
        self.levels = pyramid.num_outs
        pyramid.num_outs = len(pyramid.lateral_convs)
        self.pyramid = pyramid

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Compute all levels."""
        maps = list(self.pyramid(inputs))
        while len(maps) < self.levels:
            maps.append(maps[-1][:, :, ::2, ::2])
        return tuple(maps)


def deployable(model: nn.Module) -> nn.Module:
    """Copy a model: in eval mode, without what only training needs, with pools that are right at any size."""
    model = revert_sync_batchnorm(copy.deepcopy(model)).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, ConvLayer):
            _fold(module)
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(module, name, AdaptivePool(_pair(child.output_size, name)))
    return model


def _fold(layer: ConvLayer) -> None:
    """Put a BatchNorm into the weights of its convolution for good: quantisers look for weights, not for products."""
    if isinstance(layer.norm, nn.modules.batchnorm._BatchNorm):
        layer.conv = fuse_conv_bn_eval(layer.conv, layer.norm)
        layer.norm = None


def _pair(size: object, name: str) -> tuple[int, int]:
    height, width = size if isinstance(size, tuple) else (size, size)
    if not (isinstance(height, int) and isinstance(width, int)):
        raise UserError(f'export: expected a fixed output size of the pool {name}, got {size!r}')
    return height, width
