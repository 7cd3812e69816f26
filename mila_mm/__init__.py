"""MILA backbones (Demystify Mamba in Vision: A Linear Attention Perspective) for MMDetection and MMSegmentation.

Importing the package is quick and imports neither torch nor mmengine. It does three things: it
stands in for ``mmcv._ext`` where mmcv has no compiled ops, it lets ``mmseg::`` and ``mmpretrain::``
configs resolve whichever distribution is installed, and it tells timm the names of the classifiers.
"""

from importlib import import_module
from typing import Any

from mila_mm.compat import finder, lineage
from mila_mm.version import __version__

__all__ = ['MILA', 'LinearAttentionTransformer', 'MILAClassifier', '__version__', 'models', 'ops', 'swap_backbone']

finder.install()
lineage.install()


def __getattr__(name: str) -> Any:
    """Import the models, ``models``, ``ops`` and ``swap_backbone`` on first use (PEP 562)."""
    if name in ('models', 'ops'):
        return import_module(f'mila_mm.{name}')
    if name in ('MILA', 'MILAClassifier', 'LinearAttentionTransformer'):
        return getattr(import_module('mila_mm.models'), name)
    if name == 'swap_backbone':
        return import_module('mila_mm.swap').swap_backbone
    raise AttributeError(f"module 'mila_mm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names beside the ordinary ones."""
    return sorted({*globals(), *__all__})
