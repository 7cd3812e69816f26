"""A sharded checkpoint is compared with the model before a run continues from it."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn
from torch.distributed import checkpoint as dcp

from mila_mm.engine.runner.find_checkpoint import candidates, newest_readable
from mila_mm.weights.file.sharded import ShardWriter


def write(folder: Path, iteration: int, state: dict[str, torch.Tensor]) -> None:
    path = folder / f'iter_{iteration}.pth'
    path.mkdir()
    tensors = {f'model.{name}': value for name, value in state.items()}
    dcp.save(tensors, storage_writer=ShardWriter(path), no_dist=True)
    content = dict(meta=dict(iter=iteration, epoch=0), message_hub={}, optimizer=dict(state={}, param_groups=[]))
    torch.save(content, path / 'state.pth')


def chosen(folder: Path, model: nn.Module, **options) -> tuple[str | None, list[str]]:
    path, skipped = newest_readable(candidates(Config(dict(work_dir=str(folder)))), model, **options)
    return path and path.name, [str(each) for each in skipped]


CHANGES = {
    "1 missing ('bias')": lambda state: state.pop('bias'),
    "1 unexpected ('other')": lambda state: state.update(other=torch.ones(1)),
    "1 of another shape ('weight')": lambda state: state.update(weight=torch.ones(3, 2)),
    "1 weights are not finite ('weight')": lambda state: state['weight'].fill_(float('nan')),
}


@pytest.mark.parametrize('said', CHANGES)
def test_what_does_not_fit_is_named_and_the_one_before_taken(tmp_path, said) -> None:
    model = nn.Linear(2, 2)
    write(tmp_path, 2, model.state_dict())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    CHANGES[said](state)
    write(tmp_path, 4, state)
    name, skipped = chosen(tmp_path, model)
    assert name == 'iter_2.pth' and len(skipped) == 1
    assert said.replace("'", '') in skipped[0].replace("'", ''), skipped
    assert chosen(tmp_path, model, strict=False)[0] == ('iter_2.pth' if 'finite' in said else 'iter_4.pth')
