"""What the source of a class says: the arguments of its constructor, their defaults, its attributes and methods."""

from __future__ import annotations

import ast
from collections.abc import Collection, Sequence
from typing import Any

from mila_mm.engine.config.sources import SourceClass, order_of

# Decorators that leave a class, and what its constructor takes, as they are.
_HARMLESS = frozenset({'register_module', 'avoid_cache_randomness'})


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
    for each in order_of(kind):
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


def swallows(kind: SourceClass) -> set[str] | None:
    """Return the names that a constructor takes where whatever else it is given is read by nothing, else None."""
    constructor = _method(kind, '__init__')
    if constructor is None or constructor.decorator_list or constructor.args.kwarg is None or not _is_plain(kind.node):
        return None
    kwargs = constructor.args.kwarg.arg
    read = any(isinstance(n, ast.Name) and n.id in (kwargs, 'locals', 'vars') for n in ast.walk(constructor))
    return None if read else {argument.arg for argument in (*constructor.args.args[1:], *constructor.args.kwonlyargs)}


def default_in_source(kind: SourceClass, name: str) -> Any:
    """Return the default of an argument, also of one that is handed up; None where none is written out."""
    for each in order_of(kind):
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
    for each in order_of(kind):
        for node in each.node.body if each is not None else ():
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, 'target', None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return literal(getattr(node, 'value', None))
    return None


def names_in_source(kind: SourceClass) -> list[str]:
    """Return the names of a class and of those above it, as far as they are known."""
    return [each.name for each in order_of(kind) if each is not None]


def keeps_methods(kind: SourceClass, base: str, methods: Sequence[str]) -> bool:
    """Tell whether a class builds on a base and has its methods as they are there."""
    for each in order_of(kind):
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
    makes |= any(isinstance(n, ast.Name) and n.id == '__init__' for each in node.body for n in ast.walk(each))
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
