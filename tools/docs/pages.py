"""Pages of the site that are made when it is built, so that nothing in them is committed twice.

The model zoo comes from ``configs/metafile.yml``, the commands from their parsers, the reference from ``__all__`` of
the public packages, and the pages of the repository's root are taken in with their links put right.
"""

import contextlib
import inspect
import io
import os
import re
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
GENERATED = 'docs/_generated'
# Files outside docs/ that have a page of the site
TAKEN_IN = {
    'README.md': 'readme.md',
    'CHANGELOG.md': 'changelog.md',
    'ARCHITECTURE.md': 'architecture.md',
    'CONTRIBUTING.md': 'contributing.md',
    'RELEASING.md': 'releasing.md',
    'CODE_OF_CONDUCT.md': 'code_of_conduct.md',
    'configs/swapped/README.md': 'swapped_configs.md',
}
FOLDERS = {'configs/swapped': 'configs/swapped/README.md'}
# The packages whose names a release keeps (RELEASING.md), and what lies beside them for a program of one's own
PACKAGES = (
    'mila_mm',
    'mila_mm.models',
    'mila_mm.ops',
    'mila_mm.weights',
    'mila_mm.engine',
    'mila_mm.swap',
    'mila_mm.export',
    'mila_mm.datasets',
    'mila_mm.visualization',
    'mila_mm.study.model',
)
MODELS_MARK = '<!-- the tables of configs/metafile.yml, in the built site -->'
_LINK = re.compile(r'(\[[^\]]*\])\(([^)\s#:]+)(#[^)\s]*)?\)')


def write(folder: Path) -> None:
    """Write every generated page.

    Args:
        folder: Where to, ``docs/_generated``; the site's toc names the files.
    """
    (folder / 'reference').mkdir(parents=True, exist_ok=True)
    for source, page in TAKEN_IN.items():
        text = (ROOT / source).read_text(encoding='utf-8')
        save(folder / page, relocated(text, PurePosixPath(source).parent, PurePosixPath(GENERATED)))
    save(folder / 'commands.md', commands())
    seen: dict[int, str] = {}
    for package in PACKAGES:
        save(folder / 'reference' / f'{package}.rst', reference(package, seen))


def save(path: Path, text: str) -> None:
    """Write a page where it has changed, so that Sphinx reads no page again without need."""
    if not path.is_file() or path.read_text(encoding='utf-8') != text:
        path.write_text(text, encoding='utf-8')


def relocated(text: str, home: PurePosixPath, place: PurePosixPath) -> str:
    """Put the relative links of a Markdown page right for another folder.

    Args:
        text: The page.
        home: The folder, from the repository's root, that its links are relative to.
        place: The folder, from the root, that they shall be relative to.

    Returns:
        The page with links to files that have a page of the site leading there, links to others to the files, and
        links to folders, which the site does not have, as plain text; links whose text is the name of a page show
        the page's title. Code blocks stay as they are.
    """

    def moved(match: re.Match[str]) -> str:
        target = os.path.normpath(home / match[2])
        target = FOLDERS.get(target, target)
        if target in TAKEN_IN:
            target = f'{GENERATED}/{TAKEN_IN[target]}'
        elif (ROOT / target).is_dir():
            return match[1][1:-1]
        # A link that shows a page's file name on GitHub shows its title on the site.
        label = '[]' if match[1].endswith('.md]') and target.endswith('.md') else match[1]
        return f'{label}({os.path.relpath(target, place)}{match[3] or ""})'

    pieces = re.split(r'(^```.*?^```)', text, flags=re.MULTILINE | re.DOTALL)
    return ''.join(piece if piece.startswith('```') else _LINK.sub(moved, piece) for piece in pieces)


def model_tables() -> str:
    """Return the models of ``configs/metafile.yml`` as tables, one for each data set they are trained on."""
    models = yaml.safe_load((ROOT / 'configs/metafile.yml').read_text(encoding='utf-8'))['Models']
    by_data: dict[str, list[dict[str, Any]]] = {}
    for model in models:
        by_data.setdefault(model['Metadata']['Training Data'], []).append(model)
    return '\n'.join(f'## {data}\n\n{model_table(group)}' for data, group in by_data.items())


def model_table(models: list[dict[str, Any]]) -> str:
    """Return one table; metrics and costs are the columns that at least one of its models has."""
    sources = {result['Source'] for model in models for result in model.get('Results', [])}
    rows = []
    for model in models:
        about = dict(model['Metadata'])
        about.pop('Training Data')
        about.pop('Training Resources', None)
        cells: dict[str, Any] = {'config': f'[{model["Name"]}](../{model["Config"]})'}
        cells.update(about)
        for result in model.get('Results', []):
            source = f', {result["Source"]}' if len(sources) > 1 else ''
            cells.update({f'{name}{source}': value for name, value in result['Metrics'].items()})
        if 'Weights' in model:
            cells['weights'] = f'[released]({model["Weights"]})'
        rows.append(cells)
    columns = list(dict.fromkeys(name for row in (max(rows, key=len), *rows) for name in row))
    lines = [columns, ['---'] * len(columns), *([str(row.get(name, '')) for name in columns] for row in rows)]
    said = f'Results: {sources.pop()}.\n\n' if len(sources) == 1 else ''
    return said + ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def commands() -> str:
    """Return the page of the commands: what each prints for ``--help``."""
    from mila_mm import cli
    from mila_mm.cli import command

    os.environ['COLUMNS'] = '100'
    parts = ['# Commands\n', 'What `mila COMMAND --help` prints.\n']
    for name in command.subcommands():
        cli.ArgumentParser.program = f'mila {name}'
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            import_module(f'mila_mm.cli.{name.replace("-", "_")}').main(['--help'])
        parts.append(f'## mila {name}\n\n```text\n{printed.getvalue()}```\n')
    return '\n'.join(parts)


def reference(package: str, seen: dict[int, str]) -> str:
    """Return the reference of a package: its docstring, then each name of its ``__all__``.

    Args:
        package: Its dotted name.
        seen: The names under which objects have been described, by the objects' ids; those of this package are added.
    """
    module = import_module(package)
    parts = [package, '=' * len(package), '', f'.. automodule:: {package}', '   :no-members:', '']
    for name in sorted(module.__all__, key=str.lower):
        value, full = getattr(module, name), f'{package}.{name}'
        if inspect.ismodule(value):
            parts += [f'``{name}`` is the package :doc:`{value.__name__}`.', '']
        elif not (inspect.isclass(value) or inspect.isfunction(value)):
            parts += constant(name, value)
        elif id(value) in seen:
            kind = 'class' if inspect.isclass(value) else 'function'
            parts += [
                f'.. py:{kind}:: {name}{arguments(value)}',
                '',
                f'   The same as :py:obj:`{seen[id(value)]}`.',
                '',
            ]
        else:
            seen[id(value)] = full
            kind = 'class' if inspect.isclass(value) else 'function'
            kind = 'exception' if kind == 'class' and issubclass(value, BaseException) else kind
            options = [] if kind == 'function' else ['   :members:', '   :show-inheritance:']
            parts += [f'.. auto{kind}:: {full}', *options, '']
    return '\n'.join(parts)


def arguments(value: Any) -> inspect.Signature:
    """Return the arguments of a class or function with their defaults, without types."""
    signature, empty = inspect.signature(value), inspect.Signature.empty
    bare = [parameter.replace(annotation=empty) for parameter in signature.parameters.values()]
    return inspect.Signature(bare)


def constant(name: str, value: Any) -> list[str]:
    """Return the description of a constant: its type, and its value or its keys."""
    shown = ', '.join(map(repr, value)) if isinstance(value, Mapping | tuple) else repr(value)
    what = 'Keys' if isinstance(value, Mapping) else 'Value'
    return [f'.. py:data:: {name}', f'   :type: {type(value).__name__}', '', f'   {what}: ``{shown}``', '']
