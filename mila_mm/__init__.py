"""MILA backbones (Demystify Mamba in Vision: A Linear Attention Perspective) for MMDetection and MMSegmentation.

Importing the package is quick and imports neither torch nor mmengine. It does two things: it
stands in for ``mmcv._ext`` where mmcv has no compiled ops, and it lets ``mmseg::`` configs resolve
whichever distribution of mmseg is installed.
"""

from importlib import import_module
from typing import Any

from mila_mm.mmcv_ext import finder, lineage
from mila_mm.version import __version__

__all__ = ['MILA', '__version__', 'models', 'ops']

finder.install()
lineage.install()


def __getattr__(name: str) -> Any:
    """Import ``MILA``, ``models`` and ``ops`` on first use (PEP 562)."""
    if name in ('models', 'ops'):
        return import_module(f'mila_mm.{name}')
    if name == 'MILA':
        return import_module('mila_mm.models').MILA
    raise AttributeError(f"module 'mila_mm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names beside the ordinary ones."""
    return sorted({*globals(), *__all__})
