"""Read the config to swap in, and find its backbone."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from tempfile import TemporaryDirectory
from typing import Any

from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError
from mmengine.registry import MODELS, DefaultScope

from mila_mm.engine.config.load import load_config, one_line, resolve_config, scope_of
from mila_mm.errors import UserError
from mila_mm.swap.result import Path, SwapRefused

SCOPES = ('mmdet', 'mmseg')

# What mmengine takes for a config of a package; a folder such as gn+ws or legacy_1.x can only be reached by its path.
_NAMEABLE = re.compile(r'\w+::\w+/\w+')

# A model inside of a model that is not the one to train: its backbone stays.
_SIDE_MODELS = ('teacher', 'reid', 'motion', 'tracker', 'language_model')


@dataclass
class Source:
    """A config and where its backbone is.

    Attributes:
        config: The config as read.
        name: Its name as given, None for a config in memory.
        scope: 'mmdet' or 'mmseg'.
        holder: Path of the dict with the ``backbone``.
        others: Paths of backbones that stay.
        failed_imports: Modules of ``custom_imports`` that cannot be imported here, with the reason.
    """

    config: Config
    name: str | None
    scope: str
    holder: Path
    others: list[Path]
    failed_imports: dict[str, str] = field(default_factory=dict)


def read_source(config: str | FilePath | Config) -> Source:
    """Read a config and find its backbone.

    Args:
        config: Path, ``mmdet::...`` / ``mmseg::...``, or a config in memory.

    Raises:
        UserError: If it cannot be read.
        SwapRefused: If there is no backbone in it that could be swapped.
    """
    name = None if isinstance(config, Config) else str(config)
    if isinstance(config, Config):
        if not isinstance(config.get('model'), dict):
            raise SwapRefused('the config has no model: it is a fragment for _base_, or not a config')
        cfg = config
    else:
        _refuse_lazy(str(config))
        cfg = load_config(str(config), import_custom_modules=False)
        inherited = base_name(str(config))
        if '::' in inherited:
            cfg = _as_base(inherited)
    failed = _import_custom_modules(cfg)
    scope = _scope(cfg, name)
    holders = sorted(_holders(cfg.model, ('model',)), key=len)
    chosen = next((path for path in holders if not any(str(step).startswith(_SIDE_MODELS) for step in path)), None)
    if chosen is None:
        raise SwapRefused(_why_no_backbone(cfg.model))
    others = [(*path, 'backbone') for path in holders if path != chosen]
    others += _teachers(cfg.model, ('model',))
    return Source(cfg, name, scope, chosen, others, failed)


def base_name(name: str, folder: FilePath | None = None) -> str:
    """Return what a child writes into ``_base_`` for a config.

    Args:
        name: The config as given; one inside of an installed library becomes ``mmdet::...`` or ``mmseg::...`` where
            mmengine can read that.
        folder: Where the child will be; without it paths become absolute.
    """
    if '::' in name and _NAMEABLE.match(name):
        return name if name.endswith('.py') else f'{name}.py'
    path = resolve_config(name).resolve()
    for scope in SCOPES:
        head, found, inner = path.as_posix().partition(f'/{scope}/.mim/configs/')
        if found and head.endswith('-packages') and _NAMEABLE.match(f'{scope}::{inner}'):
            return f'{scope}::{inner}'
    if folder is None:
        return path.as_posix()
    relative = FilePath(os.path.relpath(path, folder.expanduser().resolve())).as_posix()
    return relative if relative.startswith('.') else f'./{relative}'


def _as_base(name: str) -> Config:
    """Read a library's config as a child sees it: inheriting across libraries adds ``_scope_`` to its entries."""
    with TemporaryDirectory() as folder:
        child = FilePath(folder, 'child.py')
        child.write_text(f'_base_ = {name!r}\n')
        return Config.fromfile(child, import_custom_modules=False)


def _refuse_lazy(name: str) -> None:
    path = resolve_config(name)
    try:
        lazy = path.suffix == '.py' and Config._is_lazy_import(str(path))
    except (SyntaxError, ValueError, OSError, ConfigParsingError):
        return  # reading the config says what is wrong with it
    if lazy:
        raise SwapRefused(
            f"config {name} is not in the ordinary style: it imports (mmengine's lazy style with read_base, or a "
            'script), and no child with _base_ can build on it\n'
            'Use the same config in the ordinary style (mmdet::..., mmseg::...).'
        )


def _import_custom_modules(cfg: Config) -> dict[str, str]:
    imports = (cfg.get('custom_imports') or {}).get('imports') or []
    failed = {}
    for module in [imports] if isinstance(imports, str) else imports:
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - a module of the user's: whatever it raises, it is not there
            is_plain = isinstance(error, ImportError)
            failed[module] = one_line(error) if is_plain else f'{type(error).__name__}: {one_line(error)}'
    return failed


def _scope(cfg: Config, name: str | None) -> str:
    """Return the library of a config; fragments do not say, so their place or their model's type has to."""
    if cfg.get('default_scope') not in (None, *SCOPES):
        raise SwapRefused(f'default_scope is {cfg.default_scope!r}: expected a config of {" or ".join(SCOPES)}')
    try:
        scope = scope_of(cfg)
        if scope not in SCOPES:
            raise SwapRefused(f'it is a config of {scope}: expected one of {" or ".join(SCOPES)}')
        return scope
    except SwapRefused:
        raise
    except UserError:
        prefix = (name or '').partition('::')[0]
        if prefix in SCOPES:
            return prefix
        for scope in SCOPES:
            with DefaultScope.overwrite_default_scope(scope):
                found = MODELS.get(cfg.model.type)
            if found is not None and found.__module__.startswith(scope):
                return scope
        raise


def _holders(node: Any, path: Path) -> Iterator[Path]:
    if isinstance(node, dict):
        if isinstance(node.get('backbone'), dict) and 'type' in node['backbone']:
            yield path
        for key, value in node.items():
            if key != 'backbone':
                yield from _holders(value, (*path, key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _holders(value, (*path, index))


def _teachers(model: dict[str, Any], path: Path) -> Iterator[Path]:
    for key in ('teacher_backbone', 'teacher_config'):
        if model.get(key):
            yield (*path, key)


def _why_no_backbone(model: dict[str, Any]) -> str:
    for key in ('image_encoder', 'visual', 'encoder'):
        if isinstance(model.get(key), dict):
            return (
                f'{model.get("type")} has no backbone: its {key} is a {model[key].get("type")} that is coupled '
                'with the rest of the model'
            )
    if isinstance(model.get('detector'), dict) and 'type' not in model['detector']:
        return (
            f'{model.get("type")}: model.detector has no complete backbone, a part of its config comes from elsewhere'
        )
    return f'{model.get("type")} has no backbone in its config'
