"""What rank 0 decides or fails at reaches the others."""

import subprocess
import sys
from pathlib import Path

import pytest

from mila_mm.engine.runner.agree import from_rank_0
from mila_mm.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
import mila_mm
from torch import distributed
from mila_mm.engine.runner.agree import from_rank_0
from mila_mm.errors import UserError

rank = int(sys.argv[2])
distributed.init_process_group('gloo', init_method='file://' + sys.argv[1], rank=rank, world_size=2)

def decide(what):
    assert rank == 0
    if isinstance(what, Exception):
        raise what
    return what

print(from_rank_0(lambda: decide('chosen')))
for error in (UserError('wrong'), OSError('no such disk')):
    try:
        from_rank_0(lambda: decide(error))
    except Exception as caught:
        print(type(caught).__name__, caught)

from mila_mm.engine.runner.agree import Agreement

def unreachable(**options):
    if options.get('timeout') is not None and rank:
        raise RuntimeError('no route to host')
    return new_group(**options)

new_group = distributed.new_group
for make in (new_group, unreachable):
    distributed.new_group = make
    ranks = Agreement(None)
    work, number = ranks.begin(15 * rank)
    work.wait()
    print(ranks._group is None, int(number), ranks.least(rank + 3))
"""


def test_on_two_ranks(tmp_path) -> None:
    command = [sys.executable, '-c', PROGRAM, str(tmp_path / 'store')]
    ranks = [subprocess.Popen([*command, str(rank)], cwd=ROOT, text=True, stdout=subprocess.PIPE) for rank in range(2)]
    one, two = (
        [line for line in rank.communicate(timeout=200)[0].splitlines() if ' - mmengine - ' not in line]
        for rank in ranks
    )
    agreed = ['False 15 3', 'True 15 3']  # the second over the training's own group, since gloo failed on one rank
    assert one == ['chosen', 'UserError wrong', 'OSError no such disk', *agreed]
    assert two == ['chosen', 'UserError wrong', 'LostPeerError rank 0 failed: OSError: no such disk', *agreed]


def test_alone() -> None:
    assert from_rank_0(lambda: 3) == 3
    with pytest.raises(UserError, match='wrong'):
        from_rank_0(lambda: (_ for _ in ()).throw(UserError('wrong')))
