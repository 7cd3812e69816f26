"""Run a tool of mmdet, mmseg or mmpretrain with MILA and the stand-in for mmcv's ops in place."""

import argparse
import difflib
import importlib.util
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from mila_mm import cli, zoo
from mila_mm.compat.import_hook import when_imported
from mila_mm.errors import UserError

_PACKAGES = ('mmdet', 'mmseg', 'mmpretrain')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    parser.add_argument('package', choices=_PACKAGES, help='whose tool it is')
    parser.add_argument('tool', nargs='?', help='browse_dataset, confusion_matrix, analyze_logs, test, ... [list them]')
    rest = parser.add_argument(
        'arguments', nargs=argparse.REMAINDER, help="the tool's own arguments, --help among them"
    )
    rest.required = False  # argparse would ask for it by name where the package is missing


def main(argv: Sequence[str] | None = None) -> None:
    """Run a tool as its own command line would.

    Raises:
        UserError: If the package or the tool is not there.
    """
    args = cli.parse(
        add_arguments,
        argv,
        description='Run a tool that comes with mmdet, mmseg or mmpretrain, by its name, in an environment where mmcv '
        'has no compiled ops. Checkpoints are read without running code in them.',
    )
    tools = tools_of(args.package)
    if args.tool is None:
        print('\n'.join(sorted(tools)))
        return
    name = args.tool.removesuffix('.py')
    path = tools.get(name) or next((tools[each] for each in tools if each.rpartition('/')[2] == name), None)
    if path is None:
        near = difflib.get_close_matches(name, list(dict.fromkeys(each.rpartition('/')[2] for each in tools)), n=3)
        hint = f'did you mean {", ".join(near)}?' if near else f'mila run {args.package} lists them'
        raise UserError(f'{args.package} has no tool {args.tool}; {hint}')
    run_tool(path, [_as_path(word) for word in args.arguments])


def _as_path(word: str) -> str:
    """Return the file where an argument is the name of one of this package's configs, which upstream does not know."""
    own = None if Path(word).exists() else zoo.find_config(word)
    return word if own is None else str(own)


def tools_of(package: str) -> dict[str, Path]:
    """Return the tools that come with a package, by their path below its folder of tools, without ``.py``.

    Raises:
        UserError: If the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        extra = 'classify' if package == 'mmpretrain' else 'onedl'
        raise UserError(f"{package} is not installed: pip install 'mila-mm[{extra}]'")
    root = Path(spec.origin).parent / '.mim' / 'tools'
    return {path.relative_to(root).with_suffix('').as_posix(): path for path in sorted(root.rglob('*.py'))}


def run_tool(path: Path, arguments: Sequence[str]) -> None:
    """Run a script in this process as ``python PATH ARGUMENTS`` would, reading checkpoints safely."""
    import torch

    before = torch.load, sys.argv, sys.path[:]
    torch.load = _safe(torch.load)  # scripts like publish_model read with it
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    when_imported('matplotlib.style', _name_seaborns_styles)
    try:
        runpy.run_path(str(path), run_name='__main__')
    except ModuleNotFoundError as error:
        missing = (error.name or '').partition('.')[0]
        if not missing or importlib.util.find_spec(missing) is not None:
            raise
        raise UserError(f'{path.stem} needs {missing}, which is not installed: pip install {missing}') from error
    finally:
        torch.load, sys.argv, sys.path[:] = before


def _name_seaborns_styles(module: ModuleType) -> None:
    """Let matplotlib know the styles that analyze_logs takes, ``dark`` by default; seaborn had them by these names."""
    for name in ('dark', 'darkgrid', 'ticks', 'white', 'whitegrid'):
        known = module.library.get(f'seaborn-v0_8-{name}')
        if known is not None:
            module.library.setdefault(name, known)


def _safe(torch_load: Callable[..., Any]) -> Callable[..., Any]:
    from mila_mm.weights.loaders import safe_torch_load

    def load(file: Any, map_location: Any = None, *args: Any, weights_only: bool | None = None, **options: Any) -> Any:
        if weights_only:  # so does the safe reader call it
            return torch_load(file, map_location, *args, weights_only=True, **options)
        return safe_torch_load(file, map_location)

    return load
