"""One swap under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mila_mm.swap.probe import Probe
from mila_mm.swap.result import Path
from mila_mm.swap.source import Source


@dataclass(frozen=True)
class Job:
    """What a swap starts from.

    Attributes:
        source: The config and where its backbone is.
        original: The config as plain dicts.
        probe: What the old backbone gives.
        stages: Stage of MILA for each old map.
        backbone: Config of the new backbone, with all of these stages.
        notes: What the user should know of its arguments.
        whole_models: Whether to try whole models also where no head can tell the difference.
    """

    source: Source
    original: dict[str, Any]
    probe: Probe
    stages: tuple[int, ...]
    backbone: dict[str, Any]
    notes: tuple[str, ...]
    whole_models: bool

    @property
    def model(self) -> dict[str, Any]:
        """Config of the original model that has the backbone."""
        return value_at(self.original, self.source.holder)


def value_at(node: Any, path: Path) -> Any:
    """Return the value at a path that exists."""
    for step in path:
        node = node[step]
    return node


def plain(node: Any) -> Any:
    """Copy a config into plain dicts; other values are shared, since a config may hold modules."""
    if isinstance(node, dict):
        return {k: plain(v) for k, v in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(plain(v) for v in node)
    return node
