"""Names in released files and names here: one table, read both ways.

The backbone's own names are the same in both (``layers.0.blocks.0.attn.qk.weight`` ...), and so are
those of the heads: the modules of Mask R-CNN and UperNet kept theirs from mmdet 2 to 3 and from
mmseg 0 to 1. What differs is wrapping (``model`` or ``state_dict``, ``backbone.``, ``module.``) and
what the released code keeps in its files although it can be computed (RoPE tables, mmcv's EMA copies).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mila_mm.errors import UserError, printable
from mila_mm.weights.errors import CheckpointError

STEM = 'patch_embed.conv1.conv.weight'
LAYOUTS = ('state_dict', 'model', 'state_dict_ema')
_ROPE_REASON = 'RoPE tables, computed here'
_EMA_REASON = "averages that mmcv's EMA hook keeps beside the weights"
CLASSIFIER_REASON = 'norm and head of the classifier'
_ROPE = re.compile(r'(?:.*\.)?layers\.\d+\.blocks\.\d+\.attn\.rope\.rotations')
_CLASSIFIER = re.compile(r'(norm|head)\.(weight|bias)')
_WRAPPERS = ('module.', '_orig_mod.')


def unwrap(content: Any, *, key: str | None = None, source: str = 'checkpoint') -> tuple[Mapping[str, Any], str]:
    """Find the state dict in what a file holds.

    Args:
        key: The entry to take, e.g. ``'state_dict_ema'``; by default the first of
            ``state_dict``, ``model``, ``state_dict_ema`` that there is, else the content itself.

    Returns:
        The state dict, and the key that held it ('' for a bare one).

    Raises:
        CheckpointError: If there is none.
    """
    if isinstance(content, Mapping):
        for name in LAYOUTS if key is None else (key,):
            if isinstance(content.get(name), Mapping):
                return _tensors_only(content[name], source), name
        if key is None and content and all(isinstance(value, Tensor) for value in content.values()):
            return _tensors_only(content, source), ''
        found = ', '.join(printable(str(name)) for name in list(content)[:6]) or 'nothing'
    else:
        found = f'a {type(content).__name__}'
    raise CheckpointError(
        f'{source}: holds no weights; expected a dict with {key or " or ".join(LAYOUTS)}, found {found}'
    )


def _tensors_only(state_dict: Mapping[Any, Any], source: str) -> Mapping[str, Any]:
    odd = [name for name, value in state_dict.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    odd = [name for name in odd if not (isinstance(name, str) and name.endswith('_extra_state'))]
    if odd:
        shown = ', '.join(printable(repr(name)) for name in odd[:3]) + (', ...' if len(odd) > 3 else '')
        raise CheckpointError(f'{source}: its state dict holds entries that are no tensors: {shown}')
    return state_dict


def backbone_prefix(keys: Mapping[str, Any]) -> str | None:
    """Return what stands before the keys of a MILA backbone.

    Returns:
        ``''``, ``'backbone.'`` or the like; ``None`` if there is no MILA in it.
    """
    return min((key[: -len(STEM)] for key in keys if key.endswith(STEM)), key=len, default=None)


def with_versions(tensors: OrderedDict[str, Any], like: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """Give a state dict the versions of another's modules (torch's ``_metadata``), if that has them.

    Without them modules would take its keys for those of their first version.
    """
    versions = getattr(like, '_metadata', None)
    if versions is not None:
        vars(tensors)['_metadata'] = versions
    return tensors


def to_project(state_dict: Mapping[str, Any]) -> tuple[OrderedDict[str, Any], dict[str, list[str]]]:
    """Turn the names of a file into those of this package's models.

    Args:
        state_dict: As in the file. Files that already have our names come back unchanged.

    Returns:
        The renamed state dict (with torch's ``_metadata``, if any), and what was dropped: reason -> keys.
    """
    tensors = dict(state_dict)
    for wrapper in _WRAPPERS:
        if tensors and all(key.startswith(wrapper) for key in tensors):
            tensors = {key[len(wrapper) :]: value for key, value in tensors.items()}
    averaged = {f'ema_{key.replace(".", "_")}' for key in tensors if '.' in key}
    dropped: dict[str, list[str]] = {}
    for key in list(tensors):
        reason = _ROPE_REASON if _ROPE.fullmatch(key) else _EMA_REASON if key in averaged else None
        if reason:
            dropped.setdefault(reason, []).append(key)
            del tensors[key]
    return with_versions(OrderedDict(tensors), state_dict), dropped


def is_classifier_leftover(key: str) -> bool:
    """Tell whether a key belongs to the classifier around a backbone.

    Args:
        key: A name without prefix.

    Returns:
        Whether it is ``norm.*`` or ``head.*``.
    """
    return _CLASSIFIER.fullmatch(key) is not None


def to_released(
    state_dict: Mapping[str, Any], *, layout: str | None = None, image_size: int | None = None
) -> dict[str, OrderedDict[str, Any]]:
    """Turn a state dict with our names into what the released code's files hold.

    Args:
        state_dict: Of a backbone, classifier, detector or segmentor with a MILA in it.
        layout: The key to put it under. Defaults to ``'model'`` for bare backbones and classifiers,
            ``'state_dict'`` for whole detectors and segmentors.
        image_size: Add the RoPE tables that the released code registers as buffers, for square images of
            this size (224 for its dense backbones too). ``None`` leaves them out; the released code then
            reports them as missing and computes them itself.

    Raises:
        UserError: If there is no MILA in it, or the image size is not a multiple of 32.
    """
    tensors, _ = to_project(state_dict)
    prefix = backbone_prefix(tensors)
    if prefix is None:
        raise UserError(f'no MILA in these weights (no key ends in {STEM}): nothing to export to the released code')
    if image_size is not None:
        tensors.update(rope_tables(tensors, prefix, image_size))
    return {layout or ('state_dict' if prefix else 'model'): tensors}


def rope_tables(state_dict: Mapping[str, Any], prefix: str, image_size: int) -> dict[str, Tensor]:
    """Compute the RoPE tables in the layout of the released code.

    Channel pair j < C/4 turns by row * theta_j, pair j >= C/4 by column * theta_(j - C/4), with
    theta_j = 10000 ** (-j / (C/4)) (arXiv 2405.16605).

    Args:
        state_dict: Gives widths and depths.
        prefix: What stands before the backbone's keys.
        image_size: Side of the square image in pixels, a multiple of 32.

    Returns:
        One (H, W, C/2, 2) fp32 tensor of cosines and sines for each block.

    Raises:
        UserError: If the image size is not a positive multiple of 32, or a projection is not a matrix.
    """
    if image_size <= 0 or image_size % 32:
        raise UserError(f'image size for RoPE tables: expected a positive multiple of 32, got {image_size}')
    tables = {}
    pattern = re.compile(re.escape(prefix) + r'layers\.(\d+)\.blocks\.(\d+)\.attn\.qk\.weight')
    for match in filter(None, map(pattern.fullmatch, list(state_dict))):
        weight = state_dict[match[0]]
        if weight.dim() != 2:
            raise UserError(
                f'{match[0]}: shape {tuple(weight.shape)}, expected (out, in) of a linear layer; '
                'these are no weights of a MILA, so there are no RoPE tables for them'
            )
        side, quarter = image_size // 4 // 2 ** int(match[1]), weight.shape[1] // 4
        theta = 1 / (10000 ** (torch.arange(quarter) / quarter))
        turns = torch.arange(side)[:, None] * theta
        rows, columns = turns[:, None].expand(side, side, quarter), turns[None].expand(side, side, quarter)
        angles = torch.cat([rows, columns], dim=-1)
        name = f'{prefix}layers.{match[1]}.blocks.{match[2]}.attn.rope.rotations'
        tables[name] = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return tables


def describe(state_dict: Mapping[str, Any], prefix: str = '') -> str:
    """Name the MILA that a state dict belongs to.

    Returns:
        E.g. ``'MILA tiny (width 64, depths 2 4 8 4)'``.
    """
    from mila_mm.arch import ARCHS

    depths: dict[int, int] = {}
    pattern = re.compile(re.escape(prefix) + r'layers\.(\d+)\.blocks\.(\d+)\.')
    for match in filter(None, map(pattern.match, state_dict)):
        depths[int(match[1])] = max(depths.get(int(match[1]), 0), int(match[2]) + 1)
    stem = state_dict.get(f'{prefix}patch_embed.conv3.1.conv.weight')
    width = stem.shape[0] if stem is not None and stem.dim() else 0
    blocks = tuple(depths[stage] for stage in sorted(depths))
    name = next(
        (
            name
            for name, arch in ARCHS.items()
            if blocks and arch.embed_dim == width and arch.depths[: len(blocks)] == blocks
        ),
        'custom',
    )
    return f'MILA {name} (width {width}, depths {" ".join(map(str, blocks))})'
