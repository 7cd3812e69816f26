"""The names of a model's classes: what training wrote down, else what the config says."""

from __future__ import annotations

from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS


def saved_meta(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says of its data set, ``classes`` and ``palette`` among it, without what is None."""
    saved = checkpoint.get('meta') or {}
    meta = saved.get('dataset_meta') or {'classes': saved.get('CLASSES'), 'palette': saved.get('PALETTE')}
    return {str(key).lower(): value for key, value in meta.items() if value is not None}


def config_meta(cfg: Config, scope: str) -> dict[str, Any]:
    """Return what a config's test set is known to be: of its ``metainfo``, else what its kind of data set comes with.

    Args:
        cfg: A loaded config.
        scope: The library of its data set, see :func:`mila_mm.engine.scope_of`.
    """
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while isinstance(dataset.get('dataset'), dict) and 'metainfo' not in dataset:
        dataset = dataset['dataset']
    kind = dataset.get('type')
    if isinstance(kind, str):
        # The root registry alone knows none of a library's.
        with DATASETS.switch_scope_and_registry(scope) as registry:
            kind = registry.get(kind)
    return {**(getattr(kind, 'METAINFO', None) or {}), **(dataset.get('metainfo') or {})}
