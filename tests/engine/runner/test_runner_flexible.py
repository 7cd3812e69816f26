"""Runs through mmengine's strategies are as safe: their checkpoints, what is resumed, and where they stand."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.fileio import LocalBackend
from mmengine.fileio.backends import register_backend
from mmengine.model import BaseModel
from mmengine.runner import FlexibleRunner
from torch.utils.data import Dataset

from mila_mm.engine.config.prepare import make_safe
from mila_mm.engine.runner.find_checkpoint import settle_resume


class Linear(BaseModel):
    """Draws a number in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        """Return the loss or the outputs."""
        out = torch.dropout(self.linear(torch.stack(list(inputs))), 0.5, self.training)
        return {'loss': out.square().mean()} if mode == 'loss' else list(out)


class Ones(Dataset):
    """Six samples."""

    metainfo: dict = dict(classes=('a',))  # noqa: RUF012

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict:
        return dict(inputs=torch.full((2,), 1.0 + index) * torch.rand(1), data_samples=index)


class Step(BaseMetric):
    """A score that is better every time."""

    score = 0

    def process(self, data_batch, data_samples) -> None:
        """Keep something."""
        self.results.append(1)

    def compute_metrics(self, results) -> dict:
        """Return the score."""
        Step.score += 1
        return {'score': Step.score}


@pytest.fixture(autouse=True)
def backend():
    """Give mmengine's backend back."""
    yield
    register_backend('local', LocalBackend, force=True, prefixes='')


def runner(folder: Path, iterations: int, name: str, resume: bool = False) -> FlexibleRunner:
    loader = dict(batch_size=2, num_workers=0, dataset=Ones(), collate_fn=dict(type='pseudo_collate'))
    cfg = Config(
        dict(
            train_cfg=dict(by_epoch=False, max_iters=iterations, val_interval=3),
            val_cfg=dict(),
            val_evaluator=dict(type=Step),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9)),
            train_dataloader=dict(sampler=dict(type='InfiniteSampler', shuffle=True)),
            default_hooks=dict(
                checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2, save_best='score', rule='greater')
            ),
            randomness=dict(seed=3),
            strategy=dict(type='SingleDeviceStrategy'),
            experiment_name=name,
            log_level='ERROR',
        )
    )
    make_safe(cfg)
    torch.manual_seed(0)
    train_dataloader = {**loader, **cfg.pop('train_dataloader')}
    val_dataloader = dict(sampler=dict(type='DefaultSampler', shuffle=False), **loader)
    made = FlexibleRunner(
        model=Linear(),
        work_dir=str(folder),
        train_dataloader=train_dataloader,
        val_dataloader=val_dataloader,
        resume=resume,
        cfg=cfg,
        default_scope='mmengine',
        **cfg,
    )
    settle_resume(made)
    made.train()
    return made


def test_it_continues_exactly_from_the_newest_that_can_be_read(tmp_path) -> None:
    straight = runner(tmp_path / 'straight', 8, 'straight')
    runner(tmp_path / 'stopped', 4, 'first')
    # saved again after the validation, with the score, and still of iteration 3
    assert torch.load(tmp_path / 'stopped/iter_3.pth', weights_only=False)['meta']['iter'] == 3
    (tmp_path / 'stopped/iter_4.pth').write_bytes(b'')
    second = runner(tmp_path / 'stopped', 8, 'second', resume=True)
    assert second.iter == 8
    for one, two in zip(straight.model.state_dict().values(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, two)
