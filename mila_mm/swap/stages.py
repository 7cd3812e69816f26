"""Which stages of MILA take the place of the old backbone's maps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from mila_mm.swap.result import Maps, SwapRefused

STRIDES = (4, 8, 16, 32)


def choose_stages(old: Maps, scope: str) -> tuple[int, ...]:
    """Choose one stage of MILA for each map of the old backbone.

    Where each stride of the old maps is one of MILA's and none comes twice, the stages have those strides. Where
    not, a segmentor takes the deepest stages: the old backbone was dilated, and depth counts for more than
    resolution, which its heads restore. So it does for a single map at less than 1/32: nothing tells a dilated
    backbone from a shallow one there. A detector's anchors and RoIs are tied to strides, so there it is refused.

    Args:
        old: What the old backbone gives.
        scope: 'mmdet' or 'mmseg'.

    Returns:
        Indices of stages, ascending.

    Raises:
        SwapRefused: If there are none.
    """
    strides = old.strides
    _refuse_fused(old)
    exact = all(s in STRIDES for s in strides) and all(a < b for a, b in pairwise(strides))
    if exact and (scope == 'mmdet' or len(strides) > 1 or strides[-1] == STRIDES[-1]):
        return tuple(STRIDES.index(s) for s in strides)
    if scope == 'mmdet':
        raise SwapRefused(
            f'the detector works on maps {old}; MILA gives one map each at '
            f'{", ".join(f"1/{s}" for s in STRIDES)}, and its anchors and boxes are tied to the strides'
        )
    return tuple(range(len(STRIDES) - len(strides), len(STRIDES)))


def _refuse_fused(old: Maps) -> None:
    strides = old.strides
    if (old.channels[0], strides[0]) == (3, 1):
        raise SwapRefused(
            'the old backbone hands the image itself on: its neck runs a second backbone on it, with '
            'feedback into its stages, which MILA does not take'
        )
    if any(a > b for a, b in pairwise(strides)):
        raise SwapRefused(
            f'the old backbone is fused with its decoder: its maps get finer again ({old}); MILA is an encoder'
        )
    if strides[-1] < STRIDES[0]:
        raise SwapRefused(
            f'the old backbone is fused with its decoder: its maps ({old}) are finer than the finest of '
            f'MILA, 1/{STRIDES[0]}'
        )
    if len(old) > len(STRIDES):
        raise SwapRefused(f'the old backbone gives {len(old)} maps ({old}); MILA has {len(STRIDES)}')


def note_strides(old: Sequence[int], new: Sequence[int]) -> list[str]:
    """Say which output strides have changed, a sentence each."""
    changed = [f'1/{a} becomes 1/{b}' for a, b in zip(old, new, strict=True) if a != b]
    if not changed:
        return []
    return [
        f'output strides: {", ".join(dict.fromkeys(changed))}. Heads resize what they read, but small things lose '
        'resolution: whether accuracy suffers, only training tells'
    ]
