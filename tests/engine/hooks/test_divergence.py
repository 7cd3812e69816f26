"""A run whose numbers are lost ends, and keeps what it had before."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mila_mm.engine.hooks.checkpoint import CheckpointHook, write_atomically
from mila_mm.engine.hooks.divergence import DivergenceHook
from mila_mm.engine.runner.finite import broken_weights
from mila_mm.errors import DivergedError


class Runner:
    """As much of a runner as the hooks need."""

    def __init__(self, folder: Path, hook: DivergenceHook) -> None:
        self.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.work_dir, self.iter, self.epoch = str(folder), 0, 0
        self.hooks = [hook]
        self.message_hub = SimpleNamespace(runtime_info={}, update_info=lambda *_: None)
        self.logger = SimpleNamespace(info=lambda _: None)

    def call_hook(self, name: str) -> None:
        """Call the hooks."""
        for hook in self.hooks:
            getattr(hook, name)(self)

    def save_checkpoint(self, folder: str, name: str, *_: object, **__: object) -> None:
        """Save something."""
        write_atomically(Path(folder) / name, b'x')


def train(runner: Runner, losses: list[float]) -> None:
    for loss in losses:
        for hook in runner.hooks:
            hook.after_train_iter(runner, 0, outputs=dict(loss=torch.tensor(loss)))
        runner.iter += 1


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize('bad', [NAN, INF, -INF])
def test_so_many_in_a_row_end_it(tmp_path, bad) -> None:
    runner = Runner(tmp_path, DivergenceHook(max_nonfinite=3))
    train(runner, [1.0, bad, bad, 2.0, bad, bad, 3.0])
    with pytest.raises(DivergedError, match=r'in 3 iterations in a row, up to iteration 10; no checkpoint'):
        train(runner, [bad, bad, bad])


def test_by_default_ten() -> None:
    runner = Runner(Path(), DivergenceHook())
    train(runner, [1.0] + [NAN] * 9)
    with pytest.raises(DivergedError, match='10 iterations'):
        train(runner, [NAN])


@pytest.mark.parametrize('where', ['weight', 'running_var'])
def test_weights_that_are_lost_are_not_saved_and_the_sound_ones_stay(tmp_path, where) -> None:
    runner = Runner(tmp_path, DivergenceHook())
    hook = CheckpointHook(interval=1, by_epoch=False, max_keep_ckpts=1)
    hook.before_train(runner)
    runner.hooks.append(SimpleNamespace(gather_for_checkpoint=lambda _: None))
    runner.iter = 1
    hook._save_checkpoint(runner)
    runner.iter = 2
    with torch.no_grad():
        getattr(runner.model[1], where)[1] = NAN
    with pytest.raises(DivergedError, match=rf'(?s)1\.{where}.*continues from \S+iter_2\.pth'):
        hook._save_checkpoint(runner)
    with pytest.raises(DivergedError):
        hook.save_stopped(runner, dict(epoch=0, iter=3))
    assert {path.name for path in tmp_path.iterdir()} == {'iter_2.pth', 'last_checkpoint'}
    with pytest.raises(DivergedError):
        runner.hooks[0].before_val(runner)


def test_a_mask_may_be_infinite() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer('mask', torch.tensor([0.0, -INF]))
    assert broken_weights(model) == []
    model.mask[0] = NAN
    assert broken_weights(model) == ['mask']
