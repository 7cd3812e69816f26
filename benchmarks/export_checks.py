"""Do exported files say what trained models say? Every family, format and size, from the tests that compare them.

    python -m benchmarks.export_checks                    # hours of CPU, two processes
    python -m benchmarks.export_checks -k "mask_rcnn"     # a part, as pytest's -k, whose rows replace those of before
    python -m benchmarks.export_checks --docs             # write the table of docs/deploy.md from the JSON

It runs ``tests/export/test_photographs.py``, which trains small models on four photographs, exports each, and compares
the file with the model on images at the size of the export and at others. What fails is in the result by name.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.backbone_cpu import machine
from benchmarks.measure import write_docs

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / 'benchmarks' / 'results' / 'export_checks.json'
TESTS = 'tests/export/test_photographs.py'
OWN = 'openvino, its own precision'

Row = dict[str, Any]


def run_tests(select: str, workers: int, cache: str | None) -> tuple[list[Row], int]:
    """Run the tests; return a row for each, and pytest's exit status."""
    env = {**os.environ, 'MILA_MM_SLOW': '1', 'OMP_NUM_THREADS': '1'}
    if cache is not None:
        env['MILA_MM_EXPORT_CACHE'] = str(Path(cache).resolve())
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, 'report.xml')
        command = [sys.executable, '-m', 'pytest', '-v', '-n', str(workers), f'--junitxml={report}', TESTS]
        status = subprocess.run([*command, '-k', select] if select else command, cwd=ROOT, env=env, check=False)
        if not report.exists():
            sys.exit(f'pytest ended with {status.returncode} and without a report')
        return rows_of(report), status.returncode


def rows_of(report: Path) -> list[Row]:
    """Read a report in JUnit's form: of each test its name, how it ended, and what it compared, if it got so far."""
    rows = []
    for case in ElementTree.parse(report).getroot().iter('testcase'):
        ends = [kind for kind in ('failure', 'error', 'skipped') if case.find(kind) is not None]
        row: Row = {'test': case.get('name'), 'end': ends[0] if ends else 'passed'}
        row['seconds'] = float(case.get('time', 0))
        said = {entry.get('name'): str(entry.get('value')) for entry in case.iter('property')}
        row |= {'model': said.get('model', ''), **json.loads(said.get('compared', '{}'))}
        rows.append(row)
    return rows


def _worst(rows: Sequence[Mapping[str, Any]], key: str, pick: Any = max) -> Any:
    values = [row[key] for row in rows if row.get(key) is not None]
    return pick(values) if values else None


def _agreement(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cells for what was found, and how far file and model lie apart at most."""
    if not rows:
        return [''] * 4
    kind = rows[0]['kind']
    if kind == 'segmentor':
        return ['', '', '', f'{100 * _worst(rows, "pixels", min):.3f} % of the labels']
    if kind == 'classifier':
        return ['', '', f'{_worst(rows, "scores"):.1e}', '']
    masks = _worst(rows, 'masks', min)
    found, unpaired = (sum(row[key] for row in rows) for key in ('detections', 'unpaired'))
    return [
        f'{found}' + (f', {unpaired} without a partner' if unpaired else ''),
        f'{_worst(rows, "boxes"):.1e} px',
        f'{_worst(rows, "scores"):.1e}',
        '' if masks is None else f'IoU {masks:.4f}',
    ]


def table(result: Mapping[str, Any]) -> str:
    """The rows as Markdown: of each family its files in fp32 together, and each other precision by itself."""
    rows = [row for row in result['rows'] if row['end'] == 'passed']
    failed = [row['test'] for row in result['rows'] if row['end'] in ('failure', 'error')]
    skipped = [row['test'] for row in result['rows'] if row['end'] == 'skipped']
    versions = ', '.join(f'{name} {text}' for name, text in result['versions'].items())
    ends = [f'{len(rows)} tests passed', f'{len(failed)} failed', f'{len(skipped)} were skipped']
    lines = [
        f'{result["machine"]["cpu"]}, torch {result["machine"]["torch"]}, {versions}, {result["machine"]["date"]}: '
        + ', '.join(ends)
        + ('' if not failed + skipped else f' ({", ".join(failed + skipped)})')
        + '.',
        '',
        '| model | files | found | boxes within | scores within | masks, labels |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    models = list(dict.fromkeys(row['model'] for row in rows))
    for model in models:
        compared = [row for row in rows if row['model'] == model and 'options' in row]
        for name, part in _by_precision(compared):
            lines.append(f'| {model} | {name} | ' + ' | '.join(_agreement(part)) + ' |')
    return '\n'.join(lines)


def _by_precision(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    full = [row for row in rows if row['options'].get('precision') != 'fp16' and row['options'].get('format') != OWN]
    counts: dict[str, int] = {}
    for row in full:
        name = row['options'].get('format', 'onnx')
        counts[name] = counts.get(name, 0) + 1
    parts = [(', '.join(f'{count} {name}' for name, count in sorted(counts.items())), full)]
    parts.append(('onnx, fp16', [row for row in rows if row['options'].get('precision') == 'fp16']))
    parts.append((OWN, [row for row in rows if row['options'].get('format') == OWN]))
    return [(name, part) for name, part in parts if part]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('-k', dest='select', default='', help='which tests, as for pytest')
    parser.add_argument('--workers', type=int, default=2, help='processes, default 2')
    parser.add_argument('--cache', help='folder for the trained weights, to keep them')
    parser.add_argument('--out', type=Path, default=RESULT)
    parser.add_argument('--docs', action='store_true', help='write the table into docs/deploy.md, run nothing')
    args = parser.parse_args(argv)
    if args.docs:
        write_docs(table(json.loads(args.out.read_text())), 'export_checks', ROOT / 'docs' / 'deploy.md')
        return 0
    # All are needed: nothing is skipped.
    versions = {name: version(name) for name in ('onnx', 'onnxruntime', 'openvino')}
    before = json.loads(args.out.read_text()) if args.select and args.out.exists() else None
    if before and (before['versions'] != versions or before['machine']['torch'] != torch.__version__):
        sys.exit(f'{args.out} is of other versions, {before["versions"]}: run all, or give another --out')
    rows, status = run_tests(args.select, args.workers, args.cache)
    if before:
        new = {row['test'] for row in rows}
        rows += [row for row in before['rows'] if row['test'] not in new]
    rows.sort(key=lambda row: str(row['test']))
    here = machine()
    for row in rows:
        row.setdefault('commit', here['commit'])
    result = {'machine': here, 'versions': versions, 'rows': rows}
    args.out.write_text(json.dumps(result, indent=1) + '\n')
    print(table(result))
    return status


if __name__ == '__main__':
    sys.exit(main())
