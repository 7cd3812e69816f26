"""Weights: published files by name, fetched once, read safely, loaded completely or not at all.

Names are imported on first use: fetching needs no torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    'cache': ('configure', 'settings', 'cache_dir'),
    'errors': ('CheckpointError', 'DownloadError', 'MismatchError', 'MissingCheckpointError', 'UnsafeCheckpointError'),
    'exporting': ('export',),
    'fetching': ('fetch', 'local_path'),
    'load': ('load_backbone', 'load_model', 'read_checkpoint'),
    'loaders': ('register_loaders',),
    'names': ('to_project', 'to_released'),
    'pretrained': ('init_pretrained',),
    'published': ('PUBLISHED', 'PublishedFile'),
    'random_state': ('capture_random_state', 'restore_random_state'),
    'report': ('LoadReport',),
    'reader': ('read_file',),
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
