"""Rewrite what consumes feature maps: channels, indices, strides and scales in the configs of necks and heads."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mila_mm.swap.result import Draft, Maps, Path

# Values under these keys are no widths of maps, whatever they equal.
_NO_WIDTHS = (
    'num_classes',
    'out_indices',
    'img_size',
    'input_size',
    'num_queries',
    'num_points',
    'max_per_img',
    'scales',
)
# Nor are values under such ones, which are safe under the usual names only: widths inside of a part, sizes, counts.
_NO_GUESSES = re.compile(
    r'(hidden|feedforward|ffn|embed|mlp|fc_|dim_feedforward|num_|max_|min_|img_|image_|input_size)'
    r'|.*(_size|_sizes|_shape|_stride|_strides|_scale|_scales|_hidden_dim)$'
)
GUESSED = 'taken for'
_SINGLE_KEYS = ('in_channels', 'in_channel', 'in_planes', 'in_dim', 'in_dims', 'input_dim', 'backbone_channel')


@dataclass(frozen=True)
class Feed:
    """What a consumer read and what it reads now.

    Attributes:
        old: The maps it read.
        new: The maps it reads now; ``new[i]`` takes the place of ``old[kept[i]]``.
        kept: Indices of the old maps that still have a successor, ascending.
    """

    old: Maps
    new: Maps
    kept: tuple[int, ...]

    @property
    def changed(self) -> bool:
        """Whether a consumer can tell the difference."""
        return self.old != self.new or self.kept != tuple(range(len(self.old)))

    def widths_at(self, positions: Sequence[int]) -> list[int]:
        """New widths in place of the old ones at some positions; dropped maps drop out."""
        return [self.new.channels[self.kept.index(p)] for p in positions if p in self.kept]  # type: ignore[misc]

    def position(self, index: int) -> int:
        """Return where a map is now; negative indices stay so where they still hold."""
        old = index if index >= 0 else index + len(self.old)
        new = self.kept.index(old)
        return new if index >= 0 else new - len(self.kept)


def rewire(draft: Draft, path: Path, feed: Feed, eager: bool = False) -> None:
    """Rewrite the config of a consumer, nested parts included.

    Args:
        path: Where the consumer's dict stands.
        eager: Whether numbers equal to an old width are taken for one also under other names than the usual ones. Such
            a change says :data:`GUESSED` in its reason.
    """
    node = draft.get(path)
    if isinstance(node, (list, tuple)):
        for index in range(len(node)):
            rewire(draft, (*path, index), feed, eager)
        return
    if not isinstance(node, dict):
        return
    in_index = node.get('in_index')
    for key in list(node):
        value = node[key]
        if isinstance(value, dict) or _is_list_of(value, (dict, list, tuple)):
            rewire(draft, (*path, key), feed, eager)
            continue
        new, why = _rewritten(node, key, value, in_index, feed)
        if new is None and eager:
            new, why = _guessed(node, key, value, feed)
        if new is not None:
            draft.put((*path, key), new, why)
    _shift_levels(draft, path, feed)


def _rewritten(node: dict[str, Any], key: str, value: Any, in_index: Any, feed: Feed) -> tuple[Any, str]:
    """Return what stands in place of a value and why, (None, '') where it stays."""
    if key in ('in_index', 'in_indices') and feed.kept != tuple(range(len(feed.old))):
        return _new_index(value, feed), 'the maps that nothing reads are gone'
    if key in ('scales', 'rescales') and str(node.get('type')).endswith('MultiLevelNeck'):
        return _new_scales(value, feed), 'the same sizes from the new strides'
    if key not in _NO_WIDTHS and not isinstance(value, bool):
        return _new_width(node, key, value, in_index, feed)
    return None, ''


def _guessed(node: dict[str, Any], key: str, value: Any, feed: Feed) -> tuple[Any, str]:
    """Return what stands in place of a value that equals an old width under a name that does not say so."""
    if key in _NO_WIDTHS or _NO_GUESSES.match(key) or isinstance(value, bool):
        return None, ''
    old, in_index = list(feed.old.channels), node.get('in_index')
    if isinstance(value, int):
        if (key in _SINGLE_KEYS and isinstance(in_index, int)) or _is_of_rois(node, key):
            return None, ''  # about a map whose width is another
        position = next((i for i, width in enumerate(old) if width == value), None)
        if position in feed.kept:
            return feed.widths_at([position])[0], (
                f'equal to the width of the old map at 1/{feed.old.strides[position]}: {GUESSED} it'
            )
    if _is_list_of(value, int):
        positions = _positions_of_list(list(value), old, in_index)
        if positions is not None:
            return type(value)(feed.widths_at(positions)), f'equal to the widths of the old maps: {GUESSED} them'
        if len(value) > len(old) and list(value[: len(old)]) == old:
            new = [*feed.widths_at(range(len(old))), *value[len(old) :]]
            return type(value)(new), f'starts with the widths of the old maps: {GUESSED} them'
    return None, ''


def _new_width(node: dict[str, Any], key: str, value: Any, in_index: Any, feed: Feed) -> tuple[Any, str]:
    if _is_list_of(value, int):
        if key == 'in_channels' and len(feed.old) == 1 and 'backbone_channel' in node:
            return _in_proportion(value, feed), "parts of the backbone's width"
        return _new_list(key, value, in_index, feed)
    if isinstance(value, int):
        position = _position_of(node, key, value, in_index, feed)
        if position is not None and position in feed.kept:
            return feed.widths_at([position])[0], f'width of the map at 1/{_stride(feed, position)}'
    return None, ''


def _stride(feed: Feed, position: int) -> int:
    return feed.new.strides[feed.kept.index(position)]


def _new_index(value: Any, feed: Feed) -> Any:
    if isinstance(value, int):
        old = value if value >= 0 else value + len(feed.old)
        return feed.position(value) if old in feed.kept else None
    if _is_list_of(value, int):
        return type(value)(feed.position(v) for v in value if (v if v >= 0 else v + len(feed.old)) in feed.kept)
    return None


def _new_scales(value: Any, feed: Feed) -> Any:
    """Scale maps to the sizes that they were scaled to before."""
    if len(feed.kept) != len(feed.old) or len(value) != len(feed.old):
        return None
    scales = [v * new / old for v, new, old in zip(value, feed.new.strides, feed.old.strides, strict=True)]
    return type(value)(int(s) if s == int(s) else s for s in scales)


def _in_proportion(value: Sequence[int], feed: Feed) -> Any:
    """Widths that a pyramid on one map counts in parts of that map's: ViTDet's has a quarter, a half, one, one."""
    old, new = feed.old.channels[0], feed.new.channels[0]
    if not old or not new or any(v * new % old for v in value):
        return None
    return type(value)(v * new // old for v in value)


def _new_list(key: str, value: Sequence[int], in_index: Any, feed: Feed) -> tuple[Any, str]:
    old = list(feed.old.channels)
    if list(value) == list(feed.old.strides) and 'stride' in key and feed.old.strides != feed.new.strides:
        return type(value)(feed.new.strides), 'strides of the new maps'
    if not ('in_' in key or 'dims' in key or 'channels' in key):
        return None, ''
    positions = _positions_of_list(list(value), old, in_index)
    if positions is not None:
        return type(value)(feed.widths_at(positions)), 'widths of the new maps'
    return None, ''


def _positions_of_list(value: list[int], old: list[int | None], in_index: Any) -> list[int] | None:
    """Return which old maps a list of widths is about."""
    everything = list(range(len(old)))
    if _is_list_of(in_index, int) and len(in_index) == len(value):
        chosen = [i if i >= 0 else i + len(old) for i in in_index]
        if all(0 <= i < len(old) and old[i] in (v, None) for i, v in zip(chosen, value, strict=True)):
            return chosen
    ends = (everything[-len(value) :], everything[: len(value)])
    for candidate in (*ends, *(end[::-1] for end in ends)):
        if len(candidate) == len(value) and [old[i] for i in candidate] == value:
            return candidate
    return None


def _position_of(node: dict[str, Any], key: str, value: int, in_index: Any, feed: Feed) -> int | None:
    """Return which old map a single width is about, None where it is about none."""
    old = feed.old.channels
    if _is_of_rois(node, key):
        return len(old) - 1 if old[-1] == value else None
    if key not in _SINGLE_KEYS and not key.endswith('_in_channels'):
        return None
    if key in _SINGLE_KEYS and isinstance(in_index, int):
        index = in_index if in_index >= 0 else in_index + len(old)
        return index if 0 <= index < len(old) and old[index] in (value, None) else None
    if key in _SINGLE_KEYS:
        return len(old) - 1 if old[-1] == value else None
    return next((i for i, width in enumerate(old) if width == value), None)


def _is_of_rois(node: dict[str, Any], key: str) -> bool:
    """Tell whether a value is the width of maps that RoIs are cut out of, which come out as wide."""
    return key == 'out_channels' and str(node.get('type')).endswith('RoIExtractor')


def _shift_levels(draft: Draft, path: Path, feed: Feed) -> None:
    """Count ``start_level`` and ``end_level`` of a neck from the first map that is still there."""
    node = draft.get(path)
    dropped = [i for i in range(len(feed.old)) if i not in feed.kept]
    if not dropped or 'start_level' not in node:
        return
    for key in ('start_level', 'end_level'):
        level = node.get(key)
        if isinstance(level, int) and level > 0:
            below = sum(i < level for i in dropped)
            draft.put((*path, key), level - below, 'counted without the maps that it did not read')


def _is_list_of(value: Any, kinds: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(isinstance(v, kinds) and not isinstance(v, bool) for v in value)
    )


def consumers(holder: dict[str, Any]) -> Iterator[str]:
    """Yield the keys of a model's parts that may read its backbone's or neck's maps, the neck excluded."""
    skipped = (
        'backbone',
        'neck',
        'data_preprocessor',
        'train_cfg',
        'test_cfg',
        'init_cfg',
        'language_model',
        'tracker',
        'reid',
        'motion',
    )
    for key, value in holder.items():
        if key in skipped or key.startswith('teacher'):
            continue
        if isinstance(value, dict) or _is_list_of(value, dict):
            yield key
