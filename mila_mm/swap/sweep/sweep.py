"""Swap every config of a library, and say per family of configs what became of them."""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path as FilePath
from typing import Any

from mila_mm.engine.config.load import load_config, resolve_config
from mila_mm.errors import UserError
from mila_mm.swap.api import plan_swap
from mila_mm.swap.light import SITE_PACKAGES, WITHOUT_BEARING, reason_of, sorted_config
from mila_mm.swap.result import SwapFailed

STATUSES = ('swapped', 'refused', 'failed')


@dataclass(frozen=True)
class Record:
    """What became of one config.

    Attributes:
        config: Its name.
        status: One of :data:`STATUSES`.
        reason: Why it was not swapped; for a swapped one what could not be run, or ''.
    """

    config: str
    status: str
    reason: str

    @property
    def family(self) -> str:
        """Library and folder."""
        scope, _, inner = self.config.partition('::')
        return f'{scope}/{inner.partition("/")[0]}'


def all_configs(scope: str) -> list[str]:
    """Return the names of all config files that come with a library.

    Args:
        scope: 'mmdet' or 'mmseg'.

    Returns:
        Names as ``mmdet::...``, sorted.

    Raises:
        UserError: If the library is not installed.
    """
    spec = importlib.util.find_spec(scope)
    if spec is None or spec.origin is None:
        raise UserError(f'--library {scope}: {scope} is not installed')
    root = FilePath(spec.origin).parent / '.mim' / 'configs'
    return [f'{scope}::{path.relative_to(root).as_posix()}' for path in sorted(root.rglob('*.py'))]


def sweep(names: list[str], arch: str = 'tiny', workers: int = 1) -> Iterator[Record]:
    """Swap many configs.

    Configs whose models differ in nothing that a backbone could tell (the number of classes, say) are swapped once.
    Where backbone and neck show that the heads get the same as before, the heads are not run.

    Args:
        arch: Size of MILA. Defaults to 'tiny'.
        workers: Processes. Defaults to 1.

    Yields:
        A record for each, not in order.
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_model_key(name), []).append(name)
    jobs = [(group[0], arch) for group in groups.values()]
    firsts = {group[0]: group for group in groups.values()}
    if workers == 1:
        outcomes: Iterator[Record] = map(_swap_one, jobs)
        yield from (Record(name, r.status, r.reason) for r in outcomes for name in firsts[r.config])
        return
    with get_context('spawn').Pool(workers, maxtasksperchild=100) as pool:
        for record in pool.imap_unordered(_swap_one, jobs, chunksize=8):
            yield from (Record(name, record.status, record.reason) for name in firsts[record.config])


def _model_key(name: str) -> str:
    try:
        cfg = load_config(name, import_custom_modules=False)
    except UserError:
        return name
    return repr((name.partition('::')[0], sorted_config(cfg._cfg_dict.to_dict()['model'], WITHOUT_BEARING)))


def _swap_one(job: tuple[str, str]) -> Record:
    name, arch = job
    gc.collect()  # modules with hooks are cycles; a sweep would pile them up
    try:
        result = plan_swap(name, arch, whole_models=False)
    except SwapFailed as error:
        return Record(name, 'failed', str(error))
    except UserError as error:
        return Record(name, 'refused', _general(str(error), name))
    except Exception as error:  # noqa: BLE001 - a crash on one config is a finding, not the end of the sweep
        return Record(name, 'failed', f'crash: {reason_of(error)}')
    return Record(name, 'swapped', next((u for u in result.unknowns if 'could not be run' in u), ''))


def _general(reason: str, name: str) -> str:
    """Return a reason without the names of config and installation, so that equal ones can be counted."""
    reason = reason.replace(f'config {name} ', 'the config ').replace(str(resolve_config(name)), name)
    return ' '.join(SITE_PACKAGES.sub('', reason).split())


def representatives(records: list[Record]) -> dict[str, str]:
    """Choose for each family a swapped config to train.

    Returns:
        Family to the name of its first swapped config; families without one are left out, and so are fragments.
    """
    chosen: dict[str, str] = {}
    for record in sorted(records, key=lambda r: (bool(r.reason), r.config)):
        if record.status == 'swapped' and not record.family.endswith('/_base_'):
            chosen.setdefault(record.family, record.config)
    return chosen


def step_in_process(script: FilePath, name: str, limit: float) -> dict[str, Any]:
    """Train and predict in a process of its own, with a time limit.

    Args:
        script: The command that runs ``--step NAME`` and prints JSON.
        limit: Seconds.

    Returns:
        'config', 'ok', 'seconds' and 'step' or 'reason'.
    """
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, str(script), '--step', name], capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {'config': name, 'ok': False, 'seconds': limit, 'reason': f'not done after {limit:.0f} s'}
    seconds = round(time.monotonic() - start, 1)
    if done.returncode == 0:
        return {'config': name, 'ok': True, 'seconds': seconds, 'step': json.loads(done.stdout.splitlines()[-1])}
    lines = done.stderr.strip().splitlines()
    return {'config': name, 'ok': False, 'seconds': seconds, 'reason': lines[-1] if lines else 'no message'}


def to_json(records: list[Record], steps: list[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
    """Return a sweep's results as JSON.

    Args:
        records: Of all configs.
        steps: Of the representatives.
        about: Versions, machine, date.

    Returns:
        The text; statuses by family, and the reason of each config that has one.
    """
    families: dict[str, Counter[str]] = {}
    for record in records:
        families.setdefault(record.family, Counter())[record.status] += 1
    content = {
        'about': dict(about),
        'total': dict(Counter(r.status for r in records)),
        'families': {family: dict(families[family]) for family in sorted(families)},
        'reasons': [asdict(r) for r in sorted(records, key=lambda r: r.config) if r.reason],
        'steps': sorted(steps, key=lambda s: s['config']),
    }
    return json.dumps(content, indent=1) + '\n'
