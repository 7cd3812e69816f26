"""Holds the built reference against the package: ``python tools/docs/check_reference.py docs/_build/html``.

Every name in ``__all__`` of the public packages must be in the site's ``objects.inv``, and its entry must show the
arguments that its definition has. They are read in the source, not by way of Sphinx.
"""

import ast
import inspect
import posixpath
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import pages  # noqa: E402


def public() -> dict[str, Any]:
    """Return full name -> value of everything public, packages apart."""
    names = {f'{package}.{name}': (package, name) for package in pages.PACKAGES for name in all_of(package)}
    values = {full: getattr(import_module(package), name) for full, (package, name) in names.items()}
    return {full: value for full, value in values.items() if not inspect.ismodule(value)}


def all_of(package: str) -> list[str]:
    """Return ``__all__`` of a package."""
    return list(import_module(package).__all__)


def arguments(value: Any) -> list[str] | None:
    """Read the names of a function's or a class's arguments in its source.

    Returns:
        The names without ``self``; None for what takes none of its own: a constant, an exception or a class without
        ``__init__`` in its source (dataclasses, children that take what their parents take).
    """
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return None
    path = sys.modules[value.__module__].__file__
    assert path, value
    tree = ast.parse(Path(path).read_text(encoding='utf-8'))
    node = next(node for node in tree.body if getattr(node, 'name', None) == value.__name__)
    if isinstance(node, ast.ClassDef):
        inits = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == '__init__']
        if not inits:
            return None
        node = inits[0]
    assert isinstance(node, ast.FunctionDef), node
    given = node.args
    several = [each for each in (given.vararg, given.kwarg) if each]
    names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs, *several)]
    return sorted(name for name in names if name != 'self')


def shown(site: Path) -> dict[str, list[str]]:
    """Return full name -> sorted names of the arguments that the site's pages show."""
    from bs4 import BeautifulSoup

    found = {}
    for page in sorted((site / '_generated' / 'reference').glob('*.html')):
        soup = BeautifulSoup(page.read_text(encoding='utf-8'), 'html.parser')
        for entry in soup.select('dt.sig[id]'):
            parameters = [each.select_one('.n') for each in entry.select('.sig-param')]
            found[str(entry['id'])] = sorted(each.get_text() for each in parameters if each)
    return found


def inventory(site: Path) -> set[str]:
    """Return the Python names of the site's ``objects.inv``."""
    from sphinx.util.inventory import InventoryFile

    with (site / 'objects.inv').open('rb') as file:
        kinds = InventoryFile.load(file, '', posixpath.join)
    return {name for kind, names in kinds.items() if kind.startswith('py:') for name in names}


def problems(names: dict[str, Any], listed: set[str], entries: dict[str, list[str]]) -> list[str]:
    """Compare what is public with what the site shows.

    Args:
        names: Full name -> value of everything public.
        listed: The names in the inventory.
        entries: Full name -> sorted arguments on the pages.

    Returns:
        A line for each name that is missing or shows other arguments.
    """
    found = [f'{name}: not in objects.inv' for name in names if name not in listed]
    for name, value in names.items():
        expected, got = arguments(value), entries.get(name)
        if name in listed and (got is None or (expected is not None and got != expected)):
            found.append(f'{name}: expected the arguments {expected}, the reference shows {got}')
    return found


def main() -> None:
    """Check a built site; exit with 1 and the differences where there are some."""
    import stand_ins

    site = Path(sys.argv[1])
    stand_ins.complete()
    with stand_ins.mock(stand_ins.LIBRARIES):
        names = public()
        found = problems(names, inventory(site), shown(site))
    if found:
        sys.exit('\n'.join(found))
    print(f'{site}: {len(names)} public names, all in the reference with their arguments')


if __name__ == '__main__':
    main()
