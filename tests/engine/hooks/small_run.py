"""Trainings of a model of two parameters, in this process, in fractions of a second."""

import itertools
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from torch import Tensor, nn

from mila_mm.engine.config.prepare import make_safe
from mila_mm.engine.runner.runner import Runner

COUNTER = itertools.count()
STEP, COSINE = dict(type='StepLR', step_size=2, gamma=0.5), dict(type='CosineAnnealingLR', T_max=8, eta_min=1e-3)


BF16 = dict(type='mila_mm.AmpOptimWrapper', dtype='bf16')
FP16 = dict(type='mila_mm.AmpOptimWrapper', dtype='fp16')


class Numbers(torch.utils.data.Dataset):
    """Eight numbers or so."""

    def __init__(self, length: int, classes: tuple = ()) -> None:
        self.length, self.metainfo = length, dict(classes=classes)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(inputs=torch.tensor([float(index)]))


class Line(BaseModel):
    """A model of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, inputs: Tensor, mode: str = 'tensor') -> Any:
        """Compute."""
        out = self.layer(torch.stack(list(inputs)) / 8)
        return dict(loss=out.square().mean()) if mode == 'loss' else list(out)


class Count(BaseMetric):
    """Counts validations."""

    done = 0

    def process(self, data_batch: Any, data_samples: Any) -> None:
        """Take a batch."""
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Count."""
        Count.done += 1
        return dict(score=0.0)


class Rates(Hook):
    """Notes the learning rate of each iteration, and may end the run."""

    def __init__(self, end: int | None) -> None:
        self.end, self.seen = end, {}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Note, or end."""
        if runner.iter == self.end:
            raise InterruptedError
        self.seen[runner.iter] = runner.optim_wrapper.get_lr()['lr'][0]


def run(
    folder: str | Path, *, kind: str = 'iter', end: int | None = None, changed: tuple = (), **options: Any
) -> Rates:
    """Train for eight iterations, four to an epoch, saving after every second one or every epoch."""
    by_epoch = kind == 'epoch'
    settings = dict(batch=2, images=8, lr=0.1, optimizer='SGD', schedule=[STEP, COSINE], momentum=0.9, length=None)
    settings |= dict(amp={}, classes=('a', 'b'), checkpoint={})
    settings.update(options)
    loop = dict(by_epoch=by_epoch, val_interval=1 if by_epoch else 4)
    loop['max_epochs' if by_epoch else 'max_iters'] = settings['length'] or (2 if by_epoch else 8)
    momentum = dict(momentum=settings['momentum']) if settings['optimizer'] == 'SGD' else {}
    schedule = [dict(each, by_epoch=False) for each in settings['schedule']]
    checkpoint = dict(type='CheckpointHook', interval=1 if by_epoch else 2, by_epoch=by_epoch, **settings['checkpoint'])
    loader = dict(batch_size=settings['batch'], num_workers=0, collate_fn=dict(type='pseudo_collate'))
    cfg = Config(
        dict(
            train_cfg=loop,
            val_cfg=dict(),
            val_evaluator=dict(type=Count),
            default_scope='mmengine',
            optim_wrapper=dict(
                optimizer=dict(type=settings['optimizer'], lr=settings['lr'], **momentum), **settings['amp']
            ),
            param_scheduler=schedule or None,
            default_hooks=dict(checkpoint=checkpoint),
            custom_hooks=[dict(type='mila_mm.RunIdentityHook', changed=list(changed))],
            randomness=dict(seed=3),
            train_dataloader=dict(sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler')),
            experiment_name=f'identity-{next(COUNTER)}',
            log_level='WARNING',
        )
    )
    make_safe(cfg)
    train = dict(cfg.pop('train_dataloader'), dataset=Numbers(settings['images'], settings['classes']), **loader)
    runner = Runner(
        model=Line(),
        work_dir=str(folder),
        cfg=cfg,
        train_dataloader=train,
        val_dataloader=dict(loader, dataset=Numbers(2), sampler=dict(type='DefaultSampler', shuffle=False)),
        resume=options.get('resume', False),
        load_from=options.get('load_from'),
        **cfg,
    )
    rates = Rates(end)
    for hook in (rates, *options.get('hooks', ())):
        runner.register_hook(hook)
    try:
        runner.train()
    except InterruptedError:
        assert end is not None
    rates.runner = runner
    return rates
