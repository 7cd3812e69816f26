"""Heads that pool a map to one value, which BatchNorm cannot take of a single image; ``rehearsal.py`` tries all."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config

from mila_mm.datasets.checks.findings import Finding, error
from mila_mm.engine.data.splits import kind_name

ONE_VALUE = (
    'BatchNorm sees one value a channel, of which there is no variance: one image a step and a map of 1 x 1; set '
    "train_dataloader.batch_size=2 or more, or a norm_cfg of dict(type='GN', num_groups=32) there"
)
_NORMS = frozenset({'BN', 'BN2d', 'SyncBN'})


def check_one_value(cfg: Config) -> list[Finding]:
    """Check the heads of mmseg that are known to pool, of a training in one process.

    Args:
        cfg: A segmentor's config.
    """
    if (cfg.get('train_dataloader') or {}).get('batch_size') != 1 or kind_name(cfg.model) != 'EncoderDecoder':
        return []
    head = cfg.model.get('decode_head')
    norm = head.get('norm_cfg') if isinstance(head, dict) else None
    place = _pooled(head) if isinstance(norm, dict) and norm.get('type') in _NORMS else None
    return [error('', f'model.decode_head.{place}.1.bn: {ONE_VALUE}')] if place else []


def _pooled(head: dict[str, Any]) -> str | None:
    """Return the layer of a head that pools its map to 1 x 1, None where none is known to."""
    kind = kind_name(head)
    if kind in ('ASPPHead', 'DepthwiseSeparableASPPHead'):
        return 'image_pool'
    scales = head.get('pool_scales', (1, 2, 3, 6))
    known = kind in ('PSPHead', 'UPerHead') and isinstance(scales, (list, tuple)) and 1 in scales
    return f'psp_modules.{list(scales).index(1)}' if known else None
