"""A training in a process of its own, which says where it is and can be killed there."""

import contextlib
import importlib.util
import multiprocessing.util
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
KINDS = ('step', 'eval', 'write')
LIMIT = 900  # seconds that a run may take, on a machine with much else to do


def load_train() -> ModuleType:
    """Import tools/train.py."""
    spec = importlib.util.spec_from_file_location('train_tool', ROOT / 'tools/train.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def instrument(telling: int, hearing: int) -> None:
    """Let this process announce steps, evaluations and half-written files, a letter each, and wait for an answer.

    Args:
        telling: Where to announce.
        hearing: Where the answer comes from.
    """
    from mmengine.model import BaseModel

    from mila_mm.engine.hooks import checkpoint as checkpointing

    def announce(kind: str) -> None:
        os.write(telling, kind[0].encode())
        os.read(hearing, 1)

    def announcing(method: Any, kind: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            announce(kind)
            return method(*args, **kwargs)

        return call

    def fill(file: Any, content: bytes) -> None:
        middle = len(content) // 2
        file.write(content[:middle])
        file.flush()
        announce('write')
        file.write(content[middle:])

    BaseModel.train_step = announcing(BaseModel.train_step, 'step')
    BaseModel.val_step = announcing(BaseModel.val_step, 'eval')
    checkpointing._fill = fill


def child(argv: list[str], pipes: tuple[int, int], announce: bool) -> NoReturn:
    """Train in this process and end it.

    Args:
        argv: Arguments of tools/train.py.
        pipes: As for :func:`instrument`.
        announce: Whether to call that.
    """
    from mila_mm import cli

    if announce:
        instrument(*pipes)
    status = cli.execute(load_train().main, argv)
    sys.stdout.flush()
    sys.stderr.flush()
    multiprocessing.util._exit_function()  # what an interpreter does at its end: the workers are told to go
    os._exit(status)


@dataclass
class Ended:
    """How a run ended: its status (negative: the signal), and what it said."""

    status: int
    out: str
    err: str


@dataclass
class Run:
    """A training in a process of its own.

    Attributes:
        pid: The process, leader of a session.
        hearing: Where its announcements come from.
        telling: Where it waits for the answers.
        log: File that stdout goes to; stderr goes to one beside it.
    """

    pid: int
    hearing: int
    telling: int
    log: Path
    deadline: float = field(default_factory=lambda: time.monotonic() + LIMIT)

    def announcements(self) -> Iterator[str]:
        """Yield announcements until the process has ended; it goes on when the next one is asked for."""
        while True:
            if not select.select([self.hearing], [], [], max(self.deadline - time.monotonic(), 0))[0]:
                self.kill()
                check(False, f'{self.log}: still running after {LIMIT} s')
            letter = os.read(self.hearing, 1).decode()
            if not letter:
                return
            yield next(kind for kind in KINDS if kind[0] == letter)
            self.go_on()

    def go_on(self) -> None:
        """Answer an announcement."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.telling, b'.')

    def kill(self) -> None:
        """End it and its dataloader's workers as a power failure would."""
        os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        """Wait for its end."""
        for _ in self.announcements():
            pass
        os.close(self.hearing)
        os.close(self.telling)
        _, status = os.waitpid(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), self.log.read_text(), self.log.with_suffix('.err').read_text())


def start(argv: list[str], log: Path, launch: str, announce: bool = True) -> Run:
    """Start a training.

    Args:
        argv: Arguments of tools/train.py.
        log: File for stdout.
        launch: 'exec' for a fresh interpreter, 'fork' for a copy of this one, which has imported everything.
        announce: Whether it announces where it is.

    Returns:
        The run.
    """
    hearing, writing = os.pipe()
    reading, telling = os.pipe()
    pipes = writing, reading
    if launch == 'exec':
        with log.open('wb') as out, log.with_suffix('.err').open('wb') as err:
            command = [sys.executable, __file__, *map(str, (*pipes, int(announce))), *argv]
            process = subprocess.Popen(command, stdout=out, stderr=err, pass_fds=pipes, start_new_session=True)
        process.returncode = 0  # waited for by its number
        pid = process.pid
    else:
        sys.stdout.flush()
        pid = os.fork()
    if pid:
        for descriptor in pipes:
            os.close(descriptor)
        return Run(pid, hearing, telling, log)
    os.setsid()
    for descriptor in (hearing, telling):
        os.close(descriptor)
    for path, stream in ((log, 1), (log.with_suffix('.err'), 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    child(argv, pipes, announce)


def check(holds: bool, message: str) -> None:
    """End with a message unless something holds."""
    if not holds:
        sys.exit(f'FAILED: {message}')


def say(text: str) -> None:
    """Print a line of the report."""
    print(f'{time.strftime("%H:%M:%S")} {text}', flush=True)  # noqa: T201


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    child(sys.argv[4:], (int(sys.argv[1]), int(sys.argv[2])), sys.argv[3] == '1')
