"""What rank 0 decides or fails at reaches the others."""

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from mila_mm.engine.runner import agree
from mila_mm.engine.runner.agree import Agreement, from_rank_0
from mila_mm.errors import UserError


def decide(what: Any) -> Any:
    assert distributed.get_rank() == 0
    if isinstance(what, Exception):
        raise what
    return what


def decisions() -> list[str]:
    said = [from_rank_0(lambda: decide('chosen'))]
    for error in (UserError('wrong'), OSError('no such disk')):
        try:
            from_rank_0(lambda error=error: decide(error))
        except (UserError, OSError) as caught:
            said.append(f'{type(caught).__name__} {caught}')
    return said


def agreement() -> list[Any]:
    """Whether it goes over the training's own group, and what comes of a greatest and a least number."""
    ranks, rank = Agreement(None), distributed.get_rank()
    work, number = ranks.begin(15 * rank)
    work.wait()
    return [ranks._group is None, int(number), ranks.least(rank + 3)]


def agreement_without_gloo() -> list[Any]:
    """On one rank gloo fails; the other waits for it as long as the probe may take."""
    new_group = distributed.new_group

    def unreachable(**options: Any) -> Any:
        if options.get('timeout') is not None and distributed.get_rank():
            raise RuntimeError('no route to host')
        return new_group(**options)

    distributed.new_group, agree._PROBE = unreachable, timedelta(seconds=2)
    return agreement()


def on_two_ranks(folder: Path, *jobs: Any) -> list[list[Any]]:
    """Call functions in two forks that are joined over gloo; return what each rank's have returned."""

    def run(rank: int) -> None:
        place = f'file://{folder / "store"}'
        distributed.init_process_group('gloo', init_method=place, rank=rank, world_size=2)
        torch.save([job() for job in jobs], folder / f'rank{rank}')
        distributed.barrier()
        os._exit(0)

    context = multiprocessing.get_context('fork')
    ranks = [context.Process(target=run, args=(rank,)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(200)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return [torch.load(folder / f'rank{rank}') for rank in range(2)]


def test_on_two_ranks(tmp_path) -> None:
    one, two = on_two_ranks(tmp_path, decisions, agreement, agreement_without_gloo)
    agreed = [[False, 15, 3], [True, 15, 3]]  # the second over the training's own group
    assert one == [['chosen', 'UserError wrong', 'OSError no such disk'], *agreed]
    assert two == [['chosen', 'UserError wrong', 'LostPeerError rank 0 failed: OSError: no such disk'], *agreed]


def test_alone() -> None:
    assert from_rank_0(lambda: 3) == 3
    with pytest.raises(UserError, match='wrong'):
        from_rank_0(lambda: (_ for _ in ()).throw(UserError('wrong')))
