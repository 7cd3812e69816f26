"""One run at a time in a work folder: who writes there says so in a file, and keeps saying so while it lives."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from mmengine.dist import is_main_process

from mila_mm.engine.runner.agree import from_rank_0
from mila_mm.errors import UserError, printable
from mila_mm.files import read_small

LEASE = 'lease.json'
BEAT = 10.0  # seconds between two signs of life
STALE = 60.0  # seconds without one after which a run on another machine is taken for dead
_MAX_BYTES = 10_000
_JOB_VARIABLES = ('SLURM_JOB_ID', 'PBS_JOBID', 'LSB_JOBID', 'JOB_ID')
_RESTART_VARIABLES = ('SLURM_RESTART_COUNT',)


@dataclass(frozen=True)
class Holder:
    """Who writes to a work folder.

    Attributes:
        host: Name of the machine.
        machine: What tells the machine, since when it runs, and the namespace that ``pid`` counts in.
        pid: The process, of rank 0.
        started: When the process was started, in the machine's ticks; process ids are used again.
        job: The scheduler's job, '' without one.
        restart: How often the scheduler has started the job again.
        time: Since when, for people.
        mark: What no other holder has.
    """

    host: str
    machine: str
    pid: int
    started: str
    job: str
    restart: str
    time: str
    mark: str

    @classmethod
    def this_process(cls) -> 'Holder':
        """Return who this process is."""
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_started(os.getpid()) or '',
            job=_first(_JOB_VARIABLES),
            restart=_first(_RESTART_VARIABLES),
            time=time.strftime('%Y-%m-%d %H:%M:%S %z'),
            mark=uuid.uuid4().hex,
        )

    @classmethod
    def read(cls, path: Path) -> 'Holder | None':
        """Read who holds a folder; None where nobody does or the file says nothing that can be understood."""
        try:
            content = json.loads(read_small(path, _MAX_BYTES))
            holder = cls(**content)
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        kinds = {name: int if name == 'pid' else str for name in cls.__dataclass_fields__}
        return holder if all(type(getattr(holder, name)) is kind for name, kind in kinds.items()) else None

    def is_dead(self) -> bool | None:
        """Tell whether the process has ended; None where that cannot be seen from here."""
        if self.machine and self.machine == _machine():
            return _started(self.pid) != self.started
        restarts = self.restart.isdigit(), _first(_RESTART_VARIABLES).isdigit()
        if (
            self.job
            and self.job == _first(_JOB_VARIABLES)
            and self.restart != _first(_RESTART_VARIABLES)
            and any(restarts)
        ):
            return True  # the scheduler has started this job again, after the end of what ran before
        return None

    def __str__(self) -> str:
        job = f', job {self.job}' if self.job else ''
        return printable(f'process {self.pid} on {self.host}{job}, since {self.time}')


@contextmanager
def leased(work_dir: str | Path) -> Iterator[None]:
    """Hold a work folder while the context lasts; all ranks call alike.

    Raises:
        UserError: If another run that lives holds it.
    """
    path = Path(work_dir).absolute() / LEASE
    holder = Holder.this_process()
    from_rank_0(lambda: acquire(path, holder))
    if not is_main_process():
        yield
        return
    over = threading.Event()
    threading.Thread(target=_beat, args=(path, over), name='lease', daemon=True).start()
    try:
        yield
    finally:
        over.set()
        release(path, holder)


def acquire(path: Path, holder: Holder) -> None:
    """Take a folder, from one that is dead if need be.

    A run on another machine is dead when it gives no sign of life for a minute, which is waited for: a job that was
    started again after its machine failed shall not end for it.

    Raises:
        UserError: If one that lives has it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'{path.parent} cannot be made: {error.strerror}') from error
    while not _create(path, holder):
        file = _file(path)
        if file is None:  # given back just now
            continue
        found, dead = Holder.read(path), None
        if found is not None:
            dead = found.is_dead()
        if dead is None:
            dead = not _gives_a_sign(path)
        if not dead:
            raise UserError(
                f'{path.parent} is in use by another run: {found or "unknown"}\n'
                f'Take another --work-dir, or end that run; if it is gone for certain, remove {path}.'
            )
        _remove_dead(path, found, file)


def release(path: Path, holder: Holder) -> None:
    """Give a folder back, unless another has taken it meanwhile."""
    if Holder.read(path) == holder:
        with contextlib.suppress(OSError):  # the disk is gone, and with it whoever could be kept out
            path.unlink(missing_ok=True)


def _create(path: Path, holder: Holder) -> bool:
    """Write the file whole, unless there is one."""
    draft = path.with_name(f'.{path.name}.{holder.mark}')
    try:
        draft.write_text(json.dumps(asdict(holder)) + '\n')
        try:
            os.link(draft, path)  # unlike a rename, refused where the name is taken
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with path.open('x') as file:
                    file.write(draft.read_text())
            except FileExistsError:
                return False
        return True
    except OSError as error:
        raise UserError(f'{path} cannot be written: {error.strerror}') from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _gives_a_sign(path: Path) -> bool:
    """Wait whether the file is touched by its holder, as long as a living one may take; it may be gone as well."""
    begin = _modified(path)
    last = _now(path.parent) - begin
    deadline = time.monotonic() + STALE - min(max(last, 0.0), STALE)
    while time.monotonic() < deadline:
        time.sleep(min(BEAT / 10, 1.0))
        if _modified(path) not in (begin, 0.0):
            return True
        if not path.exists():
            return False
    return False


def _remove_dead(path: Path, found: Holder | None, file: int | None) -> None:
    """Remove the file of a dead run, and not the one of another that has just done the same.

    While the dead one's file stands nobody creates another, and only who holds the lock removes it.
    """
    with _one_at_a_time(path.parent):
        if file is not None and _file(path) == file and Holder.read(path) == found:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(
                    f'{path} is in the way and cannot be removed ({error.strerror}): expected a file that says who '
                    'uses the folder\nRemove it, if no other run writes there.'
                ) from error


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder that ends with this process, where the file system knows such locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _file(path: Path) -> int | None:
    """Return which file bears a name, None where none does."""
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _beat(path: Path, over: threading.Event) -> None:
    while not over.wait(BEAT):
        with contextlib.suppress(OSError):  # the next one counts as well
            os.utime(path)


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _now(folder: Path) -> float:
    """Return the time of the file system, whose clock need not be this machine's."""
    probe = folder / f'.{LEASE}.{uuid.uuid4().hex}'
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> str:
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        return f'{socket.gethostname()} {boot} {Path("/proc/self/ns/pid").readlink()}'
    except OSError:
        return ''


def _started(pid: int) -> str | None:
    """Return when a process was started, None where there is none (or it has ended and nobody has asked how)."""
    try:
        words = Path(f'/proc/{pid}/stat').read_bytes().rpartition(b')')[2].split()
        return None if words[0] in (b'Z', b'X') else words[19].decode()
    except (OSError, IndexError):
        return None


def _first(names: tuple[str, ...]) -> str:
    return next((os.environ[name] for name in names if os.environ.get(name)), '')
