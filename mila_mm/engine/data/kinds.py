"""What the classes behind types in a config say by themselves: imported ones, or their source before anything is."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

from mmengine import registry as root_registries

from mila_mm.engine.config.signatures import (
    arguments_of,
    attribute_in_source,
    default_in_source,
    keeps_methods,
    names_in_source,
)
from mila_mm.engine.config.sources import SourceClass, registered

Kind = type | SourceClass

# Where libraries keep what they register, by registry: in a library, and in what all of them build on.
_FOLDERS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    'TRANSFORMS': ('datasets', (('mmcv', 'transforms'),)),
    'DATASETS': ('datasets', (('mmengine', 'dataset'),)),
    'DATA_SAMPLERS': ('datasets', (('mmengine', 'dataset'),)),
    'METRICS': ('evaluation', (('mmengine', 'evaluator'),)),
    'HOOKS': ('engine', (('mmengine', 'hooks'),)),
    'LOOPS': ('engine', (('mmengine', 'runner'),)),
    'OPTIM_WRAPPERS': ('engine', (('mmengine', 'optim'),)),
    'PARAM_SCHEDULERS': ('engine', (('mmengine', 'optim'),)),
    'VISUALIZERS': ('visualization', (('mmengine', 'visualization'),)),
    'VISBACKENDS': ('visualization', (('mmengine', 'visualization'),)),
    'MODELS': ('models', (('mmengine', 'model'), ('mmcv', 'cnn'), ('mmcv', 'ops'))),
}
_SCOPES = ('mmdet', 'mmseg', 'mmpretrain', 'mila_mm')
LIBRARIES = (*_SCOPES, 'mmcv', 'mmengine')


def places(registry: str, scope: str) -> list[tuple[str, str]]:
    """Return packages and folders in which a scope looks for what is in a registry, its own first."""
    folder, roots = _FOLDERS[registry]
    return [(scope, folder), *([(scope, 'engine')] if scope == 'mila_mm' else []), *roots]


def find_kind(registry: str, config: dict[str, Any], scope: str) -> SourceClass | None:
    """Find the source of the class that a part is built from, None where it is not certain which.

    Args:
        registry: What mmengine calls the registry: 'TRANSFORMS'.
        config: Config of the part.
        scope: 'mmdet', 'mmseg' or 'mmpretrain'.
    """
    name = config.get('type')
    if not isinstance(name, str) or config.get('_scope_', scope) != scope:
        return None
    own, _, name = name.rpartition('.')
    scope = own or scope
    if scope not in _SCOPES:
        return None
    found = next(filter(None, (registered(*place, registry, name) for place in places(registry, scope))), None)
    kinds = registered_now(registry, scope, name)
    return found if all(kind.__module__.partition('.')[0] in LIBRARIES for kind in kinds) else None


def registered_now(registry: str, scope: str, name: str) -> list[Any]:
    """Return what has been registered under a name so far, perhaps by what the config has imported."""
    modules = [root_registries, sys.modules.get(f'{scope}.registry')]
    known = [getattr(module, registry, None) for module in modules]
    return [each.module_dict[name] for each in known if each is not None and name in each.module_dict]


def default_of(kind: Kind | None, name: str) -> Any:
    """Return the default of an argument, also of one that a constructor hands up by ``**kwargs``."""
    if isinstance(kind, SourceClass):
        return default_in_source(kind, name)
    for base in inspect.getmro(kind) if kind is not None else ():
        constructor = vars(base).get('__init__')
        if constructor is None:
            continue
        parameters = inspect.signature(constructor).parameters
        if name in parameters:
            return parameters[name].default
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return None
    return None


def takes_of(kind: Kind | None) -> set[str]:
    """Return the names of all arguments in the constructors of a class and those above it."""
    if isinstance(kind, SourceClass):
        return arguments_of(kind) or set()
    names: set[str] = set()
    for base in inspect.getmro(kind) if kind is not None else ():
        if '__init__' in vars(base):
            names |= set(inspect.signature(vars(base)['__init__']).parameters)
    return names


def names_of(kind: Kind | None) -> list[str]:
    """Return the names of a class and of those above it."""
    if isinstance(kind, SourceClass):
        return names_in_source(kind)
    return [each.__name__ for each in getattr(kind, '__mro__', ())]


def attribute_of(kind: Kind | None, name: str) -> Any:
    """Return what a class has under a name, None for nothing."""
    return attribute_in_source(kind, name) if isinstance(kind, SourceClass) else getattr(kind, name, None)


def keeps(kind: Kind | None, library: str, base: str, methods: Sequence[str]) -> bool:
    """Tell whether a class builds on a data set of a library and has its methods as they are there."""
    if isinstance(kind, SourceClass):
        return keeps_methods(kind, base, methods)
    origin = getattr(sys.modules.get(f'{library}.datasets'), base, None) if kind is not None else None
    if origin is None or kind is None or not issubclass(kind, origin):
        return False
    return all(inspect.getattr_static(kind, name) is inspect.getattr_static(origin, name) for name in methods)
