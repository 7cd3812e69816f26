"""All that a GPU has to show of this package: ``make gpu-check``.

    python -m benchmarks.gpu_check                          # the quick form
    python -m benchmarks.gpu_check --all                    # all sizes, dtypes and programs of torch.compile
    python -m benchmarks.gpu_check --patience 1 --budget 470 --out DIR   # in eight minutes
    python -m benchmarks.gpu_check --resume                 # what has not passed yet
    python -m benchmarks.gpu_check --rehearse               # on a CPU: every step goes its way on little

The op and the backbone need torch, triton, numpy and pytest; peers need timm, detectors and tools/train.py OpenMMLab.
Each step is a process of its own with a limit of time, so that what hangs costs its own time alone; what matters most
comes first. Results are JSON files in ``--out``, each with GPU, driver, versions and date; ``gpu_check.json`` says how
each step ended and which goals of speed were met. The status is 0 only where all steps have run and passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measure, report

TESTS = (
    *('tests/ops/test_attention_gpu.py', 'tests/ops/test_attention_gpu_runtime.py', 'tests/ops/test_stencil_gpu.py'),
    *('tests/ops/test_gated_gpu.py', 'tests/ops/test_rows_gpu.py', 'tests/ops/test_down_gpu.py'),
    *('tests/ops/test_mlp_gpu.py', 'tests/ops/test_batch_norm_gpu.py', 'tests/nn/test_block_node_gpu.py'),
)
MORE_TESTS = ('tests/nn/test_cuda_graphs.py',)
"""Which need mmengine."""
OPENMMLAB = ('mmengine', 'mmdet')
PEERS = ('resnet50', 'swin-t', 'convnext-t')
SIZE, LARGE = '800x1280x2', '800x1280x8'
LEAST = 15.0
"""Seconds that a step is begun with at all."""
MACHINE = 'import json; from benchmarks import measure; print(json.dumps(measure.machine()))'
GRACE = 10.0
RUNNING: list[subprocess.Popen[str]] = []


@dataclass(frozen=True)
class Step:
    """A process with its limit.

    Attributes:
        name: Of the step.
        arguments: Of python.
        seconds: Limit for a machine that does nothing else.
        needs: Packages that it imports.
        rows: Whether it goes on where it was ended (``--resume``).
        timed: Whether it measures time, so that nothing else may run beside it.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    needs: tuple[str, ...] = ()
    rows: bool = False
    timed: bool = True


def installed(name: str) -> bool:
    """Whether a package can be found."""
    return importlib.util.find_spec(name) is not None


def tests() -> tuple[str, ...]:
    """Files with tests for a GPU, as far as they can be imported."""
    return (*TESTS, *(MORE_TESTS if installed('mmengine') else ()))


def steps(out: Path, everything: bool = False) -> list[Step]:
    """What is done on a GPU, in order; ``everything`` takes an hour or so and the quick form ten minutes."""

    def bench(name: str, seconds: float, *arguments: str, file: str | None = None, **more: Any) -> Step:
        words = ('-m', f'benchmarks.{name}', *arguments, '--out', str(out / f'{file or name}.json'))
        return Step(file or name, words, seconds * (10 if everything else 1), **more)

    workers = ('-n', '8') if installed('xdist') and (os.cpu_count() or 1) >= 16 else ()
    # Most of these steps' time is that of Triton's compiler, on cores that a larger host has.
    beside = {'timed': (os.cpu_count() or 1) < 16}
    correctness = Step(
        'tests', ('-m', 'pytest', '-q', '-m', 'gpu', *workers, *tests()), 180 * (3 if everything else 1), **beside
    )
    quick = () if everything else ('--dtypes', 'bf16')
    eager = () if everything else ('--implementations', 'ours', 'eager')
    sized = () if everything else ('--sizes', SIZE)
    peers = PEERS if installed('timm') else ()
    of_backbone = ('ours', 'ours-graphs', *peers, 'ours-fused', 'ours-modules', 'eager')
    compiled = ('--implementations', 'ours-compiled', 'compiled', '--resume')
    graphs = ('--backbones', 'MILA-T-graphs', 'MILA-T', 'ConvNeXt-T', '--runs', '8')
    others = ('--backbones', 'MILA-T', 'MILA-T-modules', 'ResNet-50', 'Swin-T', 'ConvNeXt-T', '--runs', '8')
    large = () if everything else ('--sizes', LARGE)
    return [
        correctness,
        bench('train_check', 240, '--jobs', '3', '--limit', '200', needs=OPENMMLAB, **beside),
        bench('backbone', 90, *quick, *sized, '--implementations', *of_backbone, rows=True),
        bench('detector_step', 90, *others, needs=(*OPENMMLAB, 'timm')),
        bench('detector_step', 60, *graphs, file='detector_step_graphs', needs=(*OPENMMLAB, 'timm')),
        bench('attention_op', 45, *quick, *large, *eager, rows=True),
        bench('block_fusions', 75, *quick, *large, *eager, rows=True),
        # Into the file of the others. Programs of torch.compile take minutes to make.
        Step('backbone_compiled', (*bench('backbone', 0, *quick, *sized, *compiled).arguments,), 300),
    ]


def rehearsal(out: Path) -> list[Step]:
    """The same on a CPU and on little."""

    def bench(name: str, *arguments: str, file: str | None = None, **more: Any) -> Step:
        words = ('-m', f'benchmarks.{name}', *arguments, '--out', str(out / f'{file or name}.json'))
        return Step(file or name, words, 600, **more)

    little = ('--dtypes', 'bf16', '--sizes', '64x96x1')
    narrow = ('--image', '64', '96', '--batch', '1', '--narrow', '--warmup', '1', '--runs', '1', '--threads', '1')
    of_train = ('--rehearse', '--steps', '4', '--images', '8', '--size', '64', '--batch', '2')
    of_backbone = ('ours', 'ours-graphs', 'ours-modules', 'eager', *(PEERS if installed('timm') else ()))
    return [
        Step('tests', ('-m', 'pytest', '--collect-only', '-q', '-m', 'gpu', *tests()), 300),
        bench('train_check', *of_train, '--limit', '300', needs=OPENMMLAB),
        bench('backbone', *little, '--backend', 'reference', '--implementations', *of_backbone, rows=True),
        bench('detector_step', *narrow, '--backbones', 'MILA-T', 'ConvNeXt-T', needs=(*OPENMMLAB, 'timm')),
        # tools/train.py refuses fp16 on a CPU; the same training without that check.
        bench('precision_curves', '--runs', 'fp16-0', '--steps', '2', needs=OPENMMLAB),
        # Ours has nothing to launch here.
        bench('attention_op', *little, '--stages', '1', '--implementations', 'eager', rows=True),
        bench('block_fusions', *little, '--stages', '1', '--implementations', 'eager', rows=True),
    ]


class Steps(measure.Result):
    """How the steps of a run have ended."""

    KEY = ('step',)

    def __init__(self, path: Path, machine: dict[str, Any], resume: bool) -> None:
        super().__init__(path, {'benchmark': 'gpu_check', 'machine': machine}, resume)
        # What has not passed is done again.
        self.document['rows'] = [row for row in self.rows if row['ended'] == 'passed']
        self._done = {self._key(row) for row in self.rows}


def end(process: subprocess.Popen[str]) -> None:
    """End a process with all that it has started."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def run(step: Step, seconds: float, resume: bool, environment: dict[str, str]) -> dict[str, Any]:
    """Run a step for so many seconds at most; returns its row."""
    again = ('--resume',) if resume and step.rows else ()
    command = [sys.executable, *step.arguments, *again]
    print(f'\n== {step.name}, at most {seconds:.0f} s: python {" ".join(command[1:])}', flush=True)
    start, last = time.monotonic(), deque[str](maxlen=40)
    process = subprocess.Popen(
        command,
        cwd=measure.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
        start_new_session=True,
    )

    def show() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end='', flush=True)
            last.append(line.rstrip())

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    RUNNING.append(process)
    try:
        status: int | None = process.wait(seconds)
    except subprocess.TimeoutExpired:
        status = None
    end(process)
    RUNNING.remove(process)
    reader.join(GRACE)
    row: dict[str, Any] = {
        'step': step.name,
        'command': ' '.join(['python', *step.arguments, *again]),
        'ended': 'passed' if status == 0 else 'timed out' if status is None else 'failed',
        'status': status,
        'seconds': round(time.monotonic() - start, 1),
        'limit': round(seconds),
    }
    return row if status == 0 else row | {'printed': list(last)}


def machine(environment: dict[str, str]) -> dict[str, Any]:
    """What the results belong to, asked in a process of its own: a driver may hang, too."""
    command = [sys.executable, '-c', MACHINE]
    try:
        asked = subprocess.run(
            command, cwd=measure.ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True
        )
    except subprocess.TimeoutExpired:
        sys.exit('gpu-check: expected the GPU to answer within two minutes, got nothing')
    except subprocess.CalledProcessError as error:
        sys.exit(f'gpu-check needs a CUDA device (--rehearse needs none), got:\n{error.stderr.strip()[-1000:]}')
    return json.loads(asked.stdout.splitlines()[-1])


def judged(out: Path) -> list[str]:
    """Each goal of speed that the results have figures for, as met or missed."""
    lines = []
    for name in ('backbone', 'detector_step', 'detector_step_graphs', 'attention_op', 'block_fusions'):
        path = out / f'{name}.json'
        if path.is_file():
            lines += [f'{name}: {line}' for line in report.goals(json.loads(path.read_text(encoding='utf-8')))]
    return lines


def go(waiting: list[Step], result: Steps, args: argparse.Namespace, environment: dict[str, str]) -> None:
    """Run steps, those that measure no time beside each other, and add how they ended."""
    start = time.monotonic()

    def begun(step: Step) -> dict[str, Any]:
        left = float('inf') if args.budget is None else args.budget - (time.monotonic() - start)
        lacking = [name for name in step.needs if not installed(name)]
        if lacking or left < LEAST:
            reason = f'needs {", ".join(lacking)}' if lacking else f'--budget {args.budget:.0f} is used up'
            return {'step': step.name, 'ended': 'not run', 'printed': [reason]}
        return run(step, min(step.seconds * args.patience, left), args.resume, environment)

    with ThreadPoolExecutor() as pool:
        try:
            for done in as_completed([pool.submit(begun, step) for step in waiting if not step.timed]):
                result.add(done.result())
            for step in waiting:
                if step.timed:
                    result.add(begun(step))
        finally:  # Ctrl-C as well
            for process in list(RUNNING):
                end(process)


def main(argv: list[str] | None = None) -> int:
    """Run the steps and say how they ended. Returns 1 unless all have passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--all', action='store_true', help='all sizes, dtypes and programs of torch.compile')
    parser.add_argument('--only', nargs='+', metavar='STEP', help='these steps')
    parser.add_argument('--list', action='store_true', help='print the steps and their commands')
    parser.add_argument('--patience', type=float, default=3.0, help='times the limits of a quick GPU and host [3]')
    parser.add_argument('--budget', type=float, metavar='SECONDS', help='for all steps together')
    parser.add_argument('--rehearse', action='store_true', help='on a CPU, on little')
    parser.add_argument('--out', type=Path, help='[benchmarks/results, in a rehearsal work_dirs/rehearsal]')
    measure.add_resume(parser)
    args = parser.parse_args(argv)
    start = time.monotonic()
    out = (args.out or measure.ROOT / ('work_dirs/rehearsal' if args.rehearse else 'benchmarks/results')).absolute()
    chosen = rehearsal(out) if args.rehearse else steps(out, args.all)
    if unknown := set(args.only or ()) - {step.name for step in chosen}:
        parser.error(f'--only: expected names of {", ".join(s.name for s in chosen)}, got {", ".join(sorted(unknown))}')
    chosen = [step for step in chosen if args.only is None or step.name in args.only]
    if args.list:
        print('\n'.join(f'{step.name} ({step.seconds:.0f} s): python {" ".join(step.arguments)}' for step in chosen))
        return 0
    environment = {**os.environ, 'PYTHONUNBUFFERED': '1', 'MILA_MM_REHEARSAL': '1' if args.rehearse else '0'}
    environment['MILA_MM_KERNEL_ERRORS'] = 'raise'  # a figure must not be that of what stands in for a kernel
    if not args.all:
        environment.setdefault('MILA_MM_BENCHMARK_MS', '120')
    result = Steps(out / 'gpu_check.json', machine(environment), args.resume)
    go([step for step in chosen if result.missing([{'step': step.name}])], result, args, environment)
    result.document['goals'] = judged(out)
    result.document['seconds'] = round(time.monotonic() - start, 1)
    measure.save(result.path, result.document)
    return summary(result.rows, result.document['goals'])


def summary(rows: list[dict[str, Any]], goals: list[str]) -> int:
    """Print how all ended."""
    print('\n' + '\n'.join(goals))
    for row in rows:
        why = '' if row['ended'] == 'passed' else f': {(row["printed"] or ["no output"])[-1]}'
        print(f'{row["step"]}: {row["ended"]}' + (f' after {row["seconds"]:.0f} s' if 'seconds' in row else '') + why)
    bad = [row['step'] for row in rows if row['ended'] != 'passed']
    if bad:
        print(f'gpu-check: expected all steps to pass, got otherwise from {", ".join(bad)}', file=sys.stderr)
    return 1 if bad else 0


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and end what is running
    sys.exit(main())
