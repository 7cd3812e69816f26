"""What the site's reference is held against, without Sphinx."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def tools() -> dict[str, object]:
    """The two modules of tools/docs that need no Sphinx to be imported."""
    sys.path.insert(0, str(ROOT / 'tools' / 'docs'))
    try:
        return {name: importlib.import_module(name) for name in ('check_reference', 'pages')}
    finally:
        sys.path.remove(str(ROOT / 'tools' / 'docs'))


def test_arguments_are_read_as_python_has_them(tools) -> None:
    names = tools['check_reference'].public()
    assert {'mila_mm.MILA', 'mila_mm.ops.mila_attention', 'mila_mm.weights.PUBLISHED'} <= names.keys()
    compared = 0
    for name, value in names.items():
        got = tools['check_reference'].arguments(value)
        if got is None:
            continue
        signature = inspect.signature(value.__init__ if inspect.isclass(value) else value)
        assert got == sorted(set(signature.parameters) - {'self'}), name
        compared += 1
    assert compared > 60


def test_everything_public_is_described_and_annotated(tools) -> None:
    for name, value in tools['check_reference'].public().items():
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        assert inspect.getdoc(value), name
        bare = tools['check_reference'].arguments(value)
        if inspect.isfunction(value):
            assert set(bare) | {'return'} == set(value.__annotations__), name


def test_a_name_or_an_argument_that_the_site_lacks_is_found(tools) -> None:
    check = tools['check_reference']
    names = {'mila_mm.zoo.nearest': importlib.import_module('mila_mm.zoo').nearest}
    shown = {'mila_mm.zoo.nearest': ['count', 'name']}
    assert check.problems(names, set(shown), shown) == []
    assert check.problems(names, set(), shown) == ['mila_mm.zoo.nearest: not in objects.inv']
    (line,) = check.problems(names, set(shown), {'mila_mm.zoo.nearest': ['name']})
    assert "['count', 'name']" in line


def test_the_reference_has_a_page_for_each_public_package(tools) -> None:
    toc = (ROOT / 'docs/_toc.yml').read_text(encoding='utf-8')
    kept = (ROOT / 'RELEASING.md').read_text(encoding='utf-8').partition('the names that')[2].partition(' export;')[0]
    for package in tools['pages'].PACKAGES:
        assert f'_generated/reference/{package}\n' in toc
        assert f'`{package}`' in (ROOT / 'docs/reference.md').read_text(encoding='utf-8')
    promised = {'mila_mm', 'mila_mm.ops', 'mila_mm.models', 'mila_mm.weights', 'mila_mm.swap', 'mila_mm.engine'}
    assert promised <= set(tools['pages'].PACKAGES)
    assert set(re.findall(r'`([\w.]+)`', kept)) == promised
    assert all(importlib.import_module(name).__all__ for name in promised)


def test_the_zoo_shows_every_model_of_the_metafile_with_its_figures(tools) -> None:
    models = yaml.safe_load((ROOT / 'configs/metafile.yml').read_text(encoding='utf-8'))['Models']
    lines = [line for line in tools['pages'].model_tables().splitlines() if '](' in line]
    rows = {line.split('](')[0].strip('| ['): line for line in lines}
    assert rows.keys() == {model['Name'] for model in models}
    for model in models:
        figures = [value for result in model.get('Results', []) for value in result['Metrics'].values()]
        assert all(f'| {value} |' in rows[model['Name']] for value in figures), model['Name']
        assert ('Weights' in model) == ('[released]' in rows[model['Name']])


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        ('[a](CONTRIBUTING.md)', '[a](contributing.md)'),
        ('[a](docs/swap.md#what-it-refuses)', '[a](../swap.md#what-it-refuses)'),
        ('![a](docs/images/demo.png)', '![a](../images/demo.png)'),
        ('[a](configs/swapped)', '[a](swapped_configs.md)'),
        ('[`a`](benchmarks/results)', '`a`'),
        ('[a](https://arxiv.org)', '[a](https://arxiv.org)'),
        ('[a](#speed)', '[a](#speed)'),
        ('[docs/swap.md](docs/swap.md)', '[](../swap.md)'),
        ('```\n[a](LICENSE)\n```', '```\n[a](LICENSE)\n```'),
    ],
)
def test_links_of_a_page_that_is_taken_in_follow_it(tools, before: str, after: str) -> None:
    pages = tools['pages']
    assert pages.relocated(before, pages.PurePosixPath('.'), pages.PurePosixPath(pages.GENERATED)) == after


def test_the_site_has_a_stand_in_for_each_library_that_modules_import() -> None:
    """Without Sphinx: a missing one ends ``make docs``, which the suite does not run."""
    text = (ROOT / 'tools/docs/stand_ins.py').read_text(encoding='utf-8')
    listed = next(
        set(ast.literal_eval(node.value))
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and node.targets[0].id == 'LIBRARIES'
    )
    imported: dict[str, Path] = {}
    for path in (ROOT / 'mila_mm').rglob('*.py'):
        if '.mim' in path.parts:
            continue
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            names = [node.module or ''] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported |= {name.partition('.')[0]: path for name in names}
    # yaml is there: MyST reads with it
    foreign = imported.keys() - sys.stdlib_module_names - {'mila_mm', 'yaml', ''}
    assert {'torch', 'PIL'} <= foreign
    assert not foreign - listed, {name: str(imported[name]) for name in foreign - listed}
