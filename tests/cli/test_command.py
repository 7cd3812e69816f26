"""The one command: its subcommands, what they import, and what a wrong word says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mila_mm import cli
from mila_mm.cli import command


@pytest.fixture(autouse=True)
def program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.ArgumentParser, 'program', None)


def test_usage_lists_every_subcommand_once(capsys: pytest.CaptureFixture) -> None:
    assert command.main([]) == 0
    assert command.main(['--help']) == 0
    first, second = capsys.readouterr().out.split('usage: ')[1:]
    assert first == second
    for name in ('demo', 'train', 'test', 'swap', 'weights'):
        assert first.count(f'\n  {name} ') == 1
    assert '  command ' not in first


@pytest.mark.parametrize('name', command.subcommands())
def test_help_of_every_subcommand(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main([name, '--help'])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f'usage: mila {name} ')


@pytest.mark.parametrize('words', [['--help'], ['train', '--help'], ['--version'], ['weights', 'list', '--nonsense']])
def test_answers_before_torch_is_imported(words: list[str]) -> None:
    code = (
        'import sys\nfrom mila_mm.cli.command import main\n'
        'try: main(sys.argv[1:])\nexcept SystemExit: pass\n'
        "assert not {'torch', 'mmengine', 'mmcv'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, '-c', code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_the_chosen_subcommand_is_imported() -> None:
    code = (
        'import sys\nfrom mila_mm.cli.command import main\n'
        'try: main(["train", "--help"])\nexcept SystemExit: pass\n'
        'from mila_mm.cli.command import subcommands\n'
        "print(*(name for name in subcommands() if 'mila_mm.cli.' + name.replace('-', '_') in sys.modules))"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ['train']


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, '-m', 'mila_mm', '--version'], capture_output=True, text=True, check=True)
    assert done.stdout.startswith('mila_mm ')


def test_a_reader_that_has_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command_line = [sys.executable, '-m', 'mila_mm', '--help']
    done = subprocess.run(command_line, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, '')


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['trian'], 'no such command; did you mean train?'),
        (['zzz'], 'expected one of'),
        (['train'], 'Run mila train --help'),
        (['train', 'mask_rcn_mila_t_3x'], 'did you mean mask_rcnn_mila_t_3x'),
        (['train', 'configs/mask_rcnn_mila_t_3x.py'], 'did you mean mask_rcnn_mila_t_3x'),
        (['test', 'mila_mm::mask_rcnn_mila_x_3x', 'a.pth'], 'does not exist in mila_mm; did you mean'),
        (['weights', 'fetch'], 'mila weights list'),
    ],
)
def test_a_mistake_is_one_message(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith('error: ')
    assert 'Traceback' not in error


def test_tools_are_aliases(root: Path) -> None:
    for tool, name in {'train': 'train', 'test': 'test', 'swap_backbone': 'swap', 'demo': 'demo'}.items():
        lines = (root / 'tools' / f'{tool}.py').read_text().splitlines()
        assert f'from mila_mm.cli.{name} import main' in lines
        assert len(lines) < 15
