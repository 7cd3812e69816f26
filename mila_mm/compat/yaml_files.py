"""YAML files, read as data.

mmengine reads ``.yaml`` and ``.yml``, configs among them, with PyYAML's ``CLoader``, which calls whatever a tag such
as ``!!python/object/apply`` names. A config in Python is a program, and whoever runs it knows; one in YAML looks like
data. :func:`install` has mmengine read plain values and, since mmengine's own dump writes them, tuples.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from mila_mm.compat.import_hook import when_imported


def _read_data_only(module: ModuleType) -> None:
    """Give mmengine's handler a loader that makes data and calls nothing."""
    yaml = module.yaml

    class DataLoader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):  # type: ignore[misc]
        """Safe, and knows Python's tuples."""

    def construct_tuple(loader: Any, node: Any) -> tuple:
        return tuple(loader.construct_sequence(node))

    DataLoader.add_constructor('tag:yaml.org,2002:python/tuple', construct_tuple)
    module.Loader = DataLoader


def install() -> None:
    """Patch mmengine as soon as it is imported."""
    when_imported('mmengine.fileio.handlers.yaml_handler', _read_data_only)
