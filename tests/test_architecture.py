"""The imports of the package are those that ARCHITECTURE.md allows, and go in no circle."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'mila_mm'
GROUND = ('arch', 'errors', 'files', 'marker', 'registry', 'stopping', 'version', 'zoo')


def module_name(path: Path) -> str:
    """Return the dotted name of a file of the package."""
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob('*.py'))}


def subpackage(module: str) -> str:
    """Return the row of the table that a module of the package stands in."""
    parts = module.split('.')
    if len(parts) == 1 or parts[1] == '__main__':
        return '(root)'
    return 'ground' if parts[1] in GROUND else parts[1]


def named(cell: str) -> set[str]:
    return {name.strip(' `') for name in cell.split(',')} - {''}


def table() -> dict[str, tuple[set[str], set[str]]]:
    """Read subpackage -> (others, libraries) from ARCHITECTURE.md."""
    lines = (ROOT / 'ARCHITECTURE.md').read_text(encoding='utf-8').split('\n')
    start = lines.index('| subpackage | may import | libraries |') + 2
    rows = [line.strip('|').split('|') for line in lines[start:] if line.startswith('|')]
    return {name.strip(' `'): (named(allowed), named(libraries)) for name, allowed, libraries in rows}


TABLE = table()


def targets(node: ast.AST) -> list[str]:
    """Return the modules that a statement or a call of ``import_module`` names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, 'imports are absolute'
        below = [f'{node.module}.{alias.name}' for alias in node.names]
        return [name for name in below if name in MODULES] or [node.module]
    if isinstance(node, ast.Call) and getattr(node.func, 'attr', getattr(node.func, 'id', '')) == 'import_module':
        name = node.args[0]
        return [name.value] if isinstance(name, ast.Constant) else []
    return []


def imports(path: Path) -> Iterator[str]:
    """Yield what a file imports, inside of functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        yield from targets(node)


@pytest.mark.parametrize('name', sorted({subpackage(module) for module in MODULES}))
def test_a_subpackage_imports_what_the_table_allows(name: str) -> None:
    others, libraries = TABLE[name]
    for module, path in MODULES.items():
        if subpackage(module) != name:
            continue
        for target in imports(path):
            top = target.partition('.')[0]
            if top == 'mila_mm':
                allowed = 'everything' in others or subpackage(target) in others | {name}
                assert allowed, f'{module} imports {target}, but {name} may import {sorted(others)}'
            elif top not in sys.stdlib_module_names:
                allowed = 'everything' in libraries or top in libraries
                assert allowed, f'{module} imports {top}, but {name} may import {sorted(libraries)}'


def test_the_table_has_no_arrow_up() -> None:
    below: set[str] = set()
    for name, (others, _) in reversed(list(TABLE.items())):
        assert others <= below | {'everything'}, f'{name} may import {sorted(others - below)}, which stand above it'
        below.add(name)


def test_only_the_registry_of_the_ground_imports_a_library() -> None:
    foreign = {
        module
        for module, path in MODULES.items()
        if subpackage(module) == 'ground'
        for target in imports(path)
        if target.partition('.')[0] not in sys.stdlib_module_names | {'mila_mm'}
    }
    assert foreign == {'mila_mm.registry'}


def test_nothing_imports_in_a_circle() -> None:
    graph = {
        module: {target for target in imports(path) if target in MODULES and target != module} - {'mila_mm'}
        for module, path in MODULES.items()
        if module != 'mila_mm'
    }
    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> None:
        assert module not in trail, ' -> '.join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                walk(target, [*trail, module])
            done.add(module)

    for module in graph:
        walk(module, [])


def test_imports_are_looked_for_inside_functions_and_calls(tmp_path: Path) -> None:
    path = tmp_path / 'a.py'
    path.write_text("def f():\n  from mila_mm.swap import api\n  import_module('mila_mm.study')\nimport numpy.linalg\n")
    assert sorted(imports(path)) == ['mila_mm.study', 'mila_mm.swap.api', 'numpy.linalg']


MAX_FILE, MAX_FUNCTION = 350, 60
# what mmcv's Python asks for, name by name
TABLES = {'mila_mm/compat/mmcv_ext/table.py'}


def is_kernel(function: ast.FunctionDef) -> bool:
    return any('triton.jit' in ast.unparse(decorator) for decorator in function.decorator_list)


def function_lines(function: ast.FunctionDef) -> int:
    """Return its lines, the docstring apart."""
    docstring = function.body[0] if ast.get_docstring(function, clean=False) is not None else None
    described = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    return function.end_lineno - function.lineno + 1 - described


def test_files_and_functions_stay_readable() -> None:
    too_long = []
    for path in MODULES.values():
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding='utf-8')
        lines = len(text.splitlines())
        if lines > MAX_FILE and name not in TABLES:
            too_long.append(f'{name}: {lines} lines, expected at most {MAX_FILE}')
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and not is_kernel(node):
                lines = function_lines(node)
                if lines > MAX_FUNCTION:
                    too_long.append(f'{name}: {node.name} has {lines} lines, expected at most {MAX_FUNCTION}')
    assert not too_long, '\n'.join(too_long)


def test_the_lines_of_a_function_are_counted_without_its_docstring() -> None:
    source = '@triton.jit(a=1)\ndef f(\n    a,\n):\n    """One.\n\n    Two.\n    """\n    return a\n'
    function = ast.parse(source).body[0]
    assert function_lines(function) == 4 and is_kernel(function)
