"""Names of this package's configs in mmengine's functions, and inferencers that run no config out of a checkpoint.

``_base_ = 'mila_mm::mask_rcnn_mila_t_3x.py'``, ``mmengine.hub.get_config('mila_mm::mask_rcnn_mila_t_3x')`` and
``DetInferencer('mask_rcnn_mila_t_3x')`` find what :mod:`mila_mm.zoo` finds. A base of another package is found without
reading that package's metafiles.
"""

import functools
import os
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from mila_mm import zoo
from mila_mm.compat.import_hook import when_imported
from mila_mm.errors import UserError

TRUST_CONFIGS = 'MILA_MM_TRUST_CONFIGS'


def resolve_bases(module: ModuleType) -> None:
    """Let ``_base_`` of a config name this package's configs; ``module`` is ``mmengine.config.config``."""
    original = module.Config._get_cfg_path

    @functools.wraps(original)
    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        # No scope: the types in our configs name theirs.
        if cfg_path.startswith(zoo.SCHEME):
            return str(zoo.require_config(cfg_path)), None
        scope, sign, inner = cfg_path.partition('::')
        shipped = _shipped_config(scope, inner) if sign else None
        if shipped is not None:
            return str(shipped), scope
        found: tuple[str, str | None] = original(cfg_path, filename)
        return found

    module.Config._get_cfg_path = staticmethod(get_cfg_path)


def _shipped_config(package: str, name: str) -> Path | None:
    """Find a config that lies where the packages of OpenMMLab put theirs, None where it does not.

    mmengine reads all of a package's metafiles for each base, a second's work, and finds the same file.
    """
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / '.mim' / 'configs' / name
    return path if path.is_file() else None


def resolve_names(module: ModuleType) -> None:
    """Let ``get_config`` of ``mmengine.hub`` and ``mmengine.hub.hub`` take names of this package."""
    original = module.get_config

    @functools.wraps(original)
    def get_config(cfg_path: str, pretrained: bool = False) -> Any:
        if not cfg_path.startswith(zoo.SCHEME):
            return original(cfg_path, pretrained)
        from mmengine.config import Config

        path = zoo.require_config(cfg_path)
        cfg = Config.fromfile(path)
        if pretrained:
            cfg.model_path = _weights_of(path.stem)
            if cfg.model_path is None:
                raise UserError(f'{cfg_path}: no weights are published for this config')
        return cfg

    module.get_config = get_config


def _weights_of(name: str) -> str | None:
    """Return the address of the weights that the model index names for a config, None where it names none."""
    from mmengine.infer.infer import BaseInferencer

    for model in BaseInferencer._get_models_from_metafile(str(zoo.ROOT)):
        if model['Name'].lower() == name:
            return model.get('Weights')
    return None


def mend_inferencers(module: ModuleType) -> None:
    """Let inferencers take names of this package, and not run configs; ``module`` is ``mmengine.infer.infer``."""
    base = module.BaseInferencer
    by_name, init_model = base._load_model_from_metafile, base._init_model

    @functools.wraps(by_name)
    def load_model_from_metafile(self: Any, model: str) -> tuple[Any, str | None]:
        path = zoo.find_config(model.lower())  # mmengine asks for no case either
        if path is None and not model.startswith(zoo.SCHEME):
            found: tuple[Any, str | None] = by_name(self, model)
            return found
        path = path or zoo.require_config(model.lower())
        return module.Config.fromfile(path), _weights_of(path.stem)

    @functools.wraps(init_model)
    def init_model_from_a_config(self: Any, cfg: Any, weights: str | None, device: str = 'cpu') -> Any:
        # A config is a program, and its types name any function: even one that is only data can call what it likes.
        if not cfg and not os.environ.get(TRUST_CONFIGS):
            raise UserError(
                f'{weights}: an inferencer without a model would run the config in this file, which can hold any code; '
                f'give it the config too, model=CONFIG, or set {TRUST_CONFIGS}=1 if the file is your own'
            )
        return init_model(self, cfg, weights, device)

    base._load_model_from_metafile = load_model_from_metafile
    base._init_model = init_model_from_a_config


def install() -> None:
    """Patch mmengine as soon as it is imported."""
    when_imported('mmengine.config.config', resolve_bases)
    when_imported('mmengine.hub.hub', resolve_names)
    when_imported('mmengine.hub', resolve_names)
    when_imported('mmengine.infer.infer', mend_inferencers)
