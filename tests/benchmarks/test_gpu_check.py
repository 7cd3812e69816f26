"""``make gpu-check``: what hangs or fails costs its own step alone, and only what has run and passed counts."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {'gpu': 'some GPU', 'driver': '1', 'torch': '2', 'triton': '3', 'commit': 'c' * 40, 'date': '2026-01-01'}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a script of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f'benchmarks.{name}')


@pytest.fixture
def check(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run it with steps that are Python programs; returns the status, and how each step ended."""
    module = load('gpu_check')

    def check(
        programs: dict[str, str],
        *argv: str,
        needs: dict[str, tuple[str, ...]] | None = None,
        untimed: tuple[str, ...] = (),
    ) -> Any:
        made = [
            module.Step(
                name, ('-c', text), 5 if name == 'hangs' else 60, (needs or {}).get(name, ()), timed=name not in untimed
            )
            for name, text in programs.items()
        ]
        monkeypatch.setattr(module, 'steps', lambda out, everything: made)
        monkeypatch.setattr(module, 'machine', lambda environment: dict(MACHINE))
        monkeypatch.setattr(module, 'GRACE', 0.5)
        status = module.main(['--out', str(tmp_path), '--patience', '1', *argv])
        rows = json.loads((tmp_path / 'gpu_check.json').read_text())['rows']
        return status, {row['step']: row for row in rows}

    return check


def test_what_hangs_or_fails_costs_its_own_step(check, tmp_path, capfd) -> None:
    grandchild = tmp_path / 'grandchild'
    # It does not hear SIGTERM, and has a process of its own.
    stubborn = (
        'import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n'
        f'if os.fork() == 0: open({str(grandchild)!r}, "w").write(str(os.getpid()))\n'
        'else: print("waiting", flush=True)\ntime.sleep(600)'
    )
    programs = {'hangs': stubborn, 'fails': 'raise SystemExit("no such kernel")', 'works': 'print("well")'}
    status, rows = check(programs)
    assert status == 1
    assert {name: row['ended'] for name, row in rows.items()} == {
        'hangs': 'timed out',
        'fails': 'failed',
        'works': 'passed',
    }
    assert set(rows['hangs']['printed']) == {'waiting'}
    assert rows['fails']['printed'] == ['no such kernel'] and rows['fails']['status'] == 1
    pid = int(grandchild.read_text())
    deadline = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)
    printed = capfd.readouterr()
    assert 'fails: failed' in printed.out and 'got otherwise from hangs, fails' in printed.err


def _runs(pid: int) -> bool:
    """Whether a process is there and not only waits for its parent to ask after it."""
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_resume_does_again_what_has_not_passed(check, tmp_path) -> None:
    log = tmp_path / 'log'
    note = f'open({str(log)!r}, "a").write(NAME + "\\n")\n'
    programs = {name: note.replace('NAME', repr(name)) for name in ('first', 'second')}
    assert check({**programs, 'second': programs['second'] + 'raise SystemExit(3)'})[0] == 1
    status, rows = check(programs, '--resume')
    assert status == 0 and [row['ended'] for row in rows.values()] == ['passed', 'passed']
    assert log.read_text().split() == ['first', 'second', 'second']
    assert check(programs)[0] == 0
    assert log.read_text().split()[3:] == ['first', 'second'], 'without --resume it begins anew'


def test_what_measures_no_time_runs_beside_its_like_and_nothing_else(check, tmp_path) -> None:
    meet = (
        'import pathlib, time\nhere = pathlib.Path(FOLDER)\n(here / NAME).touch()\n'
        'while not (here / OTHER).exists(): time.sleep(0.05)\n'
    ).replace('FOLDER', repr(str(tmp_path)))
    programs = {
        'left': meet.replace('NAME', '"a"').replace('OTHER', '"b"'),
        'alone': '',
        'right': meet.replace('NAME', '"b"').replace('OTHER', '"a"'),
    }
    status, rows = check(programs, untimed=('left', 'right'))
    assert status == 0 and list(rows)[2] == 'alone', rows


def test_what_cannot_run_is_no_pass(check) -> None:
    programs = {'works': '', 'lacks': '', 'late': ''}
    status, rows = check(programs, needs={'lacks': ('no_such_package',)})
    assert status == 1 and rows['lacks']['ended'] == 'not run' and rows['lacks']['printed'] == ['needs no_such_package']
    status, rows = check(programs, '--budget', '1')
    assert status == 1 and {row['ended'] for row in rows.values()} == {'not run'}
    assert check(programs, '--only', 'works')[0] == 0
    with pytest.raises(SystemExit, match='2'):
        check(programs, '--only', 'walks')


def test_without_a_gpu_it_says_so(load) -> None:
    if torch.cuda.is_available():
        pytest.skip('for a machine without a GPU')
    with pytest.raises(SystemExit, match=r'needs a CUDA device \(--rehearse needs none\)'):
        load('gpu_check').machine({**os.environ, 'MILA_MM_REHEARSAL': '0'})


def test_every_step_is_what_the_scripts_take(load, tmp_path, monkeypatch) -> None:
    """A wrong option would be found on the GPU only: parse each command line."""
    module = load('gpu_check')
    listed = [*module.steps(tmp_path), *module.steps(tmp_path, True), *module.rehearsal(tmp_path)]
    assert {step.name for step in module.steps(tmp_path)} >= {'tests', 'train_check', 'backbone', 'detector_step'}

    class Parsed(Exception):
        pass

    for step in listed:
        if step.arguments[1] == 'pytest':
            assert all((ROOT / name).is_file() for name in step.arguments if name.endswith('.py'))
            continue
        script = load(step.arguments[1].removeprefix('benchmarks.'))

        def parse(self, args=None, namespace=None, original=script.argparse.ArgumentParser.parse_args):
            original(self, step.arguments[2:])  # noqa: B023
            raise Parsed

        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(script.argparse.ArgumentParser, 'parse_args', parse)
            patch.setattr(sys, 'argv', ['script'])
            script.main()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='the rehearsal of a CPU')
def test_rehearsal(load, tmp_path) -> None:
    steps = ['backbone', 'attention_op', 'block_fusions']
    assert load('gpu_check').main(['--rehearse', '--only', *steps, '--out', str(tmp_path)]) == 0
    rows = json.loads((tmp_path / 'backbone.json').read_text())['rows']
    assert {'ours', 'ours-graphs', 'eager', 'convnext-t'} <= {row['implementation'] for row in rows}
    assert all(row['correct'] and row['both']['median'] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason='the rehearsal of a CPU')
def test_training_by_the_tools(load, tmp_path) -> None:
    """Train, stop, resume and test on the CPU as on a GPU; fp16 is refused here."""
    assert load('gpu_check').main(['--rehearse', '--only', 'train_check', '--out', str(tmp_path)]) == 0
    rows = {row['case']: row for row in json.loads((tmp_path / 'train_check.json').read_text())['rows']}
    assert '--amp-dtype fp16 needs a GPU' in rows['fp16']['refused']
    assert len(rows['bf16']['losses']) == 4 and rows['bf16']['largest_difference'] < 1e-3


def test_a_run_that_lost_its_state_does_not_pass(load, tmp_path, monkeypatch) -> None:
    module = load('train_check')
    case = module.Case([], tmp_path, [], steps=6, limit=60)
    whole = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]

    def write(run: str, name: str, losses: dict[int, float]) -> None:
        log = tmp_path / run / name / 'vis_data' / 'scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text(''.join(json.dumps({'loss': loss, 'step': step}) + '\n' for step, loss in losses.items()))

    write('stopped', '1', {1: 6.0, 2: 5.0})
    monkeypatch.setattr(module.Case, 'start', lambda *_: None)
    monkeypatch.setattr(module.Case, 'stop', lambda *_: None)
    continued = iter([{3: 4.1, 4: 3.0, 5: 2.0, 6: 1.0}, {3: 6.0, 4: 5.0, 5: 4.0, 6: 3.0}])

    def wait(self, process: object, expected: int) -> None:
        for old in (tmp_path / 'stopped').glob('2/vis_data/*'):
            old.unlink()
            old.parent.rmdir()
            old.parent.parent.rmdir()
        write('stopped', '2', next(continued))

    monkeypatch.setattr(module.Case, 'wait', wait)
    assert module.check_continued(case, whole)['difference_after_the_stop'] == pytest.approx(0.025)
    (tmp_path / 'stopped/2/vis_data/scalars.json').write_text('')
    with pytest.raises(module.CheckFailed, match='expected the losses of the whole run'):
        module.check_continued(case, whole)


def test_a_call_that_hangs_ends(load, tmp_path) -> None:
    module = load('train_check')
    (tmp_path / 'tools').mkdir()
    (tmp_path / 'tools' / 'train.py').write_text('print("begun", flush=True)\nimport time\ntime.sleep(600)\n')
    case = module.Case(['--amp-dtype', 'fp16'], tmp_path / 'case', ['a=1'], steps=4, limit=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'ROOT', tmp_path)
        with pytest.raises(module.CheckFailed, match=r'expected an end within 3 s\nbegun'):
            case.wait(case.start('train.py', 'config'), 0)
