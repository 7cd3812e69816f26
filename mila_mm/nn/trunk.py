"""The computation from image to feature maps, free of any framework but PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mila_mm.arch import Arch, resolve_arch
from mila_mm.nn.fast_path import FastPath, Pass, stages_of
from mila_mm.nn.layers import FUSIONS, Block, Downsample, LinearAttention, NormLayer, Stage, Stem
from mila_mm.ops.attention.op import BACKENDS
from mila_mm.ops.common import autocast_dtype


class Trunk(nn.Module):
    """Stem, stages and output norms of a backbone whose blocks work on tokens.

    Stages behind the last output are not built: a parameter without a gradient would stop distributed training. A
    subclass calls :meth:`_build`.

    Args:
        **kwargs: For the next class in the method resolution order.
    """

    _name = 'MILA'  # what messages call the model

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def _build(
        self,
        spec: Arch,
        out_indices: Sequence[int],
        mlp_ratio: float,
        drop_path_rate: float,
        with_cp: bool | str,
        make_stem: Callable[[], nn.Module],
        make_block: Callable[[int, float], nn.Module],
        make_downsample: Callable[[int], nn.Module],
    ) -> None:
        """Check what all models share, and build.

        Args:
            spec: Widths, depths and heads.
            out_indices: Stages whose maps are returned, in this order; -1 is the last stage.
            mlp_ratio: Only checked.
            drop_path_rate: Stochastic depth of the last block, in [0, 1); rises linearly from 0 in the first block.
            with_cp: Recompute in the backward instead of storing: True or 'block' each block from its input, 'stage'
                all blocks of a stage from the first one's; with both the wide part of each downsampling.
            make_stem: Makes the module from image to tokens and grid.
            make_block: Makes a block from the number of its stage and its drop path.
            make_downsample: Makes the module between two stages from the number of the first of them.
        """
        self.dims = spec.dims
        self.out_indices = _check_out_indices(out_indices, len(spec.depths), self._name)
        self.with_cp = with_cp
        if with_cp not in (False, True, 'block', 'stage'):
            raise ValueError(f"{self._name}: expected with_cp to be False, True, 'block' or 'stage', got {with_cp!r}")
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'{self._name}: expected drop_path_rate in [0, 1), got {drop_path_rate!r}')
        if mlp_ratio <= 0:
            raise ValueError(f'{self._name}: expected mlp_ratio above 0, got {mlp_ratio!r}')
        self.patch_embed = make_stem()
        # Rates are those of the whole model, also where only its first stages are built.
        last_block = max(sum(spec.depths) - 1, 1)
        rates = (drop_path_rate * i / last_block for i in count())
        self.layers = nn.ModuleList()
        last = max(self.out_indices)
        for i, depth in enumerate(spec.depths[: last + 1]):
            blocks = [make_block(i, next(rates)) for _ in range(depth)]
            self.layers.append(Stage(blocks, make_downsample(i) if i < last else None))
        for i in self.out_indices:
            self.add_module(f'norm{i}', nn.LayerNorm(self.dims[i]))
        self._init_linears()

    def _check_backend(self, attn_backend: str) -> None:
        if attn_backend not in BACKENDS:
            raise ValueError(
                f'{self._name}: expected attn_backend to be one of {", ".join(BACKENDS)}, got {attn_backend!r}'
            )

    def _init_linears(self) -> None:
        """Truncated normal of std 0.02 and zero biases; convolutions and norms keep PyTorch's defaults."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def prepare(self, x: Tensor) -> Pass | None:
        """What a pass over images x runs on beside the modules; None for the modules alone."""
        return None

    def embed(self, x: Tensor, prepared: Pass | None = None) -> tuple[Tensor, int, int]:
        """Images to tokens and their grid (H, W)."""
        params = None if prepared is None else prepared.convolutions_of(self.patch_embed)
        return self.patch_embed(x) if params is None else self.patch_embed(x, params.with_gradients())

    def downsample(
        self, stage: Stage, x: Tensor, height: int, width: int, prepared: Pass | None = None
    ) -> tuple[Tensor, int, int]:
        """Tokens of a stage to those of the next, and their grid."""
        recompute = bool(self.with_cp) and torch.is_grad_enabled()
        params = None if prepared is None else prepared.convolutions_of(stage.downsample)
        options = {} if params is None else {'params': params}
        assert stage.downsample is not None
        return stage.downsample(x, height, width, recompute, **options)

    def run_blocks(self, stage: Stage, x: Tensor, height: int, width: int, prepared: Pass | None = None) -> Tensor:
        """Send tokens (B, H * W, C) through the blocks of a stage; what ``with_cp`` names keeps its input alone."""

        def run(x: Tensor, blocks: Iterable[nn.Module]) -> Tensor:
            if prepared is not None:
                return prepared.run(blocks, x, height, width)
            for block in blocks:
                x = block(x, height, width)
            return x

        if not self.with_cp or not torch.is_grad_enabled():
            return run(x, stage.blocks)
        for blocks in [stage.blocks] if self.with_cp == 'stage' else [[block] for block in stage.blocks]:
            x = checkpoint(run, x, blocks, use_reentrant=False)
        return x

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the feature maps.

        Args:
            x: (B, in_channels, H, W), any size from 1 x 1.

        Returns:
            For each of ``out_indices`` the map of stage i, (B, embed_dim * 2**i, H_i, W_i) with H_0 = ceil(H / 4) and
            H_(i+1) = ceil(H_i / 2); channels_last if x is, else contiguous; in autocast's dtype where it is on.
        """
        # A 1-channel or 1 x 1 image is both contiguous and channels_last: take it as contiguous.
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        prepared = self.prepare(x)
        x, height, width = self.embed(x, prepared)
        maps = {}
        for i, stage in enumerate(stages_of(self)):
            x = self.run_blocks(stage, x, height, width, prepared)
            if i in self.out_indices:
                norm = getattr(self, f'norm{i}')
                y = norm(x) if prepared is None else prepared.norm(norm, x)
                if y.dtype == torch.float32:
                    y = y.to(autocast_dtype(x.device.type) or y.dtype)
                y = y.unflatten(1, (height, width)).permute(0, 3, 1, 2)
                maps[i] = y if channels_last else y.contiguous()
            if stage.downsample is not None:
                x, height, width = self.downsample(stage, x, height, width, prepared)
        return tuple(maps[i] for i in self.out_indices)


class MILATrunk(Trunk):
    """MILA (arXiv 2405.16605) as an ordinary module.

    :class:`mila_mm.MILA` adds OpenMMLab's contract. State-dict names are those of the released code.

    Args:
        arch: 'nano', 'tiny', 'small', 'base', or dict(embed_dim, depths, num_heads).
        in_channels: Channels of the image.
        out_indices: Stages whose maps are returned, in this order; -1 is the last stage.
        mlp_ratio: Hidden width of the MLPs over the width of the tokens.
        drop_path_rate: Stochastic depth of the last block, in [0, 1); rises linearly from 0 in the first block.
        with_cp: Recompute in the backward instead of storing: True or 'block' each block from its input, 'stage' all
            blocks of a stage from the first one's, which stores least and needs room for a whole stage then.
        attn_backend: 'auto', 'triton' or 'reference'; see :func:`mila_mm.ops.mila_attention`.
        fused: What else of a block to compute as one. True: each block as one node of autograd
            (:mod:`mila_mm.nn.block_node`), with weights cast once a step; where that cannot be, its parts. Names of
            'cpe_norm', 'dwc_silu' and 'projections': these parts (:class:`mila_mm.nn.layers.Block`). 'auto': as True
            where it wins, on a GPU that runs the kernels and in 16 bits on a CPU. The log says once where modules that
            have hooks or have been replaced keep a block from being a node.
        norm_layer: Makes the norm of a convolution from its number of channels.
        **kwargs: For the next class in the method resolution order.

    Raises:
        ValueError: An argument that makes no model; the message says expected and got.
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        with_cp: bool | str = False,
        attn_backend: str = 'auto',
        fused: bool | Literal['auto'] | Sequence[str] = 'auto',
        norm_layer: NormLayer = nn.BatchNorm2d,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        spec = resolve_arch(arch)
        self._check_backend(attn_backend)
        fusions = _check_fused(fused, self._name)
        self.fused = fused
        self._fast_path = FastPath()

        def block(stage: int, drop_path: float) -> Block:
            heads = spec.num_heads[stage]
            return Block(
                spec.dims[stage],
                lambda dim: LinearAttention(dim, heads, attn_backend),
                mlp_ratio,
                drop_path,
                fused=fusions,
            )

        self._build(
            spec,
            out_indices,
            mlp_ratio,
            drop_path_rate,
            with_cp,
            make_stem=lambda: Stem(in_channels, spec.embed_dim, norm_layer),
            make_block=block,
            make_downsample=lambda stage: Downsample(spec.dims[stage], norm_layer),
        )

    def prepare(self, x: Tensor) -> Pass | None:
        """What a pass over images x runs on: blocks as one node each, weights cast at once, where that can be."""
        return self._fast_path.prepare(self, x) if self.fused in (True, 'auto') else None


def _check_fused(fused: bool | str | Sequence[str], name: str) -> tuple[str, ...] | Literal['auto']:
    """Resolve True and False; raise ValueError for what is no fusion."""
    if isinstance(fused, str) and fused == 'auto':
        return 'auto'
    chosen = FUSIONS if fused is True else () if fused is False else tuple(fused)
    if isinstance(fused, str) or not set(chosen) <= set(FUSIONS):
        raise ValueError(
            f"{name}: expected fused to be True, False, 'auto' or names of {', '.join(FUSIONS)}, got {fused!r}"
        )
    return chosen


def _check_out_indices(out_indices: Sequence[int], num_stages: int, name: str) -> tuple[int, ...]:
    """Resolve negative indices; raise ValueError for any that names no stage, or one twice."""
    indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
    resolved = tuple(i + num_stages if i < 0 else i for i in indices)
    if not resolved or len(set(resolved)) < len(resolved) or not all(0 <= i < num_stages for i in resolved):
        raise ValueError(
            f'{name}: expected out_indices to be different stages from 0 to {num_stages - 1}, got {out_indices!r}'
        )
    return resolved
