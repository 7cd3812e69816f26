"""Runs the notebooks of the documentation and keeps what they show: ``python tools/docs/run_notebooks.py [NAME ...]``.

Results and pictures are kept; of what cells print only a few lines are, so that no log of a training is committed.
Takes the environment of ``make install``; the work goes to a folder of its own, ``--work-dir``.
"""

import argparse
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[2] / 'docs' / 'notebooks'
# Lines that a cell may print, and characters of one
MOST_LINES, MOST_CHARACTERS = 30, 200
CELL_SECONDS = 3600


def run(name: str, work_dir: Path) -> NotebookNode:
    """Run a notebook in a folder and return it with its outputs.

    Args:
        name: Its name without ``.ipynb``.
        work_dir: Where it runs; made if need be.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    notebook = nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)
    work_dir.mkdir(parents=True, exist_ok=True)
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name='python3', resources={'metadata': {'path': str(work_dir)}}
    )
    return client.execute()


def tidy(notebook: NotebookNode) -> None:
    """Take out of the outputs what nobody would read: warnings, long logs, times of cells."""
    for cell in notebook.cells:
        cell.metadata.pop('execution', None)
        if cell.cell_type == 'code':
            printed = ''.join(output.text for output in cell.outputs if output.get('name') == 'stdout')
            cell.outputs = [output for output in cell.outputs if output.output_type != 'stream']
            lines = printed.rstrip('\n').split('\n') if printed else []
            lines = [line.rpartition('\r')[2] for line in lines if ' - mmengine - ' not in line]
            if lines and len(lines) <= MOST_LINES and max(map(len, lines)) <= MOST_CHARACTERS:
                text = '\n'.join(lines) + '\n'
                cell.outputs.insert(0, nbformat.v4.new_output('stream', name='stdout', text=text))


def main() -> None:
    """Run the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', default=sorted(path.stem for path in FOLDER.glob('*.ipynb')))
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/notebooks'))
    args = parser.parse_args()
    for name in args.names:
        start = time.perf_counter()
        notebook = run(name, args.work_dir / name)
        tidy(notebook)
        nbformat.write(notebook, FOLDER / f'{name}.ipynb')
        print(f'{name}: {time.perf_counter() - start:.0f} s')


if __name__ == '__main__':
    main()
