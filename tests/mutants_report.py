"""What became of the faults of mutants.py: its report, and the page of the documentation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / 'benchmarks/results/mutants.json'
PAGE = ROOT / 'docs/mutants.md'


@dataclass(frozen=True)
class Mutant:
    """A fault: the ``occurrence``-th place at which an operator of Cosmic Ray can work in a file."""

    room: str
    path: str
    operator: str
    arguments: tuple[tuple[str, object], ...]
    occurrence: int
    line: int


@dataclass(frozen=True)
class Outcome:
    """What became of a fault: 'caught', 'survived' or 'timeout', in how many seconds, and by which test."""

    mutant: Mutant
    status: str
    seconds: float
    diff: str
    test: str = ''


def from_json(row: dict[str, Any]) -> Outcome:
    """Read an outcome back from the report."""
    arguments = tuple((name, value) for name, value in row['mutant']['arguments'])
    return Outcome(**{**row, 'mutant': Mutant(**{**row['mutant'], 'arguments': arguments})})


def _remark(document: dict, outcome: dict) -> str:
    """What somebody has written into the report about a fault; 'open' where nobody has."""
    mutant = outcome['mutant']
    return document['remarks'].get(f'{mutant["path"]}:{mutant["line"]}:{mutant["operator"]}', 'open')


def page(document: dict) -> str:
    """Return docs/mutants.md."""
    outcomes = document['outcomes']
    rows = []
    for room in dict.fromkeys(outcome['mutant']['room'] for outcome in outcomes):
        of_room = [outcome for outcome in outcomes if outcome['mutant']['room'] == room]
        caught = sum(outcome['status'] == 'caught' for outcome in of_room)
        rows.append(f'| `{room}` | {len(of_room)} | {caught} | {100 * caught / len(of_room):.0f} % |')
    caught = sum(outcome['status'] == 'caught' for outcome in outcomes)
    told = [_remark(document, outcome) for outcome in outcomes if outcome['status'] != 'caught']
    same, mended = (sum(remark.startswith(word) for remark in told) for word in ('equivalent', 'caught since'))
    text = [
        '<!-- Made by `python tests/mutants.py --docs`; see that script. -->',
        '',
        '# Do the tests notice faults?',
        '',
        '`make mutants` puts small faults into the package, one at a time ([Cosmic Ray](https://cosmic-ray.readthedocs.io)',
        'makes them), and runs the tests of the room on each. Lines are drawn by a seed, a fault at each.',
        '',
        f'{document["machine"]["date"]}, seed {document["seed"]}, commit {document["machine"]["commit"][:10]}, '
        f'Python {document["machine"]["python"]}: {caught} of {len(outcomes)} caught '
        f'({100 * caught / max(len(outcomes), 1):.0f} %).',
        *(f'`{room}` was tried at commit {commit[:10]}.' for room, commit in document.get('commits', {}).items()),
        '',
        '| room | faults | caught | |',
        '| --- | --- | --- | --- |',
        *rows,
        '',
        f'Of the {len(told)} that no test of their room noticed then, {same} change nothing that can be seen, and',
        f'{mended} are caught by tests that were written since: {caught + mended} of {len(outcomes) - same} faults '
        f'({100 * (caught + mended) / max(len(outcomes) - same, 1):.0f} %).',
        'Tests of other rooms, many of which train or start programs, were not asked.',
        '',
        'What no test noticed, and what is to be said of it:',
        '',
    ]
    for outcome in outcomes:
        if outcome['status'] != 'caught':
            mutant = outcome['mutant']
            remark = _remark(document, outcome)
            text += [f'`{mutant["path"]}:{mutant["line"]}`: {remark}', '', '```diff', outcome['diff'], '```', '']
    return '\n'.join(text).rstrip() + '\n'
