"""What a swap is made of: maps, changes, and what could not be known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mmengine.config import Config

from mila_mm.errors import UserError

Path = tuple[str | int, ...]


class SwapRefused(UserError):
    """A swap that cannot work; the message is the reason."""


class SwapFailed(UserError):
    """A swap that may be possible, but that could not be made or checked; the message says what went wrong."""


@dataclass(frozen=True)
class Maps:
    """Feature maps as one part of a model hands them to the next.

    Attributes:
        channels: Width of each map; None where nothing tells.
        strides: Pixels of the image per cell of each map.
    """

    channels: tuple[int | None, ...]
    strides: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.channels)

    def __str__(self) -> str:
        pairs = zip(self.channels, self.strides, strict=True)
        return ', '.join(f'{"?" if channels is None else channels} at 1/{stride}' for channels, stride in pairs)


@dataclass(frozen=True)
class Change:
    """One entry of the config that the swap has changed.

    Attributes:
        path: Keys and indices from the top of the config.
        old: Value before; :data:`ABSENT` where there was none.
        new: Value after.
        why: The reason, a few words.
    """

    path: Path
    old: Any
    new: Any
    why: str

    @property
    def key(self) -> str:
        """The path as ``--cfg-options`` writes it."""
        return '.'.join(map(str, self.path))


class _Absent:
    def __repr__(self) -> str:
        return '(not there)'


ABSENT = _Absent()


@dataclass
class SwapResult:
    """A config with MILA in it, and how it came about.

    Attributes:
        config: The whole config.
        base: Name of the original config as it was given, None for a config in memory.
        original: The original config as plain dicts.
        changes: What was changed, in order.
        unknowns: What the swap could not know or check, a sentence each.
        old_maps: What the old backbone gave.
        new_maps: What MILA gives.
        checked: What of the new model was built and run, a sentence.
        title: One line that says what the config is.
    """

    config: Config
    base: str | None
    original: dict[str, Any]
    changes: list[Change]
    unknowns: list[str]
    old_maps: Maps
    new_maps: Maps
    checked: str
    title: str


@dataclass
class Draft:
    """A config under change: plain dicts, with a record of every change.

    Attributes:
        config: The config; only :meth:`put` changes it.
        changes: What was changed, in order.
        unknowns: What could not be known.
    """

    config: dict[str, Any]
    changes: list[Change] = field(default_factory=list)
    unknowns: list[str] = field(default_factory=list)

    def get(self, path: Path, default: Any = None) -> Any:
        """Return the value at a path, or the default where there is none."""
        node: Any = self.config
        for step in path:
            try:
                node = node[step]
            except (KeyError, IndexError, TypeError):
                return default
        return node

    def put(self, path: Path, value: Any, why: str) -> None:
        """Set the value at a path, whose parent exists, and record it; no record where nothing changes."""
        old = self.get(path, ABSENT)
        if old is not ABSENT and type(old) is type(value) and old == value:
            return
        parent = self.get(path[:-1])
        parent[path[-1]] = value
        self.changes.append(Change(path, old, value, why))

    def merged(self) -> list[Change]:
        """Return the changes, several of one entry as one."""
        changes: dict[Path, Change] = {}
        for change in self.changes:
            first = changes.pop(change.path, change)
            if first.old is ABSENT or first.old != change.new:
                changes[change.path] = Change(change.path, first.old, change.new, change.why)
        return list(changes.values())
