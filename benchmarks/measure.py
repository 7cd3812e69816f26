"""What the benchmarks share: timing by CUDA events, peak memory, copy bandwidth, and a description of the machine."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mila_mm.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
REHEARSAL = os.environ.get('MILA_MM_REHEARSAL') == '1'
"""Whether the scripts are only tried, on a CPU: they go their whole way, and their figures mean nothing."""
DEVICE = 'cpu' if REHEARSAL else 'cuda'
RESULTS = ROOT / 'work_dirs' / 'rehearsal' if REHEARSAL else ROOT / 'benchmarks' / 'results'
TARGET_MS = float(os.environ.get('MILA_MM_BENCHMARK_MS', '400'))
"""How long a figure is measured for; a shorter time goes into the result."""
LEAST_RUNS, MOST_RUNS = 10, 200
FLUSH_BYTES = 256 * 2**20
"""More than any L2 cache: writing this between runs leaves nothing of the inputs in it."""


def require_cuda() -> None:
    """Exit with one line where there is no GPU, except in a rehearsal."""
    if not REHEARSAL and not torch.cuda.is_available():
        sys.exit('expected a CUDA device, got none: these figures mean nothing elsewhere')


def output(*command: str) -> str:
    """What a command prints, in the checkout; 'unknown' where it cannot run."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return 'unknown'


def commit() -> str:
    """The commit that is checked out, and whether code has changed since."""
    name = output('git', 'rev-parse', 'HEAD')
    changed = output('git', 'status', '--porcelain', '--', 'mila_mm', 'benchmarks/*.py')
    return name + (' with changes' if name != 'unknown' and changed else '')


def machine() -> dict[str, Any]:
    """GPU, driver, versions, commit and date, as they go into every result."""
    triton = 'none'
    if importlib.util.find_spec('triton') is not None:
        import triton as package

        triton = package.__version__
    gpu = {
        'gpu': 'none, a rehearsal' if REHEARSAL else torch.cuda.get_device_name(),
        'capability': 'none' if REHEARSAL else '.'.join(map(str, torch.cuda.get_device_capability())),
        'driver': 'none' if REHEARSAL else output('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'),
    }
    return {
        **gpu,
        'torch': torch.__version__,
        'cuda': torch.version.cuda,
        'triton': triton,
        'commit': commit(),
        'milliseconds_a_figure': TARGET_MS,
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
    }


def timed(function: Callable[[], object], flush: bool = True) -> dict[str, float]:
    """Median and quantiles of the time of one call, in milliseconds.

    Args:
        function: What to time; called a few times before, so that compilation is over.
        flush: Empty the L2 cache before every run, as the rest of a network would.

    Returns:
        median, q20, q80 and the number of runs.
    """
    if REHEARSAL:
        start = time.perf_counter()
        function()
        return dict.fromkeys(('median', 'q20', 'q80'), 1e3 * (time.perf_counter() - start)) | {'runs': 1}
    for _ in range(3):
        function()
    cache = torch.empty(FLUSH_BYTES if flush else 0, dtype=torch.int8, device='cuda')
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    runs = int(min(MOST_RUNS, max(LEAST_RUNS, TARGET_MS / max(start.elapsed_time(end), 1e-3))))
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(runs)]
    for before, after in events:
        cache.zero_()
        before.record()
        function()
        after.record()
    torch.cuda.synchronize()
    times = sorted(before.elapsed_time(after) for before, after in events)
    return {
        'median': statistics.median(times),
        'q20': times[int(0.2 * (runs - 1))],
        'q80': times[int(0.8 * (runs - 1))],
        'runs': runs,
    }


def timed_graph(function: Callable[[], object]) -> dict[str, float] | None:
    """:func:`timed` of the replay of a CUDA graph: without the launches' cost. None where it cannot be captured."""
    if REHEARSAL:
        function()
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError as error:
        print(f'    no CUDA graph: {str(error).splitlines()[0]}')
        torch.cuda.synchronize()
        return None
    return timed(graph.replay)


def kernels(function: Callable[[], object]) -> dict[str, float] | None:
    """How many kernels, copies and fills a call launches, and the milliseconds that they take on the device together.

    They run one after the other, so that is the device's own time; None in a rehearsal.
    """
    if REHEARSAL:
        function()
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    # An annotation of the host's that the profiler repeats on the device's line is no kernel.
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events = [event for event in events if not event.is_user_annotation]
    return {'count': len(events), 'ms': sum(event.time_range.elapsed_us() for event in events) / 1e3}


def kernel_count(function: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that a call launches; None in a rehearsal."""
    found = kernels(function)
    return None if found is None else int(found['count'])


def peak_bytes(function: Callable[[], object]) -> int:
    """Memory that a call allocates beyond what was there, at its peak; 0 in a rehearsal."""
    function()
    if REHEARSAL:
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_bytes() -> int:
    """Memory of this process now, on Linux."""
    pages = int(Path('/proc/self/statm').read_text(encoding='utf-8').split()[1])
    return pages * resource.getpagesize()


def grown_bytes(before: int) -> int:
    """Peak memory so far of CUDA's allocator; without a GPU, what this process grew by over ``before``."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def copy_bandwidth(gigabytes: float = 1.0) -> float:
    """Bytes read plus bytes written per second by a large device-to-device copy; 1e12 in a rehearsal."""
    if REHEARSAL:
        return 1e12
    size = int(gigabytes * 2**30)
    source = torch.empty(size, dtype=torch.int8, device='cuda').random_(0, 127)
    target = torch.empty_like(source)
    return 2 * size / (timed(lambda: target.copy_(source), flush=False)['median'] / 1e3)


def out_of_memory_as_none(function: Callable[[], Any]) -> Any:
    """The result of a call, or None where the GPU has too little memory for it."""
    try:
        return function()
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(document, indent=1) + '\n')


def save(path: Path, document: dict[str, Any]) -> None:
    """Write a result as JSON and say so."""
    write(path, document)
    print(f'wrote {path}')


class Result:
    """A result that is written after every row, so that an interruption costs the row in progress only.

    Args:
        path: The JSON.
        head: What it says beside its rows; ``machine`` is that of :func:`machine`.
        resume: Keep what a run on the same machine and commit has left in ``path``, and continue it.

    Raises:
        SystemExit: ``path`` holds rows of another machine or commit.
    """

    KEY = ('dtype', 'stage', 'arch', 'implementation', 'image', 'batch')
    """What tells rows apart, as far as they have it."""

    def __init__(self, path: Path, head: dict[str, Any], resume: bool = False) -> None:
        self.path = path
        self.document = {**head, 'rows': []}
        if resume and path.exists():
            before = json.loads(path.read_text(encoding='utf-8'))
            differs = [
                f'{name} {mine}, got {before["machine"].get(name)}'
                for name, mine in head['machine'].items()
                if name != 'date' and before['machine'].get(name) != mine
            ]
            if differs:
                sys.exit(f'--resume: {path}: expected {"; ".join(differs)}; leave --resume out to begin anew')
            self.document = before
        self._done = {self._key(row) for row in self.rows}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return self.document['rows']

    def _key(self, row: dict[str, Any]) -> str:
        return json.dumps([row.get(name) for name in self.KEY])

    def missing(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of ``rows`` that are not there yet."""
        return [row for row in rows if self._key(row) not in self._done]

    def add(self, row: dict[str, Any]) -> None:
        """Take a row in and write the file."""
        self._done.add(self._key(row))
        self.rows.append(row)
        write(self.path, self.document)


def add_resume(parser: argparse.ArgumentParser) -> None:
    """Add the option of :class:`Result`."""
    parser.add_argument(
        '--resume',
        action='store_true',
        help='measure only rows that --out lacks; those in it must be of this machine and commit',
    )


def write_docs(text: str, name: str, path: Path = ROOT / 'docs' / 'scale.md') -> None:
    """Replace what stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->`` in a page."""
    first, last = f'<!-- {name} -->', f'<!-- end of {name} -->'
    before, start, rest = path.read_text(encoding='utf-8').partition(first)
    _, end, after = rest.partition(last)
    if not start or not end:
        sys.exit(f'{path}: expected the marks {first} and {last}')
    path.write_text(f'{before}{first}\n{text}\n{last}{after}', encoding='utf-8')
    print(f'wrote {path}')
