"""A NaN that one rank of a distributed job has made."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import gc
import sys
from types import SimpleNamespace

import mila_mm
import torch
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from torch import distributed, nn

from mila_mm.engine.hooks.nonfinite import NonFiniteHook
from mila_mm.errors import UserError


class Log(nn.Module):
    def forward(self, x):
        return x.log()


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.scale, self.log = nn.Linear(1, 1, bias=False), Log()
        nn.init.ones_(self.scale.weight)

    def forward(self, x, mode):
        return dict(loss=self.log(self.scale(x)).sum())


rank = int(sys.argv[2])
distributed.init_process_group('gloo', init_method='file://' + sys.argv[1], rank=rank, world_size=2)
model = MMDistributedDataParallel(Model())
wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
runner = SimpleNamespace(model=model, optim_wrapper=wrapper, iter=0)
hook = NonFiniteHook()
hook.before_train(runner)
for sign in (1.0, -1.0):
    batch = [torch.full((2, 1), 2.0 if rank == 0 else 2.0 * sign)]
    hook.before_train_iter(runner, 0, batch)
    try:
        model.train_step(batch, wrapper)
        print('stepped')
    except UserError as error:
        print(error)
    runner.iter += 1
# What still holds gloo's threads while the interpreter ends would abort the process.
del model, wrapper, runner, hook
gc.collect()
distributed.destroy_process_group()
"""


def test_all_ranks_end_and_name_the_place_and_the_rank(tmp_path) -> None:
    command = [sys.executable, '-c', PROGRAM, str(tmp_path / 'store')]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    ranks = [subprocess.Popen([*command, str(rank)], cwd=ROOT, text=True, **pipes) for rank in range(2)]
    for rank in ranks:
        out, err = rank.communicate(timeout=200)
        assert rank.returncode == 0, err
        assert out.startswith('stepped\n--debug-nonfinite: the loss is not finite in iteration 2; ')
        assert 'it comes from log (Log, in the forward)' in out
        assert out.rstrip().endswith('on rank 1')
