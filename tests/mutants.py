"""Put small faults into the package, one at a time, and see whether its tests notice: ``make mutants``.

Cosmic Ray (cosmic-ray.readthedocs.io) makes the faults: another operator, another number, a condition turned round, a
loop that never runs. From each room as many places are drawn as asked for, by a seed, with one fault at each; the tests
of that room run on a copy of the checkout, those of the file's own name first, until one fails. The report, JSON and a
page of the documentation, lists every fault that no test has noticed.

    python tests/mutants.py --per-room 20 --workers 2      # half an hour on two cores
    python tests/mutants.py --rooms ops weights --seed 1
    python tests/mutants.py --docs                         # the page again, from the JSON
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from queue import Queue

from mila_mm.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / 'benchmarks/results/mutants.json'
PAGE = ROOT / 'docs/mutants.md'
# The rooms, and what of tests/ is to notice faults in them beside the tests of the file's own name. No training of
# minutes: what takes one to notice lacks a test.
ROOMS = {
    'ops': ('ops', 'nn/test_layers_fused.py', 'models/test_mila.py'),
    'nn': ('nn', 'models/test_mila.py', 'models/test_parity.py', 'models/test_compile.py'),
    'models': ('models', 'engine/optimizers'),
    'weights': ('weights',),
    'engine': ('engine', 'configs/test_recipes.py', 'test_stopping.py', 'tools/test_bad_input.py'),
    'compat': ('compat',),
    'swap': ('swap/test_rewire.py', 'swap/test_recipe.py', 'swap/test_swap.py', 'swap/test_user_configs.py'),
}
# Whole modules of figures, or that only a GPU or another process runs.
WITHOUT_TESTS_HERE = ('ops/triton/configs.py', 'swap/sweep/')
# Types are written with |, and the interpreter of a union does not care for its order.
LEFT_OUT = ('BitOr', 'RemoveDecorator', 'Pow', 'Shift')
TIMEOUT = 1500  # seconds
# Imported once, for all faults; nothing of the package.
PRELOADED = [
    'torch',
    'torchvision',
    'timm',
    'mmengine.runner',
    'pytest',
    'hypothesis',
    'numpy',
    'cv2',
    'pycocotools.coco',
]


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
    """What became of a fault: 'caught', 'survived' or 'timeout', in how many seconds, and its difference."""

    mutant: Mutant
    status: str
    seconds: float
    diff: str


def places(room: str) -> Iterator[Mutant]:
    """Yield all faults that can be put into a room."""
    from cosmic_ray.ast import ast_nodes, get_ast_from_path
    from cosmic_ray.plugins import get_operator, operator_names

    for path in sorted((ROOT / 'mila_mm' / room).rglob('*.py')):
        inside = path.relative_to(ROOT / 'mila_mm').as_posix()
        if path.name == '__init__.py' or inside.startswith(WITHOUT_TESTS_HERE):
            continue
        tree = get_ast_from_path(path)
        for name in operator_names():
            operator = get_operator(name)
            if operator.arguments() or any(part in name for part in LEFT_OUT):
                continue
            positions = (start for node in ast_nodes(tree) for start, _ in operator().mutation_positions(node))
            for occurrence, (line, _) in enumerate(positions):
                yield Mutant(room, path.relative_to(ROOT).as_posix(), name, (), occurrence, line)


def draw(room: str, count: int, seed: int) -> list[Mutant]:
    """Draw lines of a room, and a fault at each: a line with many operators is no likelier than another."""
    chance = random.Random(f'{seed} {room}')
    at_line: dict[tuple[str, int], list[Mutant]] = {}
    for mutant in places(room):
        at_line.setdefault((mutant.path, mutant.line), []).append(mutant)
    lines = chance.sample(sorted(at_line), min(count, len(at_line)))
    return [chance.choice(at_line[line]) for line in lines]


def tests_of(mutant: Mutant) -> list[str]:
    """Name the tests that are to notice a fault: those of the file's name first, then those of its room."""
    module = Path(mutant.path).relative_to('mila_mm')
    own = sorted((ROOT / 'tests' / module.parent).glob(f'test_{module.stem}*.py'))
    beside = [ROOT / 'tests' / name for name in ROOMS[mutant.room]]
    return [path.relative_to(ROOT).as_posix() for path in [*own, *beside] if path.exists()]


def put(folder: Path, mutant: Mutant) -> str:
    """Put a fault into a copy of the checkout; return the difference."""
    import difflib

    from cosmic_ray.mutating import apply_mutation
    from cosmic_ray.plugins import get_operator

    before, after = apply_mutation(folder / mutant.path, get_operator(mutant.operator)(), mutant.occurrence)
    assert after is not None and after != before
    lines = difflib.unified_diff(before.split('\n'), after.split('\n'), mutant.path, mutant.path, lineterm='', n=0)
    return '\n'.join(list(lines)[2:])


def _context() -> multiprocessing.context.ForkServerContext:
    """Processes that begin with the libraries imported, which takes longer than most tests."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    return context


def _test(folder: str, tests: list[str]) -> None:
    """Run tests on the package in a folder; the status is pytest's. In a process and a session of its own."""
    import pytest

    os.setsid()
    os.chdir(folder)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    sys.dont_write_bytecode = True
    sys.path.insert(0, folder)
    os.environ['PYTHONPATH'] = folder
    status = int(pytest.main(['-x', '-q', '-p', 'no:cacheprovider', *tests]))
    import mila_mm

    assert Path(mila_mm.__file__).is_relative_to(folder), 'another checkout was tested'
    os._exit(status)


def judge(folder: Path, mutant: Mutant) -> Outcome:
    """Run the tests on a copy with a fault, and mend the copy."""
    kept = (folder / mutant.path).read_bytes()
    begin = time.monotonic()
    try:
        diff = put(folder, mutant)
        process = _context().Process(target=_test, args=(str(folder), tests_of(mutant)))
        process.start()
        process.join(TIMEOUT)
        status = 'survived' if process.exitcode == 0 else 'caught'
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            status = 'timeout'
    finally:
        (folder / mutant.path).write_bytes(kept)
    return Outcome(mutant, status, round(time.monotonic() - begin, 1), diff)


def copies(count: int, below: Path) -> Queue[Path]:
    """Copy what git tracks, once for each worker."""
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True)
    folders: Queue[Path] = Queue()
    for number in range(count):
        folder = below / f'copy{number}'
        for name in listed.stdout.splitlines():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
        folders.put(folder)
    return folders


def run(mutants: list[Mutant], workers: int, seconds: float, report: Callable[[list[Outcome]], None]) -> list[Outcome]:
    """Judge faults until they or the time are at an end; hand what is known to ``report`` after each."""
    end = time.monotonic() + seconds
    known: list[Outcome] = []
    with tempfile.TemporaryDirectory() as below:
        folders = copies(workers, Path(below))

        def one(mutant: Mutant) -> Outcome | None:
            if time.monotonic() > end:
                return None
            folder = folders.get()
            try:
                outcome = judge(folder, mutant)
            finally:
                folders.put(folder)
            print(
                f'{outcome.status:8s} {outcome.seconds:6.1f} s  {mutant.path}:{mutant.line} {mutant.operator}',
                flush=True,
            )
            known.append(outcome)
            report(list(known))
            return outcome

        with ThreadPoolExecutor(workers) as pool:
            return [outcome for outcome in pool.map(one, mutants) if outcome is not None]


def page(document: dict) -> str:
    """Return docs/mutants.md."""
    outcomes = document['outcomes']
    rows = []
    for room in ROOMS:
        of_room = [outcome for outcome in outcomes if outcome['mutant']['room'] == room]
        if of_room:
            caught = sum(outcome['status'] == 'caught' for outcome in of_room)
            rows.append(f'| `{room}` | {len(of_room)} | {caught} | {100 * caught / len(of_room):.0f} % |')
    caught = sum(outcome['status'] == 'caught' for outcome in outcomes)
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
        '',
        '| room | faults | caught | |',
        '| --- | --- | --- | --- |',
        *rows,
        '',
        'What no test noticed, and what is to be said of it:',
        '',
    ]
    for outcome in outcomes:
        if outcome['status'] != 'caught':
            mutant = outcome['mutant']
            remark = document['remarks'].get(f'{mutant["path"]}:{mutant["line"]}:{mutant["operator"]}', 'open')
            text += [f'`{mutant["path"]}:{mutant["line"]}`: {remark}', '', '```diff', outcome['diff'], '```', '']
    return '\n'.join(text).rstrip() + '\n'


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rooms', nargs='+', choices=ROOMS, default=list(ROOMS), help='where to put faults [all]')
    parser.add_argument('--per-room', type=int, default=20, help='faults in each room [20]')
    parser.add_argument('--seed', type=int, default=0, help='of the draw [0]')
    parser.add_argument('--workers', type=int, default=2, help='faults tried at the same time [2]')
    parser.add_argument('--minutes', type=float, default=30, help='start no further one after so long [30]')
    parser.add_argument('--out', type=Path, default=RESULT, metavar='JSON', help='the report [%(default)s]')
    parser.add_argument('--docs', action='store_true', help='only write docs/mutants.md from the report')
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE')
    if args.docs:
        PAGE.write_text(page(json.loads(args.out.read_text(encoding='utf-8'))), encoding='utf-8')
        return
    mutants = [mutant for room in args.rooms for mutant in draw(room, args.per_room, args.seed)]
    random.Random(args.seed).shuffle(mutants)  # where the time ends early, all rooms have had their share
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=ROOT, capture_output=True, text=True, check=True)
    machine = dict(date=date.today().isoformat(), commit=commit.stdout.strip(), python=platform.python_version())
    remarks = json.loads(args.out.read_text(encoding='utf-8'))['remarks'] if args.out.exists() else {}

    def report(outcomes: list[Outcome]) -> None:
        """Write what is known: a run that is cut off keeps it."""
        document = dict(machine=machine, seed=args.seed, remarks=remarks, outcomes=[asdict(o) for o in outcomes])
        write_whole(args.out, json.dumps(document, indent=1) + '\n')

    outcomes = run(mutants, args.workers, 60 * args.minutes, report)
    report(outcomes)
    caught = sum(outcome.status == 'caught' for outcome in outcomes)
    print(f'{caught} of {len(outcomes)} caught, {len(mutants) - len(outcomes)} not tried; {args.out}')


if __name__ == '__main__':
    main()
