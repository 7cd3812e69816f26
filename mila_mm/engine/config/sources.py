"""Classes of installed packages, and what their constructors take, read from the source: nothing is imported for it."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Decorators that leave a class, and what its constructor takes, as they are.
_HARMLESS = frozenset({'register_module', 'avoid_cache_randomness'})
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


def arguments_of(kind: SourceClass, given: Collection[str] = ()) -> set[str] | None:
    """Return the names that a constructor takes, those that it hands up by ``**kwargs`` included.

    Args:
        kind: The class.
        given: Names after which no more are looked for, once all of them are found. Defaults to none: to the end.

    Returns:
        The names, None where the source does not say it for certain: a base that is not found, ``**kwargs`` that are
        used for something else, a decorated constructor, a metaclass.
    """
    names: set[str] = set()
    for each in _order(kind):
        if each is None or not _is_plain(each.node):
            return None
        constructors = [n for n in each.node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__']
        if not constructors:
            continue
        (constructor, *others) = constructors
        if others or constructor.decorator_list:
            return None
        takes = constructor.args
        names |= {argument.arg for argument in (*takes.args[1:], *takes.kwonlyargs)}
        if takes.kwarg is None or (given and names.issuperset(given)):
            return names
        if not _hands_up(constructor, takes.kwarg.arg, each.name):
            return None
    return names


def default_in_source(kind: SourceClass, name: str) -> Any:
    """Return the default of an argument, also of one that is handed up; None where none is written out."""
    for each in _order(kind):
        constructor = _method(each, '__init__')
        if each is None or constructor is None:
            continue
        takes = constructor.args
        late = takes.args[len(takes.args) - len(takes.defaults) :]
        defaults = {argument.arg: value for argument, value in zip(late, takes.defaults, strict=True)}
        defaults |= {a.arg: value for a, value in zip(takes.kwonlyargs, takes.kw_defaults, strict=True) if value}
        if name in defaults:
            return literal(defaults[name])
        known = {argument.arg for argument in (*takes.args, *takes.kwonlyargs)} | _handed(constructor, each.name)
        if name in known or takes.kwarg is None or not _hands_up(constructor, takes.kwarg.arg, each.name):
            return None
    return None


def attribute_in_source(kind: SourceClass, name: str) -> Any:
    """Return what a class, or the next one above it, assigns to a name; None where that is not written out."""
    for each in _order(kind):
        for node in each.node.body if each is not None else ():
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return literal(getattr(node, 'value', None))
    return None


def names_in_source(kind: SourceClass) -> list[str]:
    """Return the names of a class and of those above it, as far as they are known."""
    return [each.name for each in _order(kind) if each is not None]


def keeps_methods(kind: SourceClass, base: str, methods: Sequence[str]) -> bool:
    """Tell whether a class builds on a base and has its methods as they are there."""
    for each in _order(kind):
        if each is None or each.name == base:
            return each is not None
        if any(_method(each, name) is not None for name in methods):
            return False
    return False


def literal(node: ast.AST | None) -> Any:
    """Return a value that is written out in a source, calls of ``dict`` with names too; None for any other."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and not node.args:
        return {str(keyword.arg): literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        return {literal(key): literal(value) for key, value in zip(node.keys, node.values, strict=True)}
    try:
        return ast.literal_eval(node)  # type: ignore[arg-type]
    except (ValueError, TypeError, SyntaxError):
        return None


def _method(kind: SourceClass | None, name: str) -> ast.FunctionDef | None:
    body = kind.node.body if kind is not None else []
    return next((n for n in body if isinstance(n, ast.FunctionDef) and n.name == name), None)


def _handed(constructor: ast.FunctionDef, owner: str) -> set[str]:
    """Return the arguments that a constructor gives by name to the one above it."""
    calls = [n for n in ast.walk(constructor) if isinstance(n, ast.Call) and _is_super_init(n, owner)]
    return {keyword.arg for call in calls for keyword in call.keywords if keyword.arg is not None}


def _is_plain(node: ast.ClassDef) -> bool:
    """Tell whether a class is made by calling its ``__init__`` with what it is called with."""
    decorated = {_last_name(decorator) for decorator in node.decorator_list} - _HARMLESS
    metaclass = {_last_name(keyword.value) for keyword in node.keywords} - {'ABCMeta'}
    makes = any(isinstance(n, ast.FunctionDef) and n.name == '__new__' for n in node.body)
    # What is not a plain statement may define a constructor in one case and not in another.
    cases = any(isinstance(n, (ast.If, ast.Try, ast.With, ast.For)) for n in node.body)
    return not (decorated or metaclass or makes or cases)


def _last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, 'id', '?')


def _hands_up(constructor: ast.FunctionDef, kwargs: str, owner: str) -> bool:
    """Tell whether a constructor gives its ``**kwargs`` to the next one above it, once, and to nothing else."""
    uses = [n for n in ast.walk(constructor) if isinstance(n, ast.Name) and n.id == kwargs]
    handed = [
        keyword.value
        for call in ast.walk(constructor)
        if isinstance(call, ast.Call) and _is_super_init(call, owner)
        for keyword in call.keywords
        if keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == kwargs
    ]
    return len(uses) == len(handed) == 1


def _is_super_init(call: ast.Call, owner: str) -> bool:
    function = call.func
    if (
        not isinstance(function, ast.Attribute)
        or function.attr != '__init__'
        or not isinstance(function.value, ast.Call)
    ):
        return False
    above = function.value
    named = not above.args or (isinstance(above.args[0], ast.Name) and above.args[0].id == owner)
    return isinstance(above.func, ast.Name) and above.func.id == 'super' and named


def _order(kind: SourceClass) -> Iterator[SourceClass | None]:
    """Yield a class and those above it in the order in which Python asks them, None once that is not known."""
    yield kind
    nodes = [base for base in kind.node.bases if not (isinstance(base, ast.Name) and base.id == 'object')]
    bases = [find_class(kind.module, base.id) if isinstance(base, ast.Name) else None for base in nodes]
    if len(bases) == 1 and bases[0] is not None:
        yield from _order(bases[0])
    elif bases:
        orders = [[*_order(base)] if base is not None else [None] for base in bases]
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
