"""What a program needs to know of an exported file, which carries it as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mila_mm.engine.config.load import scope_of
from mila_mm.engine.inference.classes import config_meta
from mila_mm.export import outputs
from mila_mm.export.deployed import Deployed
from mila_mm.version import __version__


def metadata(
    cfg: Config, saved: dict[str, Any], deployed: Deployed, config: str, settings: dict[str, float], **asked: Any
) -> dict[str, Any]:
    """Describe a file.

    Args:
        cfg: The config.
        saved: What the checkpoint says of its data set.
        deployed: What is exported.
        config: Its path or name.
        settings: Of :func:`settings_of`.
        asked: What the user asked for and should know, under the names that it has in the metadata.
    """
    return {
        'mila_mm': __version__,
        'kind': deployed.kind,
        'config': Path(config).name,
        'inputs': [getattr(outputs, name.upper()) for name in deployed.input_names],
        'outputs': {name: outputs.DESCRIPTIONS[name] for name in deployed.output_names},
        **asked,
        'normalisation': 'inside',
        'classes': class_names(cfg, saved, deployed.classes),
        **settings,
    }


def settings_of(deployed: Deployed) -> dict[str, float]:
    """Return a detector's thresholds and its most detections, nothing of other models."""
    core = deployed.core
    if deployed.kind != 'detector':
        return {}
    candidates = getattr(core, 'candidates', core)
    return {
        'score_threshold': float(getattr(candidates, 'threshold', 0.0) or 0.0),
        'mask_threshold': float(getattr(core, 'mask_threshold', 0.5)),
        'most': float(core.most),
    }


def class_names(cfg: Config, saved: dict[str, Any], count: int) -> list[str] | None:
    """Return the names of ``count`` classes: the checkpoint's, else the config's; None where neither has as many."""
    for meta in (saved, cfg.get('metainfo') or {}, config_meta(cfg, scope_of(cfg))):
        classes: Sequence[str] | str | None = meta.get('classes')
        classes = (classes,) if isinstance(classes, str) else classes
        if classes is not None and len(classes) == count:
            return [str(x) for x in classes]
    return None
