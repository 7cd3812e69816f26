"""Follow the maps from the backbone through the necks to the heads, and rewrite what they pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mila_mm.swap.job import Job, plain
from mila_mm.swap.light import Size, features, graph_behind, maps_of, reason_of, run_part
from mila_mm.swap.result import Draft, Path, SwapFailed, SwapRefused
from mila_mm.swap.rewire import Feed, consumers, rewire


@dataclass(frozen=True)
class Route:
    """What happened to the maps on their way.

    Attributes:
        heads_see_a_change: Whether the maps that reach the heads differ in width, stride or number.
        used: Indices of the backbone's maps that the first neck reads; None where there is none or nothing tells.
    """

    heads_see_a_change: bool
    used: tuple[int, ...] | None


def rewire_all(draft: Draft, job: Job, feed: Feed, eager: bool) -> Route:
    """Rewrite necks and heads along the way of the maps.

    Args:
        draft: Config to change, with MILA in it.
        feed: The backbone's maps, before and now.
        eager: As :func:`mila_mm.swap.rewire.rewire` takes it.

    Returns:
        What the heads notice.

    Raises:
        SwapFailed: If a neck does not take the new maps.
        SwapRefused: If it cannot.
    """
    holder, scope = job.source.holder, job.source.scope
    neck = draft.get((*holder, 'neck'))
    paths = [(*holder, 'neck')] if isinstance(neck, dict) else [(*holder, 'neck', i) for i in range(len(neck or ()))]
    used = None
    for index, path in enumerate(paths):
        feed, read = _through_neck(draft, path, feed, scope, eager)
        used = read if index == 0 else used
    if not feed.changed:
        return Route(False, used)
    _align_cascade(draft, (*holder, 'decode_head'), feed)
    for key in consumers(draft.get(holder)):
        rewire(draft, (*holder, key), feed, eager)
    return Route(True, used)


def _through_neck(draft: Draft, path: Path, feed: Feed, scope: str, eager: bool) -> tuple[Feed, tuple[int, ...] | None]:
    """Rewrite a neck; return what those behind it see, and which maps it reads."""
    old_cfg = plain(draft.get(path))
    if _is_pyramid_maker(old_cfg, feed):
        draft.put(path, None, 'made a pyramid of maps of one size; MILA gives one')
        return feed, None
    if feed.changed:
        rewire(draft, path, feed, eager)
    what = f'neck {old_cfg.get("type")}'
    fed: list[Tensor] = []

    def inputs(device: str, size: Size) -> tuple[Tensor, ...]:
        fed[:] = [tensor.requires_grad_() for tensor in features(feed.new, device, size)]
        return tuple(fed)

    try:
        _, output, size = run_part(draft.get(path), scope, inputs)
    except Exception as error:
        if 'must match' in str(error) and len(set(feed.old.strides)) == 1 < len(feed.old):
            raise SwapRefused(f'{what} adds maps of one size, 1/{feed.old.strides[0]}; those of MILA differ') from error
        _refuse_broken(old_cfg, what, feed, scope)
        raise SwapFailed(f'{what} does not take maps of {feed.new}: {reason_of(error)}') from error
    new, used = maps_of(output, what, size), _read_by(fed, output)
    if not feed.changed:
        return feed, used
    try:
        _, output, size = run_part(old_cfg, scope, lambda device, size: features(feed.old, device, size))
        old = maps_of(output, what, size)
    except Exception:  # noqa: BLE001 - the old widths may be unknown; the heads' trial then decides
        old = new
    if len(old) != len(new):
        raise SwapFailed(f'{what} gave {len(old)} maps and now gives {len(new)}')
    return Feed(old, new, tuple(range(len(old)))), used


def _refuse_broken(neck: dict[str, Any], what: str, feed: Feed, scope: str) -> None:
    """Refuse where the config's own neck did not take the maps of its own backbone."""
    if None in feed.old.channels:
        return
    try:
        run_part(neck, scope, lambda device, size: features(feed.old, device, size))
    except Exception as error:
        raise SwapRefused(
            f'the config does not work with its own backbone either: {what} does not take maps of '
            f'{feed.old}: {reason_of(error)}'
        ) from error


def _read_by(inputs: Sequence[Tensor], output: Any) -> tuple[int, ...] | None:
    """Return the indices of the inputs that the outputs depend on, None where nothing was recorded."""
    outputs = [output] if isinstance(output, Tensor) else output
    leaves = {id(node.variable) for node in graph_behind(outputs) if hasattr(node, 'variable')}
    used = tuple(i for i, tensor in enumerate(inputs) if id(tensor) in leaves)
    return used or None


def _align_cascade(draft: Draft, path: Path, feed: Feed) -> None:
    """Let cascaded heads that read maps of one size read one map: each weighs its map by the head's before it."""
    heads = draft.get(path)
    if (
        not isinstance(heads, (list, tuple))
        or not heads
        or not all(isinstance(head, dict) and isinstance(head.get('in_index'), int) for head in heads)
    ):
        return
    places = [h['in_index'] % len(feed.old) for h in heads]
    deepest = max(places)
    if len({feed.old.strides[p] for p in places}) > 1 or deepest not in feed.kept:
        return
    if len({feed.new.strides[feed.kept.index(p)] if p in feed.kept else None for p in places}) == 1:
        return
    for index, head in enumerate(heads):
        if places[index] != deepest and head.get('in_channels') == feed.old.channels[places[index]]:
            draft.put((*path, index, 'in_index'), deepest, 'all heads of the cascade read maps of one size')
            draft.put((*path, index, 'in_channels'), feed.old.channels[deepest], 'width of that map')


def _is_pyramid_maker(neck: dict[str, Any], feed: Feed) -> bool:
    """Tell whether a neck only resizes maps of one stride and width, and takes no other widths."""
    return (
        'embed_dim' in neck
        and 'out_channels' not in neck
        and 'in_channels' not in neck
        and len(feed.new) > 1
        and len(set(feed.old.strides)) == 1
    )
