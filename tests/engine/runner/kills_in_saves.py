"""Kills of a run of two ranks while it writes pieces."""

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs_on_ranks import COUNTER, FSDP, on_ranks, same, start_ranks, trained
from mmengine.config import Config
from torch import distributed

from mila_mm.engine.runner import sharded_checkpoint
from mila_mm.engine.runner.find_checkpoint import candidates, newest_readable
from mila_mm.weights.file.sharded import ShardWriter, read_state, read_whole

MOMENTS = ('before', 'rank 0', 'rank 1', 'index', 'whole')


def stalled(marker: Path, moment: str, in_background: bool, run: Path) -> None:
    """Train and save at each iteration, and stand still in the second save of this process, at a moment of it."""
    rank, calls = distributed.get_rank(), itertools.count(1)

    def standing(method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == 2:
                marker.touch()
                time.sleep(100)
            return method(*args, **kwargs)

        return call

    if moment == 'before':
        ShardWriter.set_up_storage_writer = standing(ShardWriter.set_up_storage_writer)
    elif moment == f'rank {rank}':
        ShardWriter.write_data = standing(ShardWriter.write_data)
    elif moment == 'index':
        ShardWriter.finish = standing(ShardWriter.finish)
    elif moment == 'whole':
        sharded_checkpoint._put_in_place = standing(sharded_checkpoint._put_in_place)
    saving = dict(interval=1, sharded=True, in_background=in_background, max_keep_ckpts=2)
    trained(run, 20, FSDP, resume=True, checkpoint=saving)


def kill_in_the_save(folder: Path, moment: str, in_background: bool, run: Path) -> None:
    marker = folder / f'marker{next(COUNTER)}'
    processes = start_ranks(2, folder, stalled, marker, moment, in_background, run)[0]
    deadline = time.monotonic() + 120
    while not marker.exists():
        assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.2))
    for process in processes:
        process.kill()
        process.join()


def kill_saves(folder: Path, count: int) -> None:
    """Kill a run of two ranks in its saves, at one moment after the other, with every second one in the background.

    The end must equal that of an undisturbed run bit for bit.
    """
    run, seen = folder / 'run', 0
    for number in range(count):
        kill_in_the_save(folder, MOMENTS[(2 * number) % 5], number % 2 == 1, run)
        assert [path.name for path in run.glob('.iter_*.unfinished')], 'the kill hit the saving'
        found, skipped = newest_readable(candidates(Config(dict(work_dir=str(run)))))
        assert found is not None and not skipped, skipped
        done = read_state(found)['meta']['iter']
        assert done > seen, 'each start has come further'
        seen = done
    end = dict(checkpoint=dict(interval=1, sharded=True, max_keep_ckpts=2))
    on_ranks(2, folder, trained, run, seen + 2, FSDP, resume=True, **end)
    on_ranks(2, folder, trained, folder / 'straight', seen + 2, FSDP, **end)
    names = {path.name for path in (folder / 'straight').glob('*.pth')}
    assert {path.name for path in run.glob('*.pth')} == names == {f'iter_{seen + 1}.pth', f'iter_{seen + 2}.pth'}
    assert not list(run.glob('.*.unfinished'))
    one, two = (read_whole(each / f'iter_{seen + 2}.pth') for each in (run, folder / 'straight'))
    for key in ('state_dict', 'optimizer', 'param_schedulers'):
        assert same(one[key], two[key]), key
