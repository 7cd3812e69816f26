"""Whether tools/train.py and tools/test.py do on this machine all that a run asks of them.

    python -m benchmarks.train_check                           # on a GPU: fp16, bf16, and bf16 from CUDA graphs
    python -m benchmarks.train_check --rehearse --out FILE     # on a CPU, in short; fp16 is refused there

The demo's Mask R-CNN with MILA nano, on generated shapes, each call in a process of its own: a run to its end with
validations, the same run stopped by SIGTERM and continued by ``--resume``, and a test of the last checkpoint. Losses
must be finite and follow those of the undisturbed run, weights must be saved in fp32, the test must find what the last
validation found, and no block may have fallen back to its modules. A call that hangs is ended after ``--limit``
seconds; the other cases go on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mila_mm  # noqa: F401 - before anything imports mmcv
from benchmarks import measure
from benchmarks.backbone_cpu import machine as cpu_machine
from mila_mm.datasets.shapes import write_shapes
from mila_mm.stopping import EXIT_REQUEUE

ROOT = measure.ROOT
CONFIG = ROOT / 'configs/demo/mask_rcnn_mila_nano_shapes.py'
CASES: dict[str, list[str]] = {
    'fp16': ['--amp-dtype', 'fp16'],
    'bf16': ['--amp-dtype', 'bf16'],
    'bf16-graphs': ['--amp-dtype', 'bf16', '--cfg-options', 'graph_backbone=True'],
}
SLOWER_WAYS = ('run module by module', 'slower form in plain PyTorch', 'runs without a CUDA graph')
"""What the package says where the fast way cannot be gone."""
EXIT_USER_ERROR = 2


class CheckFailed(Exception):
    """What a case expected and got."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`CheckFailed` unless the condition holds."""
    if not condition:
        raise CheckFailed(message)


@dataclass
class Case:
    """One way to train.

    Attributes:
        flags: Of tools/train.py.
        folder: For all that is written.
        options: Overrides of the config, beside those in ``flags``.
        steps: Of the whole run; a validation comes in its middle and at its end.
        limit: Seconds for each call.
    """

    flags: list[str]
    folder: Path
    options: list[str]
    steps: int
    limit: float

    def start(self, tool: str, *arguments: object) -> subprocess.Popen[str]:
        """Start a script of tools/; what it prints goes to a file of the folder."""
        flags = [*self.flags] if tool == 'train.py' else []
        own = flags[flags.index('--cfg-options') + 1 :] if '--cfg-options' in flags else []
        flags = flags[: flags.index('--cfg-options')] if own else flags
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = self.folder / f'{len(list(self.folder.glob("*.txt")))}_{tool}.txt'
        command = [*map(str, arguments), *flags, '--cfg-options', *self.options, *own]
        with self._log.open('w') as log:
            return subprocess.Popen(
                [sys.executable, str(ROOT / 'tools' / tool), *command],
                cwd=self.folder,
                env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_WAIT_POLICY': 'PASSIVE'},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def wait(self, process: subprocess.Popen[str], expected: int) -> None:
        """Wait for the end, which must come in time and with the status that is expected."""
        try:
            status = process.wait(self.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise CheckFailed(
                f'{self._log.name}: expected an end within {self.limit:.0f} s\n{self.printed()}'
            ) from None
        require(status == expected, f'{self._log.name}: expected status {expected}, got {status}\n{self.printed()}')

    def printed(self, lines: int = 25) -> str:
        """The end of what the last call printed."""
        return '\n'.join(self._log.read_text(errors='replace').splitlines()[-lines:])

    def records(self, run: str) -> list[dict[str, Any]]:
        """What the calls of a run have logged, in order."""
        logs = sorted((self.folder / run).glob('*/vis_data/scalars.json'))
        # The last line may be half written.
        lines = [line for log in logs for line in log.read_text().splitlines() if line.endswith('}')]
        return [json.loads(line) for line in lines]

    def losses(self, run: str) -> dict[int, float]:
        """Loss of each step; of a step that was done twice the last."""
        return {int(record['step']): record['loss'] for record in self.records(run) if 'loss' in record}

    def stop(self, process: subprocess.Popen[str], run: str, after: int) -> None:
        """Send SIGTERM once so many steps are done; the run must save and ask to be started again."""
        deadline = time.monotonic() + self.limit
        while len(self.losses(run)) < after and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        self.wait(process, EXIT_REQUEUE)

    def fallbacks(self) -> list[str]:
        """Lines of all logs that tell of a slower way."""
        texts = [path.read_text(errors='replace') for path in self.folder.glob('*.txt')]
        return [line for text in texts for line in text.splitlines() if any(words in line for words in SLOWER_WAYS)]


def check_whole(case: Case) -> dict[str, Any]:
    """A run to its end and its test; returns its figures."""
    case.wait(case.start('train.py', CONFIG, '--work-dir', case.folder / 'whole'), 0)
    records, losses = case.records('whole'), case.losses('whole')
    require(sorted(losses) == list(range(1, case.steps + 1)), f'expected {case.steps} steps, got {sorted(losses)}')
    require(all(map(math.isfinite, losses.values())), f'expected finite losses, got {losses}')
    validations = [record for record in records if 'coco/bbox_mAP' in record]
    require(len(validations) == 2, f'expected two validations, got {len(validations)}')
    checkpoint = case.folder / 'whole' / f'iter_{case.steps}.pth'
    require(checkpoint.is_file(), f'expected {checkpoint}, got none')
    saved = torch.load(checkpoint, map_location='cpu', weights_only=False)['state_dict']
    kinds = {str(value.dtype) for value in saved.values() if value.is_floating_point()}
    require(kinds == {'torch.float32'}, f'expected weights in fp32, got {kinds}')
    require(all(bool(value.isfinite().all()) for value in saved.values()), 'expected finite weights')

    case.wait(case.start('test.py', CONFIG, checkpoint, '--work-dir', case.folder / 'test'), 0)
    found = [path for path in (case.folder / 'test').glob('*/*.json') if path.parent.name != 'vis_data']
    require(len(found) == 1, f'expected the metrics of one test, got {len(found)}')
    metrics = json.loads(found[0].read_text())
    for key in ('coco/bbox_mAP', 'coco/segm_mAP'):
        seen, tested = validations[-1][key], metrics[key]
        require(abs(seen - tested) <= 0.02, f'{key}: expected what the validation found, {seen}, got {tested}')
    timed = [record['time'] for record in records if 'loss' in record][case.steps // 2 :]
    return {
        'losses': [round(losses[step], 5) for step in sorted(losses)],
        'metrics': {key: metrics[key] for key in ('coco/bbox_mAP', 'coco/segm_mAP')},
        'milliseconds_a_step': round(1e3 * statistics.median(timed), 1),
        'memory_mb': max((record.get('memory', 0) for record in records), default=0),
        'last_loss_scale': next((r['loss_scale'] for r in reversed(records) if 'loss_scale' in r), None),
    }


def check_continued(case: Case, whole: list[float]) -> dict[str, Any]:
    """The same run, stopped and continued: the losses of all steps, as near to those of the whole run as they are."""
    folder = case.folder / 'stopped'
    case.stop(case.start('train.py', CONFIG, '--work-dir', folder), 'stopped', case.steps // 4)
    before = len(case.losses('stopped'))
    require(case.steps // 4 <= before < case.steps, f'expected a stop on the way, got one after {before} steps')
    case.wait(case.start('train.py', CONFIG, '--work-dir', folder, '--resume'), 0)
    losses = case.losses('stopped')
    require(sorted(losses) == list(range(1, case.steps + 1)), f'expected {case.steps} steps, got {sorted(losses)}')
    continued = [losses[step] for step in sorted(losses)]
    steps = [int(record['step']) for record in case.records('stopped') if 'loss' in record]
    require(len(steps) == len(set(steps)), f'expected each step once, got {steps}')
    differences = [abs(a - b) / abs(b) for a, b in zip(continued, whole, strict=True)]
    # Sums in another order, on a GPU, part two runs slowly; lost state of an optimizer or loader does so at once.
    after = slice(before, before + max(1, case.steps // 6))
    worst = max(differences[after])
    require(worst <= 0.2, f'expected the losses of the whole run after the stop, got a difference of {worst:.1%}')
    return {
        'stopped_after': before,
        'largest_difference': float(f'{max(differences):.2g}'),
        'difference_after_the_stop': float(f'{worst:.2g}'),
    }


def check_refused(case: Case) -> dict[str, Any]:
    """fp16 on a CPU: one message that says what to do."""
    case.wait(case.start('train.py', CONFIG, '--work-dir', case.folder / 'whole'), EXIT_USER_ERROR)
    require('needs a GPU' in case.printed() and 'bf16' in case.printed(), f'expected why, got\n{case.printed()}')
    return {'refused': case.printed(2)}


def run_case(name: str, case: Case, rehearsal: bool) -> dict[str, Any]:
    """A row of the result, whatever happens."""
    start = time.perf_counter()
    row: dict[str, Any] = {'case': name, 'steps': case.steps, 'passed': False}
    try:
        if rehearsal and name == 'fp16':
            row |= check_refused(case)
        else:
            row |= check_whole(case)
            row |= check_continued(case, row['losses'])
            require(not case.fallbacks(), f'expected the fast way, got: {case.fallbacks()[:1]}')
        row['passed'] = True
    except CheckFailed as failure:
        row['failure'] = str(failure)
    row['seconds'] = round(time.perf_counter() - start, 1)
    said = row.get('failure') or ', '.join(
        f'{key} {row[key]}' for key in row if key not in ('losses', 'case', 'passed')
    )
    print(f'{name}: {"passed" if row["passed"] else "FAILED"}: {said}', flush=True)
    return row


def main() -> int:
    """Run all cases, print and save. Returns 1 where one has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', nargs='+', choices=CASES, help='[all; on a CPU fp16 and bf16]')
    parser.add_argument('--steps', type=int, default=60)
    parser.add_argument('--images', type=int, default=160, help='to train on; an eighth as many for validation')
    parser.add_argument('--size', type=int, default=96, help='of the images')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--limit', type=float, default=90, help='seconds for each call of a tool')
    parser.add_argument('--jobs', type=int, default=1, help='cases at a time: quicker, and their times mean less')
    parser.add_argument('--rehearse', action='store_true', help='on a CPU')
    parser.add_argument('--out', type=Path, default=measure.RESULTS / 'train_check.json')
    args = parser.parse_args()
    if args.rehearse == torch.cuda.is_available():
        sys.exit(f'expected {"no GPU with" if args.rehearse else "a GPU, or"} --rehearse')
    names = args.cases or [name for name in CASES if not args.rehearse or name in ('fp16', 'bf16')]
    with tempfile.TemporaryDirectory() as scratch:
        images = dict(num_train=args.images, num_val=max(1, args.images // 8), size=args.size, seed=0)
        data = write_shapes(Path(scratch) / 'shapes', **images)
        options = [f'{kind}_dataloader.dataset.data_root={data}' for kind in ('train', 'val', 'test')]
        options += [f'{kind}_evaluator.ann_file={data}/annotations/instances_val.json' for kind in ('val', 'test')]
        options += [f'train_cfg.max_iters={args.steps}', f'train_cfg.val_interval={args.steps // 2}']
        options += [f'train_dataloader.batch_size={args.batch}', 'default_hooks.logger.interval=1']
        options += [f'default_hooks.checkpoint.interval={args.steps}']
        cases = {name: Case(CASES[name], Path(scratch) / name, options, args.steps, args.limit) for name in names}
        with ThreadPoolExecutor(args.jobs) as pool:
            rows = list(pool.map(run_case, cases, cases.values(), itertools.repeat(args.rehearse)))
    machine = cpu_machine() if args.rehearse else measure.machine()
    measure.save(args.out, {'benchmark': 'train_check', 'machine': machine, 'jobs': args.jobs, 'rows': rows})
    return 0 if all(row['passed'] for row in rows) else 1


if __name__ == '__main__':
    sys.exit(main())
