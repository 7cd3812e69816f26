"""Blocks that are nodes of autograd, on two ranks: gradients of the modules alone, averaged over both ranks' images."""

import logging
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mila_mm import MILA
from mila_mm.nn import block_node

pytestmark = pytest.mark.forking
SMALL = dict(arch=dict(embed_dim=16, depths=(1, 2), num_heads=(1, 2)), out_indices=(0, 1))
RANKS = 2


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    """Module by module, and by nodes; in fp64, so that nothing but an error of ours differs."""
    torch.manual_seed(0)
    plain = MILA(**SMALL, fused=False, **options).double().train()
    twin = MILA(**SMALL, fused=True, **options).double().train()
    twin.load_state_dict(plain.state_dict())
    return plain, twin


def loss(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    maps = model(torch.randn(2, 3, 45, 38, generator=generator, dtype=torch.float64))
    return sum((m * torch.randn(m.shape, generator=generator, dtype=torch.float64)).sum() for m in maps)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    whole = {name: p.grad for name, p in model.named_parameters()}
    whole = {name: g.full_tensor() if hasattr(g, 'full_tensor') else g for name, g in whole.items()}
    return {name.removeprefix('module.'): None if g is None else g.clone() for name, g in whole.items()}


def expected(plain: nn.Module, images: int) -> dict[str, Tensor | None]:
    """What one process would have summed over the images of all ranks, over the number of ranks."""
    for seed in range(images * RANKS):
        (loss(plain, seed) / RANKS).backward()
    return gradients(plain)


def job(wrap: Callable[[nn.Module], nn.Module], options: dict[str, Any], images: int, change: Any) -> dict[str, Any]:
    """Forward and backward of so many images on this rank; all but the last without synchronisation."""
    rank, called, said = distributed.get_rank(), [], []
    original = block_node.run
    block_node.run = lambda *args: called.append(1) or original(*args)
    logging.getLogger('mila_mm').addFilter(lambda record: said.append(record.getMessage()) or True)
    plain, twin = pair(**options)
    for model in (plain, twin):
        if change is not None:
            change(model)
    wanted = expected(plain, images)
    wrapped = wrap(twin)
    for i in range(images):
        last = i == images - 1
        if hasattr(wrapped, 'set_requires_gradient_sync'):
            wrapped.set_requires_gradient_sync(last)
        else:
            wrapped.require_backward_grad_sync = last
        loss(wrapped, i * RANKS + rank).backward()
    return dict(got=gradients(wrapped), wanted=wanted, nodes=len(called), said=said)


def on_ranks(folder: Path, *args: Any) -> list[dict[str, Any]]:
    """Do the job on each rank, forked and joined over gloo."""

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=RANKS)
        torch.save(job(*args), folder / f'rank{rank}')
        distributed.barrier()
        os._exit(0)

    context = multiprocessing.get_context('fork')
    processes = [context.Process(target=run, args=(rank,)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * RANKS
    return [torch.load(folder / f'rank{rank}', weights_only=False) for rank in range(RANKS)]


def check(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result['got'].keys() == result['wanted'].keys()
        telling = 0
        for name, grad in result['wanted'].items():
            assert (grad is None) == (result['got'][name] is None), name
            if grad is not None:
                telling += bool(grad.abs().max() > 1e-6)
                limit = 1e-9 * (grad.abs().max().item() + 1)
                torch.testing.assert_close(result['got'][name], grad, rtol=0, atol=limit, msg=lambda m, n=name: n + m)
        frozen = [name for name, grad in result['wanted'].items() if grad is None]
        assert telling > (30 if frozen else 60)


def freeze(model: nn.Module) -> None:
    model.layers[0].blocks[0].mlp.requires_grad_(False)
    model.layers[1].blocks[1].requires_grad_(False)
    model.patch_embed.requires_grad_(False)


class LowRank(nn.Linear):
    """A Linear with an addition of low rank, as adapters put it in the place of one."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__(inner.in_features, inner.out_features, dtype=torch.float64)
        generator = torch.Generator().manual_seed(5)
        self.load_state_dict(inner.state_dict())
        self.down = nn.Parameter(torch.randn(2, inner.in_features, generator=generator, dtype=torch.float64))
        self.up = nn.Parameter(torch.randn(inner.out_features, 2, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.mT @ self.up.mT


def adapt(model: nn.Module) -> None:
    block = model.layers[1].blocks[0]
    block.in_proj = LowRank(block.in_proj)


def hook(model: nn.Module) -> None:
    model.layers[0].blocks[0].mlp.register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize(
    ('options', 'images', 'change', 'nodes'),
    [
        ({}, 1, None, 3),
        ({}, 3, None, 9),
        (dict(with_cp='block'), 2, None, 12),
        (dict(with_cp='stage', frozen_stages=1), 1, None, 5),
        ({}, 2, freeze, 6),
        ({}, 1, adapt, 2),
        ({}, 1, hook, 2),
    ],
    ids=['plain', 'accumulated', 'checkpointed', 'frozen-stages', 'frozen-parts', 'adapter', 'hook'],
)
def test_under_ddp(tmp_path: Path, options: dict, images: int, change: Any, nodes: int) -> None:
    results = on_ranks(tmp_path, DistributedDataParallel, options, images, change)
    check(results)
    assert [result['nodes'] for result in results] == [nodes] * RANKS


def shard(model: nn.Module) -> nn.Module:
    """As FSDP2 cuts up: each block by itself, and the rest."""
    for stage in model.layers:
        for block in stage.blocks:
            fully_shard(block)
    return fully_shard(model)


@pytest.mark.parametrize(('options', 'images'), [({}, 1), (dict(with_cp='block'), 2)], ids=['plain', 'accumulated'])
def test_under_fsdp(tmp_path: Path, options: dict, images: int) -> None:
    results = on_ranks(tmp_path, shard, options, images, None)
    check(results)
    for result in results:
        assert result['nodes'] == 0, 'a node would read the parameters of a block past the hooks that gather them'
        assert len(result['said']) == 1 and 'module by module' in result['said'][0]


def test_whole_model_under_fsdp(tmp_path: Path) -> None:
    check(on_ranks(tmp_path, fully_shard, {}, 1, None))
