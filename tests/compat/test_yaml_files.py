"""Configs and data in YAML: plain values and tuples come through, calls do not."""

from pathlib import Path

import mmengine
import pytest
import yaml
from mmengine.config import Config

import mila_mm  # noqa: F401 - what is tested here
from mila_mm.cli import command

TAGS = {
    'apply': "!!python/object/apply:os.mkdir ['{canary}']",
    'new': "!!python/object/new:os.mkdir ['{canary}']",
    'state': "!!python/object/new:type {{args: [z, [], {{extend: !!python/name:exec }}], listitems: '{canary}'}}",
    'name': '!!python/name:os.mkdir',
    'module': '!!python/module:os',
}


@pytest.mark.parametrize('ending', ['yaml', 'yml'])
@pytest.mark.parametrize('tag', list(TAGS))
def test_no_call_is_made(tag: str, ending: str, tmp_path: Path) -> None:
    canary, path = tmp_path / 'executed', tmp_path / f'config.{ending}'
    path.write_text(f'model: {TAGS[tag].format(canary=canary)}\n')
    for read in (mmengine.load, Config.fromfile):
        with pytest.raises(yaml.constructor.ConstructorError, match='python/'):
            read(str(path))
    assert not canary.exists()


def test_a_loader_of_pyyaml_would_make_it(tmp_path: Path) -> None:
    """Otherwise the test above shows nothing."""
    yaml.load(TAGS['apply'].format(canary=tmp_path / 'executed'), Loader=yaml.CLoader)
    assert (tmp_path / 'executed').is_dir()


def test_what_mmengine_dumps_is_read(tmp_path: Path) -> None:
    content = dict(
        model=dict(type='A', sizes=(1, (2, 3)), rate=1e-3, on=True, none=None, names=['ä', 'b']), list=[{'a': 1}]
    )
    Config(content).dump(str(tmp_path / 'config.yaml'))
    assert '!!python/tuple' in (tmp_path / 'config.yaml').read_text()
    assert Config.fromfile(str(tmp_path / 'config.yaml')).to_dict() == content


def test_a_command_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / 'config.yml'
    path.write_text(f'model: {TAGS["apply"].format(canary=tmp_path / "executed")}\n')
    assert command.main(['train', str(path)]) == 2
    said = capsys.readouterr().err
    assert 'config.yml cannot be read' in said
    assert 'Traceback' not in said
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('address', ['http://127.0.0.1:9/config.py', 'https://127.0.0.1:9/config.yaml'])
def test_no_config_is_fetched_from_an_address(address: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Neither itself nor a base of it."""
    assert command.main(['train', address]) == 2
    assert f'config {address} ' in capsys.readouterr().err
    (tmp_path / 'child.py').write_text(f'_base_ = {address!r}\n')
    assert command.main(['train', str(tmp_path / 'child.py')]) == 2
    assert 'builds on a file that does not exist' in capsys.readouterr().err
