"""``MILAClassifier``: MILA with its ImageNet head, in plain PyTorch, with the methods that timm expects of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.layers import create_classifier
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.functional import dropout

from mila_mm.nn.fast_path import stages_of
from mila_mm.nn.layers import NormLayer
from mila_mm.nn.trunk import MILATrunk
from mila_mm.ops.common import to_image
from mila_mm.weights.names import to_project


class MILAClassifier(MILATrunk):
    """MILA (arXiv 2405.16605) as an image classifier, equal to the released one.

    The last stage's tokens pass a LayerNorm (``norm``), are averaged and go through a linear layer (``head``).
    State-dict names are the released ones; the RoPE tables that released files hold as well are ignored. timm knows
    the three published sizes by name, see :mod:`mila_mm.nn.timm`.

    Args:
        arch: 'nano', 'tiny', 'small', 'base', or dict(embed_dim, depths, num_heads).
        num_classes: Outputs of the head; 0 leaves it out.
        in_chans: Channels of the image.
        global_pool: 'avg', 'max', 'avgmax', 'catavgmax', or '' for none, which needs ``num_classes=0``.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth of the last block; rises linearly from 0.
        mlp_ratio: Hidden width of the MLPs over the width of the tokens.
        attn_backend: See :func:`mila_mm.ops.mila_attention`.
        norm_layer: Makes the norm of a convolution from its number of channels.
        **kwargs: For the next class in the method resolution order.

    Raises:
        ValueError: An argument that makes no model; the message says expected and got.

    Example:
        >>> import torch
        >>> from mila_mm import MILAClassifier
        >>> MILAClassifier('tiny', num_classes=10).eval()(torch.rand(1, 3, 96, 160)).shape
        torch.Size([1, 10])
    """

    pool_type: str

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mlp_ratio: float = 4.0,
        attn_backend: str = 'auto',
        norm_layer: NormLayer = nn.BatchNorm2d,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            arch=arch,
            in_channels=in_chans,
            out_indices=(-1,),
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            attn_backend=attn_backend,
            norm_layer=norm_layer,
            **kwargs,
        )
        # The released classifier calls norm what is the last output's norm in a dense backbone.
        last = len(self.dims) - 1
        self.norm = getattr(self, f'norm{last}')
        delattr(self, f'norm{last}')
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.num_features = self.head_hidden_size = self.dims[-1]
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=f'layers.{i}') for i, dim in enumerate(self.dims)
        ]
        self.reset_classifier(num_classes, global_pool)
        self.register_load_state_dict_pre_hook(_drop_computed)

    def get_classifier(self) -> nn.Module:
        """Return the linear layer, an identity where there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one.

        Args:
            num_classes: Outputs; 0 leaves the head out.
            global_pool: As for the constructor. Defaults to what there is.

        Raises:
            ValueError: If there are classes but no pooling, or no such pooling.
        """
        pool = self.pool_type if global_pool is None else global_pool
        if num_classes < 0 or pool not in ('', 'avg', 'max', 'avgmax', 'catavgmax') or (num_classes and not pool):
            raise ValueError(
                "MILAClassifier: expected num_classes >= 0 and global_pool 'avg', 'max', 'avgmax', "
                f"'catavgmax' or, with num_classes=0, ''; got {num_classes!r} and {pool!r}"
            )
        self.num_classes, self.pool_type = num_classes, pool
        self.global_pool, self.head = create_classifier(self.num_features, num_classes, pool_type=pool)
        if num_classes:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.head.to(next(self.parameters()))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: recompute each block in the backward."""
        self.with_cp = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns that sort parameters by depth, by stages if ``coarse``, else by blocks."""
        blocks = [(r'^layers\.(\d+)\.blocks\.(\d+)', None), (r'^layers\.(\d+)\.downsample', (0,)), (r'^norm', (99999,))]
        return {'stem': r'^patch_embed', 'blocks': r'^layers\.(\d+)' if coarse else blocks}

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the normalised map (B, C, H / 32, W / 32) of the last stage from images (B, in_chans, H, W)."""
        return self.forward_intermediates(x, indices=1)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool a map of :meth:`forward_features` and, unless ``pre_logits``, apply the head."""
        x = dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    # logits in place of a trunk's maps
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Compute the logits.

        Args:
            x: (B, in_chans, H, W), any size from 1 x 1.

        Returns:
            (B, num_classes); without classes the pooled features, without pooling too the map.
        """
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the maps of several stages.

        Args:
            x: (B, in_chans, H, W), any size from 1 x 1.
            indices: Stages to return, the last n if a number. Defaults to all.
            norm: Whether the last stage's map is normalised among the intermediates as well.
            stop_early: Whether to leave out the stages behind the last that is asked for.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: Whether to return the maps alone.

        Returns:
            The maps (B, C_i, H_i, W_i) before the downsampling; unless ``intermediates_only`` a pair of what the model
            ends with (normalised if it is the last stage's map, always NCHW) and them.

        Raises:
            ValueError: For another format.
        """
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"forward_intermediates: expected output_fmt 'NCHW' or 'NHWC', got {output_fmt!r}")
        taken, last_taken = feature_take_indices(len(self.layers), _as_timm_takes(indices))
        maps = []
        prepared = self.prepare(x)
        x, height, width = self.embed(x, prepared)
        for i, stage in enumerate(stages_of(self)):
            x = self.run_blocks(stage, x, height, width, prepared)
            end = i == len(self.layers) - 1
            final = self.norm(x) if end else x
            if i in taken:
                image = to_image(final if norm else x, height, width)
                maps.append(image if output_fmt == 'NCHW' else image.permute(0, 2, 3, 1))
            if end or ((stop_early or intermediates_only) and i == last_taken):
                break
            x, height, width = self.downsample(stage, x, height, width, prepared)
        return maps if intermediates_only else (to_image(final, height, width), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take out what maps of some stages do not need.

        Args:
            indices: As for :meth:`forward_intermediates`.
            prune_norm: Whether to take out the last norm; it goes with the last stage anyway.
            prune_head: Whether to take out pooling and head; they go with the last stage anyway.

        Returns:
            The stages that are asked for, from 0.
        """
        taken, last_taken = feature_take_indices(len(self.layers), _as_timm_takes(indices))
        shorter = last_taken < len(self.layers) - 1
        if prune_norm or shorter:
            self.norm = nn.Identity()
        self.layers = self.layers[: last_taken + 1]
        list(stages_of(self))[-1].downsample = None
        self.num_features = self.head_hidden_size = self.dims[last_taken]
        if prune_head or shorter:
            self.reset_classifier(0, '')
        return list(taken)  # a set in timm 1.0.3

    def load_pretrained(self, source: str | Path) -> None:
        """Load published or own weights; a head of another number of classes and another stem are adapted.

        Args:
            source: ``mila://tiny-in1k`` or another name, an address, or a file.

        Raises:
            MismatchError: If the weights do not fit otherwise.
            CheckpointError: If the file cannot be used.
        """
        from mila_mm.weights.load import load_model, read_checkpoint

        checkpoint = read_checkpoint(source)
        tensors = checkpoint['state_dict']
        own = self.state_dict()
        fresh = {name: own[name] for name in own if name.startswith('head.')}
        if any(name not in tensors or tensors[name].shape != value.shape for name, value in fresh.items()) or not fresh:
            # What timm does as well: a head for other classes starts fresh.
            tensors = {name: value for name, value in tensors.items() if not name.startswith('head.')} | fresh
        load_model(self, {**checkpoint, 'state_dict': tensors}, adapt_in_channels=True, label=str(source))


def _as_timm_takes(indices: int | Sequence[int] | None) -> int | list[int] | None:
    return indices if indices is None or isinstance(indices, int) else list(indices)


def _drop_computed(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take out of a released file what this code computes, so that it loads strictly."""
    own = {name for name in state_dict if name.startswith(prefix)}
    kept = to_project({name: state_dict[name] for name in own})[0]
    if not own.issuperset(kept):  # wrapped as a whole (module.): not for this hook
        return
    for name in own.difference(kept):
        del state_dict[name]
