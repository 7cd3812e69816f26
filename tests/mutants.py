"""Put small faults into the package, one at a time, and see whether its tests notice: ``make mutants``.

Cosmic Ray (cosmic-ray.readthedocs.io) makes the faults: another operator, another number, a condition turned round, a
loop that never runs. From each room as many places are drawn as asked for, by a seed, with one fault at each; the tests
of that room run on a copy of the checkout, the likeliest first, until one fails. Without a fault they have to pass,
which is tried first. The report, JSON and a page of the documentation, lists every fault that no test has noticed. A
run that was cut off goes on where it was, if commit and seed are the same.

    python tests/mutants.py --per-room 20 --workers 2      # half an hour on two cores
    python tests/mutants.py --rooms ops weights --seed 1
    python tests/mutants.py --docs                         # the page again, from the JSON
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path
from queue import Queue
from typing import Any

from mutants_report import PAGE, RESULT, Mutant, Outcome, from_json, page

ROOT = Path(__file__).resolve().parents[1]
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
OTHER_PACKAGE = 99  # an exit status that pytest has not
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
    """Name the tests that are to notice a fault: those of the room, the likeliest first, so that most runs are short.

    Those of the file's name, then those that name the module, its folder, or something that it defines, then the rest;
    in ``engine``, whose tests start many trainings, without the rest: what only they would notice lacks a test.
    """
    module = Path(mutant.path).relative_to('mila_mm')
    dotted = 'mila_mm.' + '.'.join(module.with_suffix('').parts)
    tree = ast.parse((ROOT / mutant.path).read_text(encoding='utf-8'))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}

    def distance(path: Path) -> int:
        if path.parent == ROOT / 'tests' / module.parent and path.stem.startswith(f'test_{module.stem}'):
            return 0
        text = path.read_text(encoding='utf-8')
        if dotted in text:
            return 1
        if dotted.rpartition('.')[0] in text and (module.stem in text or module.parent.name in path.stem):
            return 2
        return 3 if not defined.isdisjoint(re.findall(r'\w+', text)) else 4

    below = [ROOT / 'tests' / name for name in ROOMS[mutant.room]]
    own = (ROOT / 'tests' / module.parent).glob(f'test_{module.stem}*.py')
    files = {*own, *(each for path in below for each in ([path] if path.is_file() else path.rglob('test_*.py')))}
    ranked = sorted((distance(path), path.relative_to(ROOT).as_posix()) for path in files)
    return [path for far, path in ranked if far < 4 or mutant.room != 'engine']


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


class _FirstFailure:
    """A plugin of pytest that writes down which test failed first."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.out.exists():
            self.out.write_text(report.nodeid, encoding='utf-8')

    def pytest_collectreport(self, report: Any) -> None:
        self.pytest_runtest_logreport(report)


def _test(folder: str, tests: list[str], failure: str) -> None:
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
    status = int(pytest.main(['-x', '-q', '-p', 'no:cacheprovider', *tests], plugins=[_FirstFailure(Path(failure))]))
    import mila_mm

    os._exit(status if Path(mila_mm.__file__).is_relative_to(folder) else OTHER_PACKAGE)


def first_failure(folder: Path, tests: list[str]) -> str | None:
    """Run tests in a copy of the checkout.

    Returns:
        The test that failed first; '' where all passed, None where they took longer than :data:`TIMEOUT`.

    Raises:
        RuntimeError: If the tests did not run as they should.
    """
    failure = folder.parent / f'{folder.name}.failure'
    failure.unlink(missing_ok=True)
    process = _context().Process(target=_test, args=(str(folder), tests, str(failure)))
    process.start()
    process.join(TIMEOUT)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return None
    if process.exitcode == 0:
        return ''
    if process.exitcode == OTHER_PACKAGE or (process.exitcode > 0 and not failure.exists()):
        raise RuntimeError(f'pytest {tests} ended with {process.exitcode}')
    return failure.read_text(encoding='utf-8') if failure.exists() else f'signal {-process.exitcode}'


def judge(folder: Path, mutant: Mutant) -> Outcome:
    """Run the tests on a copy with a fault, and mend the copy."""
    kept = (folder / mutant.path).read_bytes()
    begin = time.monotonic()
    try:
        diff = put(folder, mutant)
        failed = first_failure(folder, tests_of(mutant))
    finally:
        (folder / mutant.path).write_bytes(kept)
    status = {'': 'survived', None: 'timeout'}.get(failed, 'caught')
    return Outcome(mutant, status, round(time.monotonic() - begin, 1), diff, failed or '')


def control(folder: Path, room: str) -> None:
    """See that without a fault the tests of a room pass in a copy: only then does a failure say something.

    Raises:
        SystemExit: If one fails.
    """
    begin = time.monotonic()
    files = {mutant.path: mutant for mutant in places(room)}
    tests = {name for mutant in files.values() for name in tests_of(mutant)}
    failed = first_failure(folder, sorted(tests))
    if failed != '':
        raise SystemExit(f'without a fault: {failed or "the tests take too long"}')
    print(f'without a fault: the tests of {room} pass, {time.monotonic() - begin:.0f} s', flush=True)


def copies(count: int, below: Path) -> Queue[Path]:
    """Copy what git tracks, once for each worker, with the data that tests look for beside the checkout."""
    listed = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True, check=True)
    folders: Queue[Path] = Queue()
    for number in range(count):
        folder = below / f'copy{number}'
        for name in listed.stdout.splitlines():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
        folders.put(folder)
    if (ROOT.parent / 'shared').is_dir():  # what some tests measure against, where it exists
        (below / 'shared').symlink_to(ROOT.parent / 'shared')
    return folders


def run(
    mutants: list[Mutant],
    controlled: list[str],
    workers: int,
    seconds: float,
    report: Callable[[list[Outcome]], None],
) -> list[Outcome]:
    """Judge faults until they or the time are at an end; hand what is known to ``report`` after each.

    Before that, the tests of the rooms ``controlled`` have to pass without a fault; ``seconds`` begin after it.
    """
    end = math.inf
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

        def sound(room: str) -> None:
            folder = folders.get()
            try:
                control(folder, room)
            finally:
                folders.put(folder)

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(sound, controlled))
            end = time.monotonic() + seconds
            return [outcome for outcome in pool.map(one, mutants) if outcome is not None]


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rooms', nargs='+', choices=ROOMS, default=list(ROOMS), help='where to put faults [all]')
    parser.add_argument('--per-room', type=int, default=20, help='faults in each room [20]')
    parser.add_argument('--seed', type=int, default=0, help='of the draw [0]')
    parser.add_argument('--workers', type=int, default=2, help='faults tried at the same time [2]')
    parser.add_argument('--minutes', type=float, default=30, help='start no further one after so long [30]')
    parser.add_argument('--no-control', action='store_true', help='do not run the tests without a fault first')
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
    before = json.loads(args.out.read_text(encoding='utf-8')) if args.out.exists() else {}
    remarks = before.get('remarks', {})
    same = before.get('machine') == machine and before.get('seed') == args.seed
    known = [from_json(outcome) for outcome in before['outcomes']] if same else []
    done = {outcome.mutant for outcome in known}

    def report(outcomes: list[Outcome]) -> None:
        """Write what is known: a run that is cut off keeps it."""
        # here, as the processes that test import this file, and no package but the copy's
        from mila_mm.files import write_whole

        rows = [asdict(outcome) for outcome in (*known, *outcomes)]
        document = dict(machine=machine, seed=args.seed, remarks=remarks, outcomes=rows)
        write_whole(args.out, json.dumps(document, indent=1) + '\n')

    controlled = [] if args.no_control else args.rooms
    left = [mutant for mutant in mutants if mutant not in done]
    outcomes = run(left, controlled, args.workers, 60 * args.minutes, report)
    report(outcomes)
    outcomes = [*known, *outcomes]
    caught = sum(outcome.status == 'caught' for outcome in outcomes)
    print(f'{caught} of {len(outcomes)} caught, {len(mutants) - len(outcomes)} not tried; {args.out}')


if __name__ == '__main__':
    main()
