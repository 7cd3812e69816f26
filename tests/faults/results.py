"""What the harness has seen, in benchmarks/results/no_run_lost.json, and its tables in docs/no_run_lost.md.

python tests/faults/results.py     # write the tables
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from config import ROOT

RESULTS = ROOT / 'benchmarks/results/no_run_lost.json'
PHASES = {
    'rendezvous': 'one task missing',
    'download': 'in a download',
    'loading': 'while the data set is loaded',
    'compile': 'in the compilation of the first step',
    'step': 'in a step',
    'collective': 'while one waits for the other in a collective',
    'validation': 'in a validation',
    'saving': 'half of a checkpoint written',
    'best': 'half of the best checkpoint written',
    'pieces': 'while pieces are written',
    'background': 'while pieces are written in the background',
    'hang': 'one process hangs (SIGSTOP), 12 s of grace',
    'slow end': 'one process takes seconds to end',
    'exit': 'after the last iteration',
}
COLUMNS = {
    'srun': 'srun, two tasks',
    'nodes': 'two nodes, torchrun',
    'mpi': 'mpirun, two processes',
    'srun in pieces': 'srun, a model in pieces',
}


def record(key: str, **row: Any) -> None:
    """Put a result in place of the one that had its key, with where and when it is from."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.backbone_cpu import machine

    known = {name: value for name, value in machine().items() if name in ('cpu', 'torch', 'python', 'date')}
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows[key] = row | known | dict(cores=os.cpu_count(), load=round(os.getloadavg()[0], 1))
    RESULTS.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + '\n')


def tables(rows: dict[str, dict[str, Any]]) -> str:
    """Return what was seen as Markdown."""
    stops = {name: row for name, row in rows.items() if row['kind'] == 'stop'}
    columns = {name: text for name, text in COLUMNS.items() if any(row['job'] == name for row in stops.values())}
    lines: list[str] = []
    if columns:
        lines = [
            'Seconds from SIGTERM to the first byte of the answer, and until all had ended with 75:',
            '',
            f'| SIGTERM | {" | ".join(columns.values())} |',
            f'| --- |{" --- |" * len(columns)}',
        ]
    for phase, text in PHASES.items():
        found = [stops.get(f'{name}: {phase}') for name in columns]
        cells = ['' if row is None else f'{row["answered"]:.2f} s, {row["ended"]:.1f} s' for row in found]
        if any(cells):
            lines.append(f'| {text} | {" | ".join(cells)} |')
    lines += [
        *([''] if lines else []),
        '| run | disturbed | its end against that of an undisturbed run |',
        '| --- | --- | --- |',
    ]
    for name, row in rows.items():
        if row['kind'] == 'end':
            lines.append(f'| {name} | {row["disturbed"]} | equal bit for bit |')
    for name, row in rows.items():
        if row['kind'] == 'figures':
            resumed = ', '.join(f'on {count}: {row[f"resumed_on_{count}"]:.1e}' for count in (1, 2, 4))
            lines += [
                '',
                f'{name}: over {row["steps"]} steps losses differ by {row["losses"]:.1e} of them at most; a rank '
                f'holds {row["parameters"]:.3f} of the bytes of parameters, {row["optimizer"]:.3f} of the optimizer. '
                f'What two have saved in pieces, continued, differs from what they go on to by {resumed}.',
            ]
    ones = list(rows.values())
    loads = [row['load'] for row in ones]
    dates, versions = ({row[key] for row in ones} for key in ('date', 'torch'))
    lines += [
        '',
        f'{ones[0]["cpu"]}, {ones[0]["cores"]} cores shared with others (load of up to {max(loads):.0f}), '
        f'torch {", ".join(sorted(versions))}, Python {ones[0]["python"]}, gloo, {" and ".join(sorted(dates))}.',
    ]
    return '\n'.join(lines)


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    from benchmarks.measure import write_docs

    write_docs(tables(json.loads(RESULTS.read_text())), 'tests/faults/results.py', Path(ROOT / 'docs/no_run_lost.md'))
