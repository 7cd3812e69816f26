"""``mila run``: tools of mmdet and mmseg in an environment without mmcv's compiled ops."""

import json
import os
from pathlib import Path

import pytest
import torch

from mila_mm.cli import command, run
from mila_mm.errors import UserError

LOGS = 'analysis_tools/analyze_logs'


class Touch:
    """Pickles as a call."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
def test_tools_are_listed(package: str, capsys: pytest.CaptureFixture) -> None:
    assert command.main(['run', package]) == 0
    tools = capsys.readouterr().out.split()
    assert {'train', 'test', 'analysis_tools/analyze_logs', 'analysis_tools/confusion_matrix'} <= set(tools)


@pytest.mark.parametrize('tool', ['test', 'confusion_matrix', 'browse_dataset', 'analyze_logs'])
def test_the_arguments_are_the_tools_own(tool: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(['run', 'mmdet', tool, '--help'])
    assert ended.value.code == 0
    assert f'usage: {tool}.py' in capsys.readouterr().out


def test_publish_model_of_a_real_checkpoint(folder: Path) -> None:
    from mmengine.logging import HistoryBuffer

    content = {
        'state_dict': {'a': torch.ones(2)},
        'meta': {'epoch': 1},
        'optimizer': {'state': {}},
        'message_hub': {'log_scalars': {'train/loss': HistoryBuffer([1.0, 2.0], [1, 1])}},
    }
    torch.save(content, folder / 'in.pth')
    before = torch.load
    assert command.main(['run', 'mmdet', 'publish_model', 'in.pth', 'out.pth']) == 0
    assert torch.load is before
    assert os.system('sleep 0.3') == 0  # the tool moves its file in a process that it does not wait for
    published = torch.load(next(folder.glob('out-*.pth')), weights_only=True)
    assert sorted(published) == ['meta', 'state_dict']


def test_publish_model_runs_no_code(folder: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({'state_dict': {'a': torch.ones(2)}, 'meta': Touch(folder / 'executed')}, folder / 'in.pth')
    assert command.main(['run', 'mmdet', 'publish_model', 'in.pth', 'out.pth']) == 2
    assert 'posix.mkdir' in capsys.readouterr().err
    assert not (folder / 'executed').exists()


def test_mistakes(capsys: pytest.CaptureFixture) -> None:
    assert command.main(['run', 'mmdet', 'analyse_logs']) == 2
    assert 'did you mean analyze_logs' in capsys.readouterr().err
    assert command.main(['run', 'mmpose']) == 2
    assert 'mmpose' in capsys.readouterr().err


def test_what_is_missing_is_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / 'tool.py').write_text('import no_such_library.part')
    with pytest.raises(UserError, match='tool needs no_such_library, which is not installed'):
        run.run_tool(folder / 'tool.py', [])
    (folder / 'tool.py').write_text('import torch.no_such_part')  # a defect of the tool
    with pytest.raises(ModuleNotFoundError):
        run.run_tool(folder / 'tool.py', [])
    assert command.main(['run']) == 2
    assert 'required: package\n' in capsys.readouterr().err


def test_curves_in_the_style_that_the_tool_asks_for(folder: Path) -> None:
    pytest.importorskip('seaborn' if 'seaborn' in run.tools_of('mmdet')[LOGS].read_text() else 'matplotlib')
    lines = [json.dumps({'loss': 1.0 / step, 'epoch': 1, 'step': step, 'iter': step}) for step in (1, 2, 3)]
    (folder / 'scalars.json').write_text('\n'.join(lines) + '\n')
    words = ('run', 'mmdet', 'analyze_logs', 'plot_curve', 'scalars.json', '--keys', 'loss', '--out', 'loss.png')
    assert command.main(words) == 0
    assert (folder / 'loss.png').stat().st_size > 5000


def test_a_script_finds_its_neighbours(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / 'neighbour.py').write_text('value = 7')
    (folder / 'tool.py').write_text('import sys, neighbour\nprint(neighbour.value, sys.argv[1:], __name__)')
    run.run_tool(folder / 'tool.py', ['--x', '1'])
    assert capsys.readouterr().out == "7 ['--x', '1'] __main__\n"
