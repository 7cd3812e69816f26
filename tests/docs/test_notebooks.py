"""The notebooks run, from the first cell to a picture."""

import base64
import importlib.util
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('nbclient', reason='nbclient and ipykernel run the notebooks: requirements.txt has them')
import nbformat

ROOT = Path(__file__).resolve().parents[2]
NAMES = ('start_to_picture', 'own_data')
# A minute of training learns something; the bound leaves room for another machine's rounding.
LEARNT = 0.25


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('run_notebooks', ROOT / 'tools/docs/run_notebooks.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(notebook: nbformat.NotebookNode) -> list[np.ndarray]:
    """Return the pictures in a notebook's outputs."""
    found = [output.data for cell in notebook.cells for output in cell.get('outputs', []) if 'data' in output]
    encoded = [data.get('image/jpeg') or data.get('image/png') for data in found]
    raw = [np.frombuffer(base64.b64decode(each), np.uint8) for each in encoded if each]
    return [cv2.imdecode(each, cv2.IMREAD_COLOR) for each in raw]


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
    return '\n'.join(output.get('text') or output.get('data', {}).get('text/plain', '') for output in outputs)


@pytest.mark.parametrize('name', NAMES)
def test_what_is_committed_is_small_and_shows_a_picture(name: str) -> None:
    path = ROOT / 'docs/notebooks' / f'{name}.ipynb'
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 300_000
    assert shown(notebook) and '/work' not in printed(notebook).replace('/work_dirs', '')
    assert not [
        output for cell in notebook.cells for output in cell.get('outputs', []) if output.output_type == 'error'
    ]
    assert all(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == 'code')


def test_logs_are_left_out_of_a_notebook(tool) -> None:
    new = nbformat.v4
    said = (('stdout', 'now - mmengine - log\n10%\r20%\rdone\n'), ('stdout', 'x\n' * 99), ('stderr', 'w'))
    short, long, warning = (new.new_output('stream', name=name, text=text) for name, text in said)
    cells = [new.new_code_cell('a', outputs=[short, warning]), new.new_code_cell('b', outputs=[long])]
    notebook = new.new_notebook(cells=cells)
    tool.tidy(notebook)
    assert [output.text for output in notebook.cells[0].outputs] == ['done\n'] and not notebook.cells[1].outputs


def test_start_to_picture_in_short(tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('MILA_MM_NOTEBOOK_STEPS', '8')
    notebook = tool.run('start_to_picture', tmp_path)
    assert "'coco/bbox_mAP_50'" in printed(notebook)
    assert shown(notebook)[-1].shape == (288, 4 * 288, 3)
    assert list((tmp_path / 'work_dirs/notebook/run').glob('iter_8.pth'))


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_a_whole_notebook_learns(tool, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('MILA_MM_NOTEBOOK_STEPS', raising=False)
    monkeypatch.setenv('OMP_NUM_THREADS', os.environ.get('OMP_NUM_THREADS', '1'))
    notebook = tool.run(name, tmp_path)
    (scalars,) = [path for path in tmp_path.rglob('scalars.json') if 'test' not in path.parts]
    from mila_mm.visualization import read_scalars

    assert read_scalars(scalars)[1][-1]['coco/bbox_mAP_50'] > LEARNT
    assert shown(notebook)[-1].shape == (288, 4 * 288, 3)
