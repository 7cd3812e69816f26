"""Models in pieces on several processes (gloo): what they compute, what they hold, what they save."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from jobs_on_ranks import FSDP, Tiny, on_ranks, runner_of, same, trained, weights
from kills_in_saves import kill_saves

from mila_mm.engine import FullyShardedModel
from mila_mm.engine.config.yapf_cache import import_yapf
from mila_mm.errors import UserError
from mila_mm.weights.file.sharded import read_whole

pytestmark = pytest.mark.forking


@pytest.fixture(scope='module', autouse=True)
def unformatted_configs() -> Iterator[None]:
    """Leave the config in logs as one long line: laying it out is half of a short run's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_yapf(), 'FormatCode', lambda code, **_: (code, True))
        yield


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


def test_kills_in_the_saving_of_pieces(tmp_path) -> None:
    """Ten with MILA_MM_SLOW=1 (make faults), three else: the end equals that of an undisturbed run bit for bit."""
    kill_saves(tmp_path, 10 if os.environ.get('MILA_MM_SLOW') else 3)
