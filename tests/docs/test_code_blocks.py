"""What the pages tell a reader to type: Python compiles, commands know their flags, configs exist."""

import argparse
import importlib
import io
import re
import runpy
import shlex
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from mila_mm import cli, zoo
from mila_mm.cli import command
from mila_mm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SHELL = ('bash', '', 'sh')
# What a line stands for is a program of this repository: everything else on it is not ours to check
PROGRAM = re.compile(
    r'(?:^|\s)(?:(mila)|python -m (mila_mm|benchmarks\.\w+)|-m (mila_mm)'
    r'|(?:python )?(tools/[\w/]+\.(?:py|sh))|python (examples/[\w/]+\.py))\s'
)
PLACEHOLDER = re.compile(r'[A-Z][A-Z_.]*')


class Parsed(Exception):
    """A program has read its command line; carries what it read."""


@pytest.fixture(autouse=True)
def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    read = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(read(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', stop)
    monkeypatch.setattr(cli.ArgumentParser, 'program', None)
    monkeypatch.syspath_prepend(str(ROOT))


def understood(start: Callable[[], object]) -> argparse.Namespace | str:
    """Let a program read its command line; return what it read, or what it says is wrong."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            start()
    except Parsed as parsed:
        return parsed.args[0]
    except UserError as error:
        return str(error)
    except SystemExit as end:
        return said.getvalue() or str(end)
    return 'the program ended without reading its command line'


def lines_of(code: str) -> list[str]:
    """Return the commands of a block: continued lines joined, comments and prompts left out, variables put in."""
    parts, variables = [], {}
    for line in re.sub(r'\\\n\s*', ' ', code).splitlines():
        bare = re.sub(r'(^|\s)#.*', '', re.sub(r'^\$ |^!', '', line.strip()))
        if assigned := re.fullmatch(r'([A-Z]+)=(\S+)', bare):
            variables[assigned[1]] = assigned[2]
        for name, value in variables.items():
            bare = re.sub(rf'\${name}\b', value, bare)
        parts += [part.strip() for part in re.split(r'\s(?:&&|\|\||;|\|)\s', bare)]
    return [part for part in parts if part]


def program_of(line: str) -> tuple[str, list[str]] | None:
    """Return the program of ours that a line runs, and its arguments; None for a line that runs another."""
    match = PROGRAM.search(f'{line} ')
    if not match or (match.start() and not re.match(r'[A-Z_]+=|python|torchrun|mpirun|OMP', line)):
        return None
    name = next(group for group in match.groups() if group)
    return name, shlex.split(f'{line} '[match.end() :])


def read(name: str, words: list[str]) -> argparse.Namespace | str:
    """Have a program of the repository read its command line."""
    if name in ('mila', 'mila_mm') or name.endswith('.sh'):
        return launched(name, words) if name.endswith('.sh') else subcommand(words)
    if name.startswith('benchmarks.'):
        name += '.__main__' if (ROOT / name.replace('.', '/')).is_dir() else ''
        return with_argv([name, *words], lambda: importlib.import_module(name).main())
    path = ROOT / name
    text = path.read_text(encoding='utf-8') if path.is_file() else ''
    if alias := re.search(r'from (mila_mm\.cli\.\w+) import main', text):
        return understood(lambda: importlib.import_module(alias[1]).main(words))
    if name.startswith('examples/'):  # plain programs with packages of their own; their tests run them
        return argparse.Namespace() if text else 'no such file'
    if not text:
        return 'no such file'
    return with_argv([str(path), *words], lambda: runpy.run_path(str(path), run_name='__main__'))


def subcommand(words: list[str]) -> argparse.Namespace | str:
    """Have a subcommand of ``mila`` read its command line."""
    if words[0] in ('--help', '--version'):
        return argparse.Namespace()
    if words[0] not in command.subcommands():
        return f'no such subcommand: {words[0]}'
    module = importlib.import_module(f'mila_mm.cli.{words[0].replace("-", "_")}')
    return understood(lambda: module.main(words[1:]))


def with_argv(argv: list[str], start: Callable[[], object]) -> argparse.Namespace | str:
    before, sys.argv = sys.argv, argv
    try:
        return understood(start)
    finally:
        sys.argv = before


def launched(name: str, words: list[str]) -> argparse.Namespace | str:
    """Read what a launching script hands on to train.py or test.py."""
    if not (ROOT / name).is_file():
        return 'no such file'
    skipped = {'tools/dist_test.sh': (2,), 'tools/slurm_train.sh': (0, 1, 3)}.get(name, (1,))  # CONFIG PROCESSES ...
    kept = [word for place, word in enumerate(words) if place not in skipped]
    return read('tools/test.py' if 'test' in name else 'tools/train.py', kept)


def unknown_config(config: str, page: str) -> bool:
    """Tell whether a config that a command names is neither there nor made on the page."""
    library, _, inner = config.partition('::')
    if inner and library in ('mmdet', 'mmseg', 'mmpretrain'):
        folder = Path(importlib.import_module(library).__file__).parent / '.mim' / 'configs'
        return PLACEHOLDER.match(inner) is None and not (folder / f'{inner.removesuffix(".py")}.py').is_file()
    if PLACEHOLDER.fullmatch(config) or (ROOT / config).is_file() or zoo.find_config(config):
        return False
    return not re.search(rf'(?:--out |^# |/){re.escape(Path(config).name)}', page, re.MULTILINE)


def test_python_compiles(blocks) -> None:
    wrong, seen = [], 0
    for page, language, code in blocks:
        if language in ('python', 'ipython'):
            seen += 1
            plain = re.sub(r'^!.*', '', code, flags=re.MULTILINE) if language == 'ipython' else code
            try:
                compile(plain, page, 'exec')
            except SyntaxError as error:
                wrong.append(f'{page}: {error}: {error.text}')
    assert not wrong, '\n'.join(wrong)
    assert seen > 15


def test_commands_know_their_flags_and_configs(blocks, pages) -> None:
    wrong, seen = [], Counter()
    for page, language, code in blocks:
        runs = lines_of(code) if language in SHELL else [] if language != 'ipython' else shell_lines(code)
        for line in runs:
            found = program_of(line)
            if found is None:
                continue
            seen[found[0]] += 1
            got = read(*found)
            if isinstance(got, str):
                wrong.append(f'{page}: {line}\n    {got.strip()}')
            elif isinstance(config := getattr(got, 'config', None), str) and unknown_config(config, pages[page]):
                wrong.append(f'{page}: {line}\n    no config {config}')
    assert not wrong, '\n'.join(wrong)
    assert {'tools/train.py', 'tools/dist_train.sh', 'tools/swap_backbone.py'} <= seen.keys() and seen['mila'] > 50


def shell_lines(code: str) -> list[str]:
    return lines_of('\n'.join(line for line in code.splitlines() if line.startswith('!')))


@pytest.mark.parametrize(
    'line',
    [
        'mila train mask_rcnn_mila_t_3x --no-such-flag',
        'mila no-such-command x',
        'tools/dist_train.sh configs/mask_rcnn_mila_t_3x.py 8 --no-such-flag',
        'python tools/no_such_tool.py',
        'python -m benchmarks.tiled --no-such-flag',
        'python tools/analysis_tools/get_flops.py configs/mask_rcnn_mila_t_3x.py --shape many',
    ],
)
def test_a_command_that_would_fail_is_found(line: str) -> None:
    assert isinstance(read(*program_of(line)), str)


def test_a_config_that_is_not_there_is_found() -> None:
    assert unknown_config('mask_rcnn_mila_t_4x', '') and unknown_config('mmdet::retinanet/retinanet_r5_fpn_1x_coco', '')
    assert not unknown_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco', '') and not unknown_config('CONFIG', '')
    assert not unknown_config('mine.py', '```python\n# mine.py\n')


def test_extras_and_targets_that_pages_name_exist(pages) -> None:
    extras = set(
        re.findall(r'^(\w+) =$', (ROOT / 'setup.cfg').read_text().partition('[options.extras_require]')[2], re.M)
    )
    targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    for page, text in pages.items():
        for names in re.findall(r'(?:mila-mm|\.)\[([a-z,]+)\]', text):
            assert set(names.split(',')) <= extras, f'{page}: extras [{names}]'
        for name in re.findall(r'(?:`|^)make ([a-z][a-z-]*)', text, re.MULTILINE):
            assert name in targets, f'{page}: make {name}'
