"""Classes of installed packages, and what their constructors take, read from the source: nothing is imported for it."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_REGISTERED = re.compile(
    r'^@(?P<registry>\w+)\.register_module\((?P<options>[^()]*)\)\s*\n(?=(?:@[^\n]*\n)*class (?P<name>\w+))',
    re.MULTILINE,
)
_NAMED = re.compile(r'name=(?P<names>\[[^\]]*\]|[^,\s]+)')
# A chain of imports that is longer than any that a person writes goes in a circle.
_LONGEST_CHAIN = 12


@dataclass(frozen=True)
class SourceClass:
    """A class as its file says it.

    Attributes:
        module: Dotted name of its module.
        name: Its name there.
    """

    module: str
    name: str

    @property
    def node(self) -> ast.ClassDef:
        """Its definition."""
        return _node(self)


@functools.cache
def _node(kind: SourceClass) -> ast.ClassDef:
    path = _path_of(kind.module)
    assert path is not None
    return next(n for n in _tree(path).body if isinstance(n, ast.ClassDef) and n.name == kind.name)


def registered(package: str, folder: str, registry: str, name: str) -> SourceClass | None:
    """Find the class that a package puts into a registry under a name.

    Args:
        package: Name of the package.
        folder: Where in it to look, with ``/``.
        registry: What the registry is called there: 'TRANSFORMS'.
        name: Type in a config, without a scope.

    Returns:
        The class, None where there is none or more than one.
    """
    found = _registered_in(package, folder).get((registry, name), ())
    return find_class(found[0].module, found[0].name) if len(found) == 1 else None


def names_registered(package: str, folder: str, registry: str) -> set[str]:
    """Return the names under which a package puts classes into a registry."""
    return {name for known, name in _registered_in(package, folder) if known == registry}


def readable(package: str) -> bool:
    """Tell whether there is source of a package to read: it may be packed, or compiled and its source left out."""
    return bool(_texts(package, ''))


def mentions(package: str, name: str) -> bool:
    """Tell whether a name stands anywhere in a package, whatever for."""
    word = re.compile(rf'\b{re.escape(name)}\b')
    return any(word.search(text) for text in _texts(package, '').values())


@functools.cache
def _texts(package: str, folder: str) -> dict[str, str]:
    """Return what the files of a folder say, by the dotted names of their modules."""
    root = _root(package)
    return {
        '.'.join((package, *path.relative_to(root).with_suffix('').parts)).removesuffix('.__init__'): path.read_text(
            encoding='utf-8', errors='replace'
        )
        for path in (sorted((root / folder).rglob('*.py')) if root is not None else ())
        if '.mim' not in path.relative_to(root).parts
    }


@functools.cache
def _registered_in(package: str, folder: str) -> dict[tuple[str, str], list[SourceClass]]:
    found: dict[tuple[str, str], list[SourceClass]] = {}
    for module, text in _texts(package, folder).items():
        for match in _REGISTERED.finditer(text) if '.register_module(' in text else ():
            for name in _names(match['options'], match['name']):
                found.setdefault((match['registry'], name), []).append(SourceClass(module, match['name']))
    return found


def _names(options: str, own: str) -> Iterator[str]:
    """Return the names that a class is registered under; one that is not written out is none that a config knows."""
    given = _NAMED.search(options)
    if given is None:
        yield from (
            [own]
            if not options.strip() or options.strip().startswith('force=')
            else re.findall(r'[\'"](\w+)[\'"]', options)
        )
    else:
        yield from re.findall(r'[\'"](\w+)[\'"]', given['names'])


def order_of(kind: SourceClass, below: tuple[SourceClass, ...] = ()) -> Iterator[SourceClass | None]:
    """Yield a class and those above it in the order in which Python asks them, None once that is not known."""
    if kind in below:  # class R(R), of another R that a star has imported
        yield None
        return
    yield kind
    below = (*below, kind)
    nodes = [base for base in kind.node.bases if not (isinstance(base, ast.Name) and base.id == 'object')]
    bases = [find_class(kind.module, base.id) if isinstance(base, ast.Name) else None for base in nodes]
    if len(bases) == 1 and bases[0] is not None:
        yield from order_of(bases[0], below)
    elif bases:
        orders = [[*order_of(base, below)] if base is not None else [None] for base in bases]
        merged = None if any(None in order for order in orders) else _merge([*orders, list(bases)])
        yield from merged if merged is not None else [None]


def _merge(orders: list[list[SourceClass | None]]) -> list[SourceClass | None] | None:
    """Merge linear orders as Python does (C3); None where it would refuse."""
    merged: list[SourceClass | None] = []
    while orders := [order for order in orders if order]:
        first = next((o[0] for o in orders if not any(o[0] in other[1:] for other in orders)), None)
        if first is None:
            return None
        merged.append(first)
        orders = [order[1:] if order[0] == first else order for order in orders]
    return merged


def find_class(module: str, name: str, chain: int = 0) -> SourceClass | None:
    """Find a class by its name in a module, through imports, None where that is not certain."""
    path = _path_of(module)
    if path is None or chain > _LONGEST_CHAIN:
        return None
    found = _bindings(path).get(name, [])
    if len(found) != 1:
        return None
    (node,) = found
    if isinstance(node, ast.ClassDef):
        return SourceClass(module, name) if node in _tree(path).body else None
    if not isinstance(node, ast.ImportFrom):
        return None
    original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
    return find_class(_absolute(module, path, node), original, chain + 1)


def _absolute(module: str, path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ''
    package = module.split('.') if path.name == '__init__.py' else module.split('.')[:-1]
    parts = package[: len(package) - node.level + 1]
    return '.'.join((*parts, *([node.module] if node.module else [])))


@functools.cache
def _bindings(path: Path) -> dict[str, list[ast.stmt]]:
    """Return what binds each name at the top of a module, in all branches, and not inside of functions and classes."""
    found: dict[str, list[ast.stmt]] = {}
    waiting: list[ast.stmt] = list(_tree(path).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.setdefault(node.name, []).append(node)
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                found.setdefault(alias.asname or alias.name.partition('.')[0], []).append(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in ast.walk(node):
                if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                    found.setdefault(target.id, []).append(node)
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.stmt):
                waiting.append(inner)
            elif isinstance(inner, ast.ExceptHandler):
                waiting.extend(inner.body)
    return found


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8', errors='replace'))


@functools.cache
def _path_of(module: str) -> Path | None:
    """Return the file of a module of a package that is installed."""
    package, _, rest = module.partition('.')
    root = _root(package)
    if root is None:
        return None
    inner = root.joinpath(*rest.split('.')) if rest else root
    for path in (inner.with_suffix('.py'), inner / '__init__.py'):
        if path.is_file():
            return path
    return None


@functools.cache
def _root(package: str) -> Path | None:
    """Return the folder of a package at the top, which is not imported for that."""
    try:
        found = find_spec(package)
    except (ImportError, ValueError):
        return None
    origin = Path(found.origin or '') if found is not None else Path()
    return origin.parent if origin.name == '__init__.py' else None
