"""What the old backbone gives: by building and running it, and where it cannot be built, by what its consumers read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from mila_mm.swap.light import PROBE_SIZE, Size, image, maps_of, reason_of, run_part, sorted_config
from mila_mm.swap.result import Maps, SwapRefused

_PROBES: dict[str, Probe | SwapRefused | str] = {}
_MILA_MAPS: dict[str, Maps] = {}
_INNER = ('backbone_cfg', 'backbone', 'encoder_cfg')


@dataclass(frozen=True)
class Probe:
    """What is known of the old backbone.

    Attributes:
        maps: What it gives.
        frozen: Whether it does not learn at all.
        parameters: Names of its parameters; empty where it could not be built.
        unknown: Why it could not be built, a sentence; None where it was.
    """

    maps: Maps
    frozen: bool = False
    parameters: tuple[str, ...] = ()
    unknown: str | None = None


def probe_backbone(holder: dict[str, Any], scope: str) -> Probe:
    """Find out what a model's backbone gives.

    Args:
        scope: 'mmdet' or 'mmseg'.

    Raises:
        SwapRefused: If it gives something other than one map for each of some stages, or nothing can be known.
    """
    key = repr((scope, sorted_config(holder['backbone'])))
    if key not in _PROBES:
        _PROBES[key] = _probe(holder['backbone'], scope)
    outcome = _PROBES[key]
    if isinstance(outcome, SwapRefused):
        raise SwapRefused(str(outcome))
    if isinstance(outcome, Probe):
        return outcome
    what = f'the old backbone {holder["backbone"]["type"]}'
    inferred = _infer(holder)
    if inferred is None:
        raise SwapRefused(f'{what} cannot be built here ({outcome}), and its consumers do not tell what it gives')
    return Probe(
        inferred,
        unknown=f'{what} cannot be built here ({outcome}); its maps are taken from what its '
        f'consumers read, their strides are assumed: {inferred}',
    )


def _probe(cfg: dict[str, Any], scope: str) -> Probe | SwapRefused | str:
    """Build and run a backbone; return why not where it cannot be, and the refusal where it cannot be replaced."""
    try:
        return _run(cfg, scope)
    except SwapRefused as refusal:
        return refusal
    except Exception as error:  # noqa: BLE001 - any error of a foreign backbone means that its consumers must tell
        return reason_of(error)


def _run(cfg: dict[str, Any], scope: str) -> Probe:
    for key in _INNER:
        if isinstance(cfg.get(key), dict):
            raise SwapRefused(
                f'{cfg["type"]} is fused with its heads: it wraps another backbone '
                f'({cfg[key].get("type")}) and merges its maps with paths of its own'
            )

    def inputs(device: str, size: Size) -> Tensor:
        return image(device, size, in_channels_of(cfg))

    what = f'the old backbone {cfg["type"]}'
    size = PROBE_SIZE
    try:
        module, output, size = run_part(cfg, scope, inputs)
    except Exception:
        if _own_size(cfg) is None:
            raise
        module, output, size = run_part(cfg, scope, inputs, size=_own_size(cfg) or size)
    _, training, _ = run_part(cfg, scope, inputs, training=True, size=size)
    maps = maps_of(output, what, size)
    in_training = maps_of(training, f'{what} in training', size)
    if len(in_training) != len(maps):
        raise SwapRefused(
            f'{what} is fused with its heads: it gives {len(in_training)} outputs in training and '
            f'{len(maps)} in testing'
        )
    if _batch(training) != _batch(output):
        raise SwapRefused(
            f'{what} is fused with its heads: in training it gives each image '
            f'{_batch(training) // _batch(output)} times, once for each of its branches'
        )
    parameters = dict(module.named_parameters())
    frozen = bool(parameters) and not any(p.requires_grad for p in parameters.values())
    return Probe(maps, frozen, tuple(parameters))


def in_channels_of(cfg: dict[str, Any]) -> int:
    """Return the channels of the image that a backbone's config asks for, 3 where it does not say."""
    channels = cfg.get('in_channels', 3)
    return channels if isinstance(channels, int) and not isinstance(channels, bool) else 3


def _own_size(cfg: dict[str, Any]) -> Size | None:
    """Return the image size that a backbone's config names; some take no other."""
    size = cfg.get('img_size', cfg.get('pretrain_img_size'))
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, (list, tuple)) and len(size) == 2 else None


def mila_maps(cfg: dict[str, Any], scope: str) -> Maps:
    """Return what a MILA gives, by running it on the meta device."""
    key = repr(sorted((k, v) for k, v in cfg.items() if k != 'init_cfg'))
    if key not in _MILA_MAPS:
        _, output, size = run_part(cfg, scope, lambda device, size: image(device, size, in_channels_of(cfg)))
        _MILA_MAPS[key] = maps_of(output, 'MILA', size)
    return _MILA_MAPS[key]


def _batch(output: Any) -> int:
    first = output[0] if isinstance(output, (list, tuple)) else output
    return int(first.shape[0])


def _infer(holder: dict[str, Any]) -> Maps | None:
    """Read the maps off the first consumer that names a width for each."""
    neck = holder.get('neck')
    first = neck[0] if isinstance(neck, (list, tuple)) and neck else neck
    sources = (
        [first]
        if isinstance(first, dict) and 'in_channels' in first
        else [v for k, v in holder.items() if k not in ('backbone', 'neck')]
    )
    known: dict[int, int] = {}
    for part in _dicts(sources):
        widths, where = part.get('in_channels'), part.get('in_index')
        if isinstance(widths, (list, tuple)):
            if not isinstance(where, (list, tuple)) and list(widths) == sorted(widths, reverse=True):
                widths = widths[::-1]  # some necks count from the deepest map
            places = where if isinstance(where, (list, tuple)) else range(len(widths))
            known |= dict(zip(places, widths, strict=False))
        elif isinstance(widths, int) and (isinstance(where, int) or not known):
            known.setdefault(where if isinstance(where, int) and where >= 0 else 0, widths)
    count = _number_of_maps(holder['backbone'], known)
    if not known or count > len(STRIDES) or any(not 0 <= i < count for i in known):
        return None
    return Maps(tuple(known.get(i) for i in range(count)), STRIDES[-count:])


def _number_of_maps(backbone: dict[str, Any], known: dict[int, int]) -> int:
    indices = backbone.get('out_indices')
    needed = max(known, default=-1) + 1
    return max(needed, len(indices)) if isinstance(indices, (list, tuple)) else needed


def _dicts(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _dicts(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _dicts(value)


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
