"""Small trainings on several processes of this machine, joined over gloo."""

import itertools
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from mila_mm.engine import Runner
from mila_mm.models import MILA

MICRO = dict(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
FSDP = dict(type='mila_mm.FullyShardedModel')
COUNTER = itertools.count()


class Tiny(BaseModel):
    """A MILA of 0.1 M parameters that tells two kinds of noise apart."""

    def __init__(self, **backbone: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = MILA(MICRO, norm_eval=True, **backbone)
        self.head = nn.Linear(8 + 16 + 32 + 64, 2)

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = 'tensor') -> Any:
        maps = self.backbone(torch.stack(list(inputs)))
        scores = self.head(torch.cat([each.mean((2, 3)) for each in maps], 1))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(scores, torch.as_tensor(list(data_samples))))
        return list(scores)


class Noise(Dataset):
    """Sixteen images that follow from their index."""

    metainfo: ClassVar = dict(classes=('a', 'b'))

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        image = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return dict(inputs=image * (1 + index % 2), data_samples=index % 2)


class Record(Hook):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.losses.append(float(outputs['loss']))


def runner_of(folder: Path, iters: int, wrapper: dict | None, **more: Any) -> Runner:
    """The runner of a config as tools/train.py would build it."""
    world = distributed.get_world_size() if distributed.is_initialized() else 1
    model = Tiny(**more.pop('backbone', {}))
    checkpoint = dict(type='mila_mm.CheckpointHook', by_epoch=False, **more.pop('checkpoint', dict(interval=4)))
    cfg = Config(
        dict(
            train_cfg=dict(type='mila_mm.IterBasedTrainLoop', max_iters=iters),
            default_scope='mmengine',
            optim_wrapper=dict(
                optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05),
                clip_grad=dict(max_norm=0.5),
                paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
            ),
            param_scheduler=[dict(type='LinearLR', start_factor=0.1, begin=0, end=4, by_epoch=False)],
            default_hooks=dict(checkpoint=checkpoint, logger=dict(type='LoggerHook', interval=1)),
            custom_hooks=[dict(type='mila_mm.ResumeStateHook'), *more.pop('custom_hooks', ())],
            launcher='pytorch' if distributed.is_initialized() else 'none',
            randomness=dict(seed=3),
            log_level='ERROR',
            experiment_name=f'sharding-{os.getpid()}-{next(COUNTER)}',
            model_wrapper_cfg=wrapper,
            **more,
        )
    )
    loader = dict(
        batch_size=4 // world,
        num_workers=0,
        dataset=Noise(),
        sampler=dict(type='InfiniteSampler', shuffle=False),
        collate_fn=dict(type='pseudo_collate'),
    )
    runner = Runner(
        model=model,
        work_dir=str(folder),
        cfg=cfg,
        train_dataloader=loader,
        **{key: cfg[key] for key in cfg if key not in ('model_wrapper_cfg', 'work_dir', 'compile_backbone')},
    )
    runner.record = Record()
    runner.register_hook(runner.record)
    return runner


def trained(folder: Path, iters: int, wrapper: dict | None = None, **more: Any) -> dict[str, Any]:
    """Train, and say what this rank has seen and holds."""
    runner = runner_of(folder, iters, wrapper, **more)
    runner.train()
    model = getattr(runner.model, 'module', runner.model)
    state = runner.optim_wrapper.optimizer.state
    return dict(
        losses=runner.record.losses,
        parameters=held(model.parameters()),
        optimizer=held(value for entry in state.values() for value in entry.values() if value.dim()),
    )


def held(tensors: Any) -> int:
    """Bytes that lie on this rank."""
    local = (each.to_local() if isinstance(each, DTensor) else each for each in tensors)
    return sum(each.numel() * each.element_size() for each in local)


def start_ranks(count: int, folder: Path, job: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[list, Path]:
    """Call a function in forked processes that are joined over gloo."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f'rendezvous{next(COUNTER)}'

    def run(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count))
        torch.set_num_threads(1)
        distributed.init_process_group('gloo', init_method=f'file://{place}', rank=rank, world_size=count)
        torch.save(job(*args, **kwargs), f'{place}.rank{rank}')
        distributed.barrier()
        os._exit(0)

    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    return processes, place


def on_ranks(count: int, folder: Path, job: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """Call a function on each rank; return what each returns."""
    processes, place = start_ranks(count, folder, job, *args, **kwargs)
    for process in processes:
        process.join(500)
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(f'{place}.rank{rank}', weights_only=False) for rank in range(count)]


def weights(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


def same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
