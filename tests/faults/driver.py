"""Kill a training at random moments, damage what it saved, fill its disk, and compare what comes of it in the end.

    python tests/faults/driver.py --kills 40            # make faults
    python tests/faults/driver.py --kills 3 --launch fork --task det

A run of ``tools/train.py`` on a tiny config is killed with SIGKILL, started again with ``--resume``, and so on. The
final checkpoint must equal, bit for bit, that of a run which nothing disturbed. So that each kind of moment is
hit and not hoped for, the run tells this driver through a pipe where it is and waits for the word to go on, also
when half of a file is written. All of that is done to the run from here: the product has no switch for it.
"""

import argparse
import contextlib
import importlib
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import write_config
from results import record
from running import KINDS, ROOT, Ended, Run, check, say, start

ORDER = ('step', 'write', 'eval', 'write')  # half of the kills hit the writing of a file
DAMAGE = ('truncated', 'empty', 'garbage', 'one bit', 'header')
# What differs between two runs that do the same; the dataloader's own generator counts how often it was started, and
# nothing is drawn from it that a sample depends on.
VOLATILE = {
    'run_id',
    'starts',
    'time',
    'data_time',
    'eta',
    'memory',
    'experiment_name',
    'cfg',
    'last_ckpt',
    'best_ckpt',
    'loader',
}


@dataclass
class Faults:
    """The fault tests of one config.

    Attributes:
        folder: Where everything is written.
        config: The config.
        launch: As for :func:`start`.
        seed: What the moments follow from.
        hits: How often each kind of moment was hit.
    """

    folder: Path
    config: Path
    launch: str
    seed: int = 0
    hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def start(self, work_dir: Path, *options: str, announce: bool = True) -> Run:
        """Start a training in a work folder."""
        argv = [str(self.config), '--work-dir', str(work_dir), *options]
        return start(argv, self.folder / f'{work_dir.name}.log', self.launch, announce)

    def finish(self, work_dir: Path, *options: str) -> Ended:
        """Train to the end, undisturbed."""
        ended = self.start(work_dir, *options, announce=False).wait()
        check(ended.status == 0, f'{work_dir.name}: ended with {ended.status}: {ended.err[-2000:]}')
        return ended

    def reference(self) -> Path:
        """Train without any disturbance."""
        self.finish(self.folder / 'reference')
        return self.folder / 'reference'

    def kills(self, count: int) -> None:
        """Kill a run again and again, each time in the next kind of moment, then let it finish."""
        chance = random.Random(self.seed)
        work_dir = self.folder / 'killed'
        saved = False
        for number in range(count):
            kind = ORDER[number % len(ORDER)]
            self.kill_once(work_dir, kind, chance, resume=number > 0)
            unfinished = list(work_dir.rglob('.*.unfinished'))
            # the others may have come as far as the next writing before the kill
            check(bool(unfinished) or kind != 'write', f'kill {number} in {kind}: nothing was half written')
            found = newest(work_dir)
            check(found is not None or not saved, f'kill {number} in {kind}: no readable checkpoint is left')
            saved = found is not None
            say(f'kill {number + 1:2d} in {kind:5s}: newest readable {found.name if found else "none"}')
        ended = self.finish(work_dir, '--resume')
        check('--resume skips' not in ended.out, 'a kill has left a checkpoint that cannot be read')
        check(not list(work_dir.rglob('.*.unfinished')), 'what kills left half written is still there')
        compare(self.folder / 'reference', work_dir)

    def kill_once(self, work_dir: Path, kind: str, chance: random.Random, resume: bool) -> None:
        """Start, wait for some moments of a kind, kill in or shortly after the last of them."""
        run = self.start(work_dir, *(['--resume'] if resume else []))
        wanted = chance.randint(1, 2 if kind == 'eval' else 4)
        heard: list[str] = []
        for announced in run.announcements():
            heard.append(announced)
            if heard.count(kind) == wanted:
                if kind != 'write':  # there it stays until the end, with half a file
                    run.go_on()
                    time.sleep(chance.uniform(0, 0.1))
                run.kill()
                break
        ended = run.wait()
        check(ended.status == -signal.SIGKILL, f'ended with {ended.status} before it was killed: {ended.err[-2000:]}')
        self.hits[kind] += 1

    def signals(self) -> None:
        """Stop a run politely: in a step, in an evaluation, and by the keyboard; then let it finish."""
        work_dir = self.folder / 'stopped'
        moments = (('step', 3, signal.SIGTERM, 75), ('eval', 2, signal.SIGUSR1, 75), ('step', 1, signal.SIGINT, 130))
        for number, (kind, count, signum, status) in enumerate(moments):
            run = self.start(work_dir, *(['--resume'] if number else []))
            heard = 0
            for announced in run.announcements():
                heard += announced == kind
                if heard == count:
                    os.killpg(run.pid, signum)  # as a scheduler or a terminal does, to the dataloader's workers as well
                    heard += 1
            ended = run.wait()
            check(ended.status == status, f'{signum.name}: ended with {ended.status}: {ended.err[-2000:]}')
            said = f'stopped by {signum.name}: --resume continues from'
            check(said in ended.err and 'Traceback' not in ended.err, f'{signum.name}: {ended.err[-2000:]}')
            say(f'{signum.name} in {kind}: status {status}, saved {newest(work_dir).name}')
        self.finish(work_dir, '--resume')
        compare(self.folder / 'reference', work_dir)

    def damage(self, kinds: Sequence[str]) -> None:
        """Damage the newest checkpoint of a finished run: the one before it is taken, and leads to the same."""
        for kind in kinds:
            work_dir = Path(shutil.copytree(self.folder / 'reference', self.folder / kind.replace(' ', '_')))
            path = newest(work_dir)
            content = bytearray(path.read_bytes())
            if kind == 'one bit':
                content[middle_of_the_largest_record(path)] ^= 1  # between records there is padding, which nobody reads
            if kind == 'header':
                content[30] ^= 0x80  # of the first record's name: no text any more
            bad = {'truncated': content[: len(content) * 2 // 3], 'empty': b'', 'garbage': os.urandom(len(content))}
            path.write_bytes(bad.get(kind, content))
            ended = self.finish(work_dir, '--resume')
            check(f'--resume skips {path}' in ended.out, f'{kind}: does not say that {path.name} was skipped')
            compare(self.folder / 'reference', work_dir)
            say(f'newest checkpoint {kind}: skipped, and the run before it continued')

    def nothing_readable(self) -> None:
        """With no checkpoint that can be read, nothing may be trained or touched."""
        work_dir = self.folder / 'unreadable'
        work_dir.mkdir()
        (work_dir / 'iter_4.pth').write_bytes(b'')
        (work_dir / 'iter_2.pth').write_bytes(b'x' * 100)
        ended = self.start(work_dir, '--resume', announce=False).wait()
        check(ended.status == 2 and 'none of the 2 checkpoints' in ended.err, f'unreadable: {ended.status} {ended.err}')
        left = sorted((path.name, path.stat().st_size) for path in work_dir.iterdir())
        check(left == [('iter_2.pth', 100), ('iter_4.pth', 0)], f'unreadable: touched, now {left}')
        say('no readable checkpoint: refused, nothing touched')

    def full_disk(self, tmpfs: bool) -> None:
        """Let there be no room for the second checkpoint, then make room."""
        work_dir = self.folder / ('tmpfs' if tmpfs else 'full')
        size = newest(self.folder / 'reference').stat().st_size
        with mounted(work_dir, size * 3 // 2) if tmpfs else contextlib.nullcontext():
            run = self.start(work_dir)
            if not tmpfs:
                limit_at_second_checkpoint(run, work_dir, size // 4)
            ended = run.wait()
            check(ended.status == 2, f'full disk: ended with {ended.status}: {ended.err[-2000:]}')
            check('cannot be written' in ended.err and 'Traceback' not in ended.err, f'full disk: says {ended.err!r}')
            check(not list(work_dir.rglob('.*.unfinished')), 'full disk: a half-written file is left')
            found = newest(work_dir)
            check(found is not None, 'full disk: the checkpoint before is gone')
            say(
                f'full disk ({"tmpfs" if tmpfs else "file size limit"}): {ended.err.splitlines()[0].split("/")[-1]}; '
                f'{found.name} is whole'
            )
            again = Path(shutil.copytree(work_dir, self.folder / f'{work_dir.name}_again'))
        self.finish(again, '--resume')
        compare(self.folder / 'reference', again)


def middle_of_the_largest_record(path: Path) -> int:
    """Return where in a checkpoint a byte of its largest tensor stands."""
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    content = path.read_bytes()
    # the header of a record: 30 bytes, the last four of which tell how long the name and what follows it are
    name, extra = struct.unpack('<HH', content[record.header_offset + 26 : record.header_offset + 30])
    return record.header_offset + 30 + name + extra + record.file_size // 2


def limit_at_second_checkpoint(run: Run, work_dir: Path, size: int) -> None:
    """Forbid a process to make files larger than ``size`` while it writes its second checkpoint."""
    for announced in run.announcements():
        if announced == 'write' and newest(work_dir) is not None and list(work_dir.glob('.iter_*.unfinished')):
            resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (size, size))
            run.go_on()
            return


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """Mount a file system in memory, which only root may do."""
    folder.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(['umount', '-l', str(folder)], check=True)


def may_mount(folder: Path) -> bool:
    """Tell whether this process may mount file systems."""
    folder.mkdir()
    done = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'tmpfs', str(folder)], capture_output=True, check=False
    )
    if done.returncode == 0:
        subprocess.run(['umount', str(folder)], check=True)
    folder.rmdir()
    return done.returncode == 0


def newest(work_dir: Path) -> Path | None:
    """Return the newest readable checkpoint."""
    from mmengine.config import Config

    from mila_mm.engine.runner.find_checkpoint import candidates, newest_readable

    return newest_readable(candidates(Config(dict(work_dir=str(work_dir)))))[0]


def compare(expected: Path, got: Path) -> None:
    """Check that two runs ended with the same weights, optimizer, random state, history and best checkpoint."""
    import torch

    for name in [newest(expected).name, *(path.name for path in expected.glob('best_*.pth'))]:
        check((got / name).is_file(), f'{got.name}: has no {name}')
        one, two = (torch.load(folder / name, weights_only=False) for folder in (expected, got))
        different = sorted(differences(one, two))
        check(not different, f'{got.name}/{name} differs from the undisturbed run in {different[:10]}')
    check(
        [p.name for p in sorted(expected.glob('*.pth'))] == [p.name for p in sorted(got.glob('*.pth'))],
        f'{got.name}: other checkpoints are left than in the undisturbed run',
    )


def differences(one: Any, two: Any, key: str = '') -> Iterator[str]:
    """Yield where two checkpoints differ."""
    if key.rpartition('.')[2].rpartition('/')[2] in VOLATILE:
        return
    if type(one) is type(two) and isinstance(one, dict) and one.keys() == two.keys():
        for name in one:
            yield from differences(one[name], two[name], f'{key}.{name}')
    elif type(one) is type(two) and isinstance(one, (list, tuple)) and len(one) == len(two):
        for index, (a, b) in enumerate(zip(one, two, strict=True)):
            yield from differences(a, b, f'{key}[{index}]')
    elif bits(one) != bits(two):
        yield key


def bits(value: Any) -> Any:
    """Return something that is equal for two values only where they are so bit for bit."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        value = value.numpy()
    elif type(value).__name__ == 'HistoryBuffer':
        value = value.data[0]
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return type(value), repr(value)


def test_faults(args: argparse.Namespace, task: str, kills: int) -> None:
    """Run all fault tests of a task."""
    folder = Path(args.work_dir).absolute() / task
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    faults = Faults(folder, write_config(folder, task, args.iterations), args.launch, args.seed)
    begin = time.perf_counter()
    faults.reference()
    say(f'{task}: undisturbed run of {args.iterations} iterations: {time.perf_counter() - begin:.0f} s')
    faults.kills(kills)
    hits = ', '.join(f'{count} in {kind}' for kind, count in faults.hits.items())
    say(f'{task}: killed {kills} times ({hits}); the end equals the undisturbed run bit for bit')
    if args.keep:
        record(f'{task}, {args.iterations} iterations', kind='end', disturbed=f'killed {kills} times: {hits}')
    if args.kills_only:
        return
    faults.signals()
    faults.damage(args.damage)
    faults.nothing_readable()
    faults.full_disk(tmpfs=False)
    if args.tmpfs and may_mount(folder / 'mount'):
        faults.full_disk(tmpfs=True)
    elif args.tmpfs:
        say('no tmpfs: this process may not mount; the limit on the size of files stands for it')


def main() -> None:
    """Run as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=40)
    parser.add_argument('--task', choices=['det', 'seg'], nargs='+', default=['det', 'seg'])
    parser.add_argument('--iterations', type=int, default=100, help='a multiple of 5')
    parser.add_argument('--work-dir', default='work_dirs/faults')
    parser.add_argument('--launch', choices=['exec', 'fork'], default='exec')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--kills-only', action='store_true', help='no signals, no damaged files, no full disk')
    parser.add_argument('--damage', choices=DAMAGE, nargs='+', default=DAMAGE)
    parser.add_argument('--keep', action='store_true', help='put what is seen into benchmarks/results/no_run_lost.json')
    parser.add_argument('--tmpfs', action='store_true', help='also fill a small tmpfs, where mounting is allowed')
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    if args.launch == 'fork':
        for name in ('mila_mm', 'mila_mm.engine', 'mmdet.datasets', 'mmdet.models', 'mmseg.datasets', 'mmseg.models'):
            importlib.import_module(name)
    begin = time.perf_counter()
    for index, task in enumerate(args.task):  # the first task gets the odd one
        share = args.kills // len(args.task) + (index < args.kills % len(args.task))
        test_faults(args, task, share)
    say(f'all held, {time.perf_counter() - begin:.0f} s')


if __name__ == '__main__':
    main()
