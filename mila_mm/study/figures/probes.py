"""What goes on inside a backbone, as numbers for figures: gates, lengths of tokens, effective receptive field."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mila_mm.errors import UserError


@dataclass(frozen=True)
class LayerValue:
    """A number for one block.

    Attributes:
        stage: Number of the stage, from 0.
        block: Number of the block in its stage, from 0.
        value: The mean over images (and tokens and channels, as the function says).
        low: 10 % quantile of what ``value`` is the mean of.
        high: 90 % quantile.
    """

    stage: int
    block: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class GateMap:
    """The input gate of one block over the image.

    Attributes:
        stage: Number of the stage, from 0.
        block: Number of the block in its stage, from 0.
        maps: Mean over the channels, (B, H, W) float32.
    """

    stage: int
    block: int
    maps: np.ndarray


def blocks_of(backbone: nn.Module) -> list[tuple[int, int, nn.Module]]:
    """Return stage, number and module of each block of a :class:`mila_mm.nn.trunk.Trunk`.

    Raises:
        UserError: If the backbone has no ``layers[i].blocks[j]`` on tokens.
    """
    stages = getattr(backbone, 'layers', None)
    if not isinstance(stages, nn.ModuleList) or not all(hasattr(stage, 'blocks') for stage in stages):
        raise UserError(
            f'{type(backbone).__name__}: expected a MILA or a LinearAttentionTransformer, whose blocks can '
            'be looked into; for other backbones there is the effective receptive field'
        )
    return [(i, j, block) for i, stage in enumerate(stages) for j, block in enumerate(stage.blocks)]


@contextmanager
def _hooks() -> Iterator[Callable[[nn.Module, Callable[..., None]], None]]:
    """Give a function that hooks modules until the end of the block."""
    handles: list[Any] = []
    try:
        yield lambda module, hook: handles.append(module.register_forward_hook(hook))
    finally:
        for handle in handles:
            handle.remove()


def _summary(stage: int, block: int, values: Sequence[Tensor]) -> LayerValue:
    flat = torch.cat([v.flatten() for v in values]).double().numpy()
    low, high = np.quantile(flat, (0.1, 0.9))
    return LayerValue(stage, block, float(flat.mean()), float(low), float(high))


@torch.no_grad()
def token_length_std(
    backbone: nn.Module, features: Callable[[Tensor], Any], batches: Sequence[Tensor]
) -> list[LayerValue]:
    """Compute how much the tokens of an image differ in length behind each block (arXiv 2405.16605, figure 5).

    Args:
        backbone: A MILA or LinearAttentionTransformer in eval mode.
        features: Runs the backbone on images.
        batches: Images (B, 3, H, W), normalised.

    Returns:
        For each block the standard deviation over an image's tokens of their l2 norm, mean over the images.
    """
    lengths: dict[tuple[int, int], list[Tensor]] = {}
    with _hooks() as hook:
        for i, j, block in blocks_of(backbone):
            store = lengths.setdefault((i, j), [])
            hook(
                block,
                lambda module, args, out, store=store: store.append(out.float().norm(dim=-1).std(dim=1, correction=0)),
            )
        for batch in batches:
            features(batch)
    return [_summary(i, j, values) for (i, j), values in lengths.items()]


@torch.no_grad()
def forget_gates(backbone: nn.Module, features: Callable[[Tensor], Any], batches: Sequence[Tensor]) -> list[LayerValue]:
    """Compute the mean forget gate of each block (arXiv 2405.16605, figure 4b).

    Args:
        backbone: A LinearAttentionTransformer with forget gates, in eval mode.
        features: Runs the backbone on images.
        batches: Images (B, 3, H, W), normalised.

    Returns:
        For each block the mean of A over states, channels, tokens and images; quantiles are over all but the states.

    Raises:
        UserError: If no block has a forget gate.
    """
    found: dict[tuple[int, int], list[Tensor]] = {}
    with _hooks() as hook:
        for i, j, block in blocks_of(backbone):
            gate = getattr(getattr(block, 'attn', None), 'forget_gate', None)
            if gate is not None:
                store = found.setdefault((i, j), [])
                hook(gate, lambda module, args, out, store=store: store.append(module.mean_gate(args[0])))
        if not found:
            raise UserError('the model has no forget gate: expected a LinearAttentionTransformer with forget_gate=True')
        for batch in batches:
            features(batch)
    return [_summary(i, j, values) for (i, j), values in found.items()]


@torch.no_grad()
def input_gates(backbone: nn.Module, features: Callable[[Tensor], Any], images: Tensor) -> list[GateMap]:
    """Compute the input gate over images, block by block (arXiv 2405.16605, figure 4a).

    Args:
        backbone: A LinearAttentionTransformer with input gates, in eval mode.
        features: Runs the backbone on images.
        images: (B, 3, H, W), normalised.

    Raises:
        UserError: If no block has an input gate.
    """
    gates: dict[tuple[int, int], Tensor] = {}
    grids: dict[tuple[int, int], tuple[int, int]] = {}
    with _hooks() as hook:
        for i, j, block in blocks_of(backbone):
            gate = getattr(getattr(block, 'attn', None), 'input_gate', None)
            if gate is not None:
                hook(gate, lambda module, args, out, key=(i, j): gates.update({key: out.float().mean(dim=-1)}))
                hook(block, lambda module, args, out, key=(i, j): grids.update({key: (args[1], args[2])}))
        features(images)
    if not gates:
        raise UserError('the model has no input gate: expected a LinearAttentionTransformer with input_gate=True')
    return [GateMap(i, j, values.unflatten(1, grids[i, j]).numpy()) for (i, j), values in gates.items()]


def effective_receptive_field(
    features: Callable[[Tensor], Sequence[Tensor]], batches: Sequence[Tensor], stage: int = -1
) -> np.ndarray:
    """Compute how much each pixel of the input moves the middle of a feature map.

    Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016: the
    gradient of the central output, summed over its channels, with respect to the input; its magnitude summed over the
    input's channels and averaged over images. Here each image gives the channels random signs: behind a LayerNorm
    whose weights are equal, as a fresh one's are, their plain sum does not depend on the image at all. Where a side of
    the map is even, the middle is the mean of two; 224 gives odd ones down to stride 32.

    Args:
        features: Images to one map for each stage; in eval mode.
        batches: Images (B, 3, H, W), normalised, all of one size.
        stage: Whose map. Defaults to the last.

    Returns:
        (H, W) float64, at least 0, with sum 1.

    Raises:
        UserError: If the model has no such stage, or nothing reaches its middle.
    """
    total, count = 0.0, 0
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        images = batch.clone().requires_grad_()
        maps = features(images)
        if not -len(maps) <= stage < len(maps):
            raise UserError(f'--stage: expected 0 to {len(maps) - 1}, got {stage}')
        height, width = maps[stage].shape[2:]
        middle = maps[stage][..., (height - 1) // 2 : height // 2 + 1, (width - 1) // 2 : width // 2 + 1]
        signs = torch.randint(0, 2, middle.shape[:2], generator=generator).to(middle) * 2 - 1
        (gradient,) = torch.autograd.grad((signs * middle.mean(dim=(2, 3))).sum(), images)
        total = total + gradient.abs().sum(dim=(0, 1)).double().numpy()
        count += len(images)
    field = np.asarray(total) / max(count, 1)
    if not field.sum() > 0:
        raise UserError('the gradient of the middle of the map is zero or not a number: nothing to draw')
    return field / field.sum()


def area_ratios(field: np.ndarray, thresholds: Sequence[float] = (0.2, 0.3, 0.5, 0.99)) -> list[float]:
    """Return the share of the image that holds a share of the contributions, for each threshold.

    Ding et al., "Scaling Up Your Kernels to 31x31", CVPR 2022: the area of the smallest square around the middle that
    holds the threshold's share of the sum, over the area of the image. In an image that is no square it is cut off at
    the short sides.

    Args:
        field: (H, W), at least 0.
        thresholds: Shares, 0 to 1.

    Returns:
        A ratio in (0, 1] for each threshold.
    """
    height, width = field.shape
    sums, areas = [], []
    for reach in range(max(height, width) // 2 + 1):
        window = tuple(slice(max(0, (side - 1) // 2 - reach), side // 2 + 1 + reach) for side in field.shape)
        sums.append(field[window].sum())
        areas.append(field[window].size)
    shares = np.asarray(sums) / field.sum()
    # A rounding error must not ask for more than the whole.
    return [areas[min(int(np.searchsorted(shares, t - 1e-12)), len(areas) - 1)] / (height * width) for t in thresholds]
