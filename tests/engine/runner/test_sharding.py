"""Models in pieces on several processes (gloo): what they compute, what they hold, what they save."""

import itertools
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from mila_mm.engine import FullyShardedModel, Runner
from mila_mm.engine.runner import sharded_checkpoint
from mila_mm.engine.runner.find_checkpoint import candidates, newest_readable
from mila_mm.errors import UserError
from mila_mm.models import MILA
from mila_mm.weights.file.sharded import ShardWriter, read_state, read_whole

pytestmark = pytest.mark.forking

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


@pytest.fixture(scope='module', autouse=True)
def unformatted_configs() -> Iterator[None]:
    """Leave the config in logs as one long line: laying it out is half of a short run's time."""
    from yapf.yapflib import yapf_api

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yapf_api, 'FormatCode', lambda code, **_: (code, True))
        yield


def weights(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=False)


@pytest.fixture(scope='module')
def ddp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp('ddp')
    return folder / 'run', on_ranks(2, folder, trained, folder / 'run', 20)


@pytest.fixture(scope='module')
def fsdp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp('fsdp')
    return folder / 'run', on_ranks(2, folder, trained, folder / 'run', 20, FSDP)


def test_losses_are_those_of_ddp(ddp, fsdp) -> None:
    for one, two in zip(ddp[1], fsdp[1], strict=True):
        assert len(one['losses']) == 20 and len(set(one['losses'])) == 20
        assert two['losses'] == pytest.approx(one['losses'], rel=1e-5)


def test_each_rank_holds_half(ddp, fsdp) -> None:
    for one, two in zip(ddp[1], fsdp[1], strict=True):
        for what in ('parameters', 'optimizer'):
            # rows do not always divide by two
            assert two[what] == pytest.approx(one[what] / 2, rel=0.02)


def test_checkpoints_are_those_of_ddp(ddp, fsdp) -> None:
    one, two = (weights(folder / 'iter_20.pth') for folder in (ddp[0], fsdp[0]))
    assert list(one['state_dict']) == list(two['state_dict'])
    for name, value in one['state_dict'].items():
        torch.testing.assert_close(two['state_dict'][name], value, rtol=1e-4, atol=1e-5)
    assert one['optimizer']['state'].keys() == two['optimizer']['state'].keys()
    for number, entry in one['optimizer']['state'].items():
        for key, value in entry.items():
            torch.testing.assert_close(two['optimizer']['state'][number][key], value, rtol=1e-3, atol=1e-6)


SHARDED = dict(checkpoint=dict(interval=2, sharded=True))
BACKGROUND = dict(checkpoint=dict(interval=2, in_background=True, max_keep_ckpts=2))


def same(one: Any, two: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


@pytest.fixture(scope='module')
def in_pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A run that saved pieces at each second iteration, up to the sixth."""
    folder = tmp_path_factory.mktemp('pieces')
    return folder / 'run', on_ranks(2, folder, trained, folder / 'run', 6, FSDP, **SHARDED)


def test_pieces_are_the_whole_checkpoint(tmp_path, in_pieces) -> None:
    on_ranks(2, tmp_path, trained, tmp_path / 'run', 6, FSDP, checkpoint=dict(interval=2))
    folder = in_pieces[0] / 'iter_6.pth'
    files = ['.metadata', '__0_0.distcp', '__1_0.distcp', 'shards.json', 'state.pth']
    assert sorted(path.name for path in folder.iterdir()) == files
    expected, got = weights(tmp_path / 'run/iter_6.pth'), read_whole(folder)
    for key in ('state_dict', 'optimizer', 'param_schedulers'):
        assert same(got[key], expected[key]), key
    assert not list(in_pieces[0].glob('.*.unfinished'))


@pytest.mark.parametrize('count', [1, 2, 4])
def test_a_run_in_pieces_continues_on_any_number_of_ranks(tmp_path, in_pieces, count) -> None:
    """With the same images in each step the same comes of it."""
    run = Path(shutil.copytree(in_pieces[0], tmp_path / 'run'))
    for name in ('iter_4.pth', 'iter_6.pth'):
        shutil.rmtree(run / name)
    (run / 'last_checkpoint').unlink()
    more = dict(resume=True, **SHARDED)
    if count == 1:
        losses = [trained(run, 6, FSDP, **more)['losses']]
    else:
        losses = [each['losses'] for each in on_ranks(count, tmp_path, trained, run, 6, FSDP, **more)]
    expected = [sum(pair) / 2 for pair in zip(*(each['losses'][2:] for each in in_pieces[1]), strict=True)]
    assert [sum(each) / count for each in zip(*losses, strict=True)] == pytest.approx(expected, rel=1e-5)
    end, whole = run / 'iter_6.pth', read_whole(in_pieces[0] / 'iter_6.pth')
    got = read_whole(end) if count > 1 else weights(end)
    if count == 2:
        assert same(got['state_dict'], whole['state_dict']) and same(got['optimizer'], whole['optimizer'])
    for name, value in whole['state_dict'].items():
        torch.testing.assert_close(got['state_dict'][name], value, rtol=1e-4, atol=1e-5)


def test_in_the_background_the_same_is_written(tmp_path, in_pieces) -> None:
    on_ranks(2, tmp_path, trained, tmp_path / 'run', 6, FSDP, **BACKGROUND)
    assert {path.name for path in (tmp_path / 'run').glob('*.pth')} == {'iter_4.pth', 'iter_6.pth'}
    for name in ('iter_4.pth', 'iter_6.pth'):
        one, two = read_whole(tmp_path / 'run' / name), read_whole(in_pieces[0] / name)
        assert same(one['state_dict'], two['state_dict']) and same(one['optimizer'], two['optimizer'])
    assert (tmp_path / 'run/last_checkpoint').read_text().endswith('iter_6.pth')
    assert not list((tmp_path / 'run').glob('.*.unfinished'))


def test_a_whole_checkpoint_continues_in_pieces_and_the_other_way_round(tmp_path, fsdp, in_pieces) -> None:
    more = dict(resume=True, load_from=str(fsdp[0] / 'iter_16.pth'))
    again = on_ranks(2, tmp_path, trained, tmp_path / 'a', 20, FSDP, **more)
    assert again[0]['losses'] == fsdp[1][0]['losses'][16:]
    more = dict(resume=True, load_from=str(in_pieces[0] / 'iter_4.pth'))
    ddp = on_ranks(2, tmp_path, trained, tmp_path / 'b', 6, **more)
    assert ddp[0]['losses'] == pytest.approx(in_pieces[1][0]['losses'][4:], rel=1e-5)


def test_optimizers_of_the_older_fsdp_continue(tmp_path, fsdp) -> None:
    """They named the parameters, and listed those of a group in any order."""
    content = weights(fsdp[0] / 'iter_16.pth')
    runner = runner_of(tmp_path / 'names', 1, None)
    optimizer = runner.build_optim_wrapper(runner.optim_wrapper).optimizer
    of = {id(parameter): name for name, parameter in runner.model.named_parameters()}
    names = [of[id(parameter)] for group in optimizer.param_groups for parameter in group['params']]
    saved = content['optimizer']
    saved['state'] = {names[number]: entry for number, entry in saved['state'].items()}
    for group in saved['param_groups']:
        group['params'] = [names[number] for number in group['params']][::-1]
    torch.save(content, tmp_path / 'old.pth')
    more = dict(resume=True, load_from=str(tmp_path / 'old.pth'))
    again = on_ranks(2, tmp_path, trained, tmp_path / 'run', 20, FSDP, **more)
    assert again[0]['losses'] == fsdp[1][0]['losses'][16:]


BF16 = dict(FSDP, mixed_precision=dict(param_dtype='bf16', reduce_dtype='fp32'), sharding_strategy='SHARD_GRAD_OP')


def test_mixed_precision_and_checkpointing_together(tmp_path, fsdp) -> None:
    rounded = on_ranks(2, tmp_path, trained, tmp_path / 'run', 3, BF16, backbone=dict(with_cp='block'))[0]
    exact = fsdp[1][0]
    assert rounded['losses'] == pytest.approx(exact['losses'][:3], rel=0.05)
    assert rounded['losses'] != exact['losses'][:3]
    assert rounded['parameters'] == exact['parameters'], 'parameters stay in fp32'


@pytest.mark.slow
def test_compilation_and_checkpointing_together(tmp_path, fsdp) -> None:
    options = dict(backbone=dict(with_cp='block'), compile_backbone=dict(backend='eager'))
    compiled = on_ranks(2, tmp_path, trained, tmp_path / 'run', 2, FSDP, **options)[0]
    assert compiled['losses'] == pytest.approx(fsdp[1][0]['losses'][:2], rel=1e-5)


@pytest.mark.parametrize(
    ('options', 'words'),
    [
        (dict(shard_modules=['SwinBlock']), 'no module of class SwinBlock'),
        (dict(sharding_strategy='NO_SHARD'), 'expected one of FULL_SHARD'),
        (dict(auto_wrap_policy=3), 'fully_shard has no auto_wrap_policy'),
        (dict(mixed_precision=dict(param_dtype='int8')), 'param_dtype and reduce_dtype of bf16'),
        (dict(mixed_precision=dict(buffer_dtype='bf16')), 'param_dtype and reduce_dtype of bf16'),
    ],
)
def test_arguments_that_are_none(options, words) -> None:
    with pytest.raises(UserError, match=words):
        FullyShardedModel(Tiny(), **options)


@pytest.mark.parametrize(
    ('wrapper', 'hooks', 'words'),
    [(FSDP, [dict(type='EMAHook')], 'EMAHook'), (dict(type='MMFullyShardedDataParallel'), [], 'FullyShardedModel')],
    ids=['averaging', 'the older FSDP'],
)
def test_what_does_not_go_together_is_refused(tmp_path, wrapper, hooks, words) -> None:
    def refused() -> str:
        with pytest.raises(UserError) as caught:
            trained(tmp_path / 'run', 1, wrapper, custom_hooks=hooks)
        return str(caught.value)

    assert words in on_ranks(1, tmp_path, refused)[0]


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


def test_kills_in_the_saving_of_pieces(tmp_path) -> None:
    """Ten with MILA_MM_SLOW=1 (make faults), three else: the end equals that of an undisturbed run bit for bit."""
    count = 10 if os.environ.get('MILA_MM_SLOW') else 3
    run, seen = tmp_path / 'run', 0
    for number in range(count):
        kill_in_the_save(tmp_path, MOMENTS[(2 * number) % 5], number % 2 == 1, run)
        assert [path.name for path in run.glob('.iter_*.unfinished')], 'the kill hit the saving'
        found, skipped = newest_readable(candidates(Config(dict(work_dir=str(run)))))
        assert found is not None and not skipped, skipped
        done = read_state(found)['meta']['iter']
        assert done > seen, 'each start has come further'
        seen = done
    end = dict(checkpoint=dict(interval=1, sharded=True, max_keep_ckpts=2))
    on_ranks(2, tmp_path, trained, run, seen + 2, FSDP, resume=True, **end)
    on_ranks(2, tmp_path, trained, tmp_path / 'straight', seen + 2, FSDP, **end)
    names = {path.name for path in (tmp_path / 'straight').glob('*.pth')}
    assert {path.name for path in run.glob('*.pth')} == names == {f'iter_{seen + 1}.pth', f'iter_{seen + 2}.pth'}
    assert not list(run.glob('.*.unfinished'))
    one, two = (read_whole(each / f'iter_{seen + 2}.pth') for each in (run, tmp_path / 'straight'))
    for key in ('state_dict', 'optimizer', 'param_schedulers'):
        assert same(one[key], two[key]), key
