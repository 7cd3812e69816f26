"""``mila``: finds the subcommand and runs it, importing no other."""

import ast
import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from mila_mm import cli
from mila_mm.errors import UserError
from mila_mm.version import __version__

# The order of a user's way; subcommands that are not named here follow.
_ORDER = ('demo', 'check-data', 'browse', 'train', 'test', 'predict', 'analyze', 'swap', 'weights', 'export', 'run')


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: Its name and its arguments, None for ``sys.argv[1:]``.

    Returns:
        The exit status, as of :func:`mila_mm.cli.execute`.
    """
    return cli.execute(_dispatch, argv)


def _dispatch(argv: Sequence[str] | None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    name, rest = (argv[0], argv[1:]) if argv else ('--help', [])
    if name in ('-h', '--help'):
        print(usage())
    elif name in ('-V', '--version'):
        print(f'mila_mm {__version__}')
    else:
        module = f'mila_mm.cli.{_module_name(name)}'
        cli.ArgumentParser.program = f'mila {name}'
        import_module(module).main(rest)


def subcommands() -> dict[str, str]:
    """Return the subcommands that there are, with the first line of each module's docstring, importing none."""
    found = {}
    for path in sorted(Path(__file__).parent.glob('[!_]*.py')):
        tree = ast.parse(path.read_text(encoding='utf-8'))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        if {'main', 'add_arguments'} <= defined:
            found[path.stem.replace('_', '-')] = (ast.get_docstring(tree) or '').split('\n')[0].rstrip('.')
    ranks = {name: rank for rank, name in enumerate(_ORDER)}
    return dict(sorted(found.items(), key=lambda item: (ranks.get(item[0], len(_ORDER)), item[0])))


def usage() -> str:
    """Return what ``mila --help`` prints."""
    commands = subcommands()
    width = max(map(len, commands)) + 2
    lines = [f'  {name:<{width}}{about[:1].lower()}{about[1:]}' for name, about in commands.items()]
    return '\n'.join(
        [
            'usage: mila COMMAND ...',
            '',
            'MILA backbones for MMDetection and MMSegmentation.',
            '',
            *lines,
            '',
            'mila COMMAND --help tells of its arguments; mila --version of the version. python -m mila_mm is the same.',
        ]
    )


def _module_name(name: str) -> str:
    names = subcommands()
    if name in names:
        return name.replace('-', '_')
    near = difflib.get_close_matches(name, list(names), n=2)
    hint = f'did you mean {" or ".join(near)}?' if near else f'expected one of {", ".join(names)}'
    raise UserError(f'mila {name}: no such command; {hint}')
