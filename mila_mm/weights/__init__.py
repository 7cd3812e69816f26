"""Weights: published files by name, fetched once, read safely, loaded completely or not at all.

Names are imported on first use: fetching needs no torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    'errors': ('CheckpointError', 'DownloadError', 'MissingCheckpointError', 'UnsafeCheckpointError'),
    'exporting': ('export',),
    'file.reader': ('read_file',),
    'load': ('load_backbone', 'load_model', 'read_checkpoint'),
    'loaders': ('init_pretrained', 'register_loaders'),
    'names': ('to_project', 'to_released'),
    'report': ('LoadReport', 'MismatchError'),
    'source.cache': ('configure', 'settings', 'cache_dir'),
    'source.fetching': ('fetch', 'local_path'),
    'source.published': ('PUBLISHED', 'PublishedFile'),
}
_HOME_OF = {name: home for home, exported in _HOMES.items() for name in exported}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 - the table above is the list


def __getattr__(name: str) -> Any:
    """Import a name from its module on first use (PEP 562)."""
    if name in _HOME_OF:
        return getattr(import_module(f'mila_mm.weights.{_HOME_OF[name]}'), name)
    raise AttributeError(f"module 'mila_mm.weights' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names beside the ordinary ones."""
    return sorted({*globals(), *__all__})
