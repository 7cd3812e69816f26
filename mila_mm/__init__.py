"""MILA backbones (Demystify Mamba in Vision: A Linear Attention Perspective) for MMDetection and MMSegmentation.

Importing the package is quick and imports neither torch nor mmengine. It does six things: it
stands in for ``mmcv._ext`` where mmcv has no compiled ops, it lets ``mmseg::`` and ``mmpretrain::``
configs resolve whichever distribution is installed, and ``mila_mm::`` ones as well, it has every
reader of checkpoints in mmengine, mmdet, mmseg and mmpretrain read them without running code, of
pickled predictions and of YAML as well, it tells timm the names of the classifiers, and it has readers of
COCO's files compute an absent area or iscrowd.
"""

from importlib import import_module
from types import ModuleType
from typing import Any

from mila_mm.compat import coco_fields, finder, lineage, model_zoo, pickles, yaml_files
from mila_mm.compat.import_hook import when_imported
from mila_mm.version import __version__

__all__ = [
    'MILA',
    'LinearAttentionTransformer',
    'MESAHook',
    'MILAClassifier',
    'Predictor',
    '__version__',
    'models',
    'ops',
    'swap_backbone',
]

_HOMES = {
    'MILA': 'mila_mm.models',
    'LinearAttentionTransformer': 'mila_mm.study.model.backbone',
    'MESAHook': 'mila_mm.engine',
    'MILAClassifier': 'mila_mm.nn.classifier',
    'Predictor': 'mila_mm.engine',
    'swap_backbone': 'mila_mm.swap',
}


def _register_classifiers(_: ModuleType) -> None:
    """Let timm know ``mila_tiny`` and its like."""
    import_module('mila_mm.nn.timm')


def _read_checkpoints_safely(_: ModuleType) -> None:
    """Have mmengine read checkpoints, ``mila://`` names too, without running code in them."""
    import_module('mila_mm.weights.loaders').register_loaders()


def _fetch_checkpoints_safely(module: ModuleType) -> None:
    """Replace the function with which mmengine reads a checkpoint from an address."""

    def load_url(*args: Any, **kwargs: Any) -> Any:
        return import_module('mila_mm.weights.loaders').load_url(*args, **kwargs)

    module.load_url = load_url  # type: ignore[attr-defined]


finder.install()
lineage.install()
model_zoo.install()
pickles.install()
yaml_files.install()
coco_fields.install()
when_imported('mmengine.utils.dl_utils', _fetch_checkpoints_safely)
when_imported('mmengine.runner.checkpoint', _read_checkpoints_safely)
when_imported('timm.models', _register_classifiers)


def __getattr__(name: str) -> Any:
    """Import ``models``, ``ops`` and the names of ``__all__`` on first use (PEP 562)."""
    if name in ('models', 'ops'):
        return import_module(f'mila_mm.{name}')
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mila_mm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the lazy names beside the ordinary ones."""
    return sorted({*globals(), *__all__})
