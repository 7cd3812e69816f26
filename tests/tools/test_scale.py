"""Several processes over gloo: what they train and measure is what one process does."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import pytest
import torch

from mila_mm import cli
from mila_mm.datasets.shapes import write_shapes
from mila_mm.engine.runner.sharded_model import FullyShardedModel

ROOT = Path(__file__).resolve().parents[2]

# Writes what each rank has: the gradients of the first step, the losses, and the final parameters.
SPY = """
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Spy(Hook):
    def __init__(self, out):
        self.out, self.losses, self.gradients = out, [], None

    def before_train(self, runner):
        model = runner.model
        step = runner.optim_wrapper.step

        def note(**kwargs):
            if self.gradients is None:
                self.gradients = {name.removeprefix('module.'): p.grad.clone() for name, p in model.named_parameters()
                                  if p.grad is not None}
            step(**kwargs)

        runner.optim_wrapper.step = note

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(float(outputs['loss']))

    def after_train(self, runner):
        state = {name.removeprefix('module.'): p.detach().clone() for name, p in runner.model.named_parameters()}
        torch.save(dict(losses=self.losses, gradients=self.gradients, state=state,
                        lr=runner.optim_wrapper.get_lr()['lr'][0]), f'{self.out}/rank{get_rank()}.pth')
"""

# Both libraries: no norm or dropout that sees the batch, no shuffling, plain SGD.
COMMON = """
import os
custom_imports = dict(imports=['spy'], allow_failed_imports=False)
custom_hooks = [dict(type='Spy', out=os.environ.get('SPY_OUT', '.'))]
model['backbone']['norm_eval'] = True
optim_wrapper = dict(type='OptimWrapper', clip_grad=None, _delete_=True,
                     optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4))
param_scheduler = []
train_dataloader.update(sampler=dict(_delete_=True, type='DefaultSampler', shuffle=False))
"""

# Mask R-CNN divides its losses by numbers of samples, boxes and masks that each process counts for itself. Here all
# anchors are sampled, and the proposals are the labelled boxes: images with the same labels then count alike.
EQUAL_COUNTS = """
train_dataloader['batch_sampler'] = None
model['train_cfg'] = dict(
    rpn=dict(sampler=dict(num=1000000)), rpn_proposal=dict(nms_pre=50, max_per_img=0))
"""

NO_BATCH_NORM = """
norm = dict(type='GN', num_groups=4)
model['decode_head'].update(norm_cfg=norm, dropout_ratio=0.0)
model['auxiliary_head'].update(norm_cfg=norm, dropout_ratio=0.0)
default_hooks = dict(checkpoint=dict(interval=2))
"""


@pytest.fixture(scope='module')
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training images with the same labels in different colours; three held-out ones."""
    folder = write_shapes(tmp_path_factory.mktemp('twins') / 'shapes', num_train=4, num_val=3, size=64, seed=3)
    path = folder / 'annotations/instances_train.json'
    content = json.loads(path.read_text())
    first, *others = content['images']
    kept = [a for a in content['annotations'] if a['image_id'] == first['id']]
    image = cv2.imread(str(folder / 'images/training' / first['file_name']))
    labels = (folder / 'annotations/training' / first['file_name']).read_bytes()
    content['annotations'] = list(kept)
    for number, other in enumerate(others, start=1):
        content['annotations'] += [dict(a, id=a['id'] + number * 10**6, image_id=other['id']) for a in kept]
        recoloured = image[..., [[2, 1, 0], [1, 2, 0], [0, 2, 1]][number - 1]] // 2 + 20 * number
        cv2.imwrite(str(folder / 'images/training' / other['file_name']), recoloured)
        (folder / 'annotations/training' / other['file_name']).write_bytes(labels)
    path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def scaled(workspace: Path, shapes: Path, twins: Path) -> Callable[..., Path]:
    """Turn a config into one whose result does not depend on how a batch is divided."""
    (workspace / 'spy.py').write_text(SPY)

    def change(config: Path, more: str) -> Path:
        config.write_text(config.read_text().replace(repr(str(shapes)), repr(str(twins))) + COMMON + more)
        return config

    return change


def spied(folder: Path, ranks: int) -> list[dict]:
    return [torch.load(folder / f'rank{rank}.pth') for rank in range(ranks)]


def metrics(work_dir: Path, pattern: str) -> dict[str, float]:
    """The last record of the newest log, without times."""
    last = json.loads(max(work_dir.glob(pattern)).read_text().splitlines()[-1])
    return {key: value for key, value in last.items() if 'time' not in key and key != 'step'}


def check_equal_to_one_process(several: list[dict], one: dict) -> None:
    for rank in several[1:]:
        for name, value in rank['state'].items():
            assert torch.equal(value, several[0]['state'][name]), f'{name} differs between the ranks'
    mean = [sum(losses) / len(several) for losses in zip(*(rank['losses'] for rank in several), strict=True)]
    assert mean[0] == pytest.approx(one['losses'][0], rel=1e-5)
    assert several[0]['losses'][0] != several[1]['losses'][0], 'the halves are different data'
    assert one['gradients'].keys() == several[0]['gradients'].keys()
    for name, expected in one['gradients'].items():
        error = (several[0]['gradients'][name] - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max() + 1e-6, (name, error)
    for name, expected in one['state'].items():
        torch.testing.assert_close(several[0]['state'][name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('ranks', [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize('kind', ['detector', 'segmentor'])
def test_processes_train_and_measure_as_one_does(
    kind, ranks, request, script, command, scaled, workspace, monkeypatch
) -> None:
    config = scaled(request.getfixturevalue(kind), EQUAL_COUNTS if kind == 'detector' else NO_BATCH_NORM)
    monkeypatch.syspath_prepend(str(workspace))
    for name, processes in (('several', ranks), ('one', 1)):
        (workspace / name).mkdir()
        monkeypatch.setenv('SPY_OUT', str(workspace / name))
        argv = [config, '--work-dir', name, '--cfg-options', f'train_dataloader.batch_size={4 // processes}']
        if processes > 1:
            env = {'SPY_OUT': str(workspace / name), 'PYTHONPATH': str(workspace)}
            ended = script('dist_train.sh', argv[0], processes, *argv[1:], cwd=workspace, env=env)
        else:
            ended = command('train.py', *argv)
        assert ended.status == 0, ended
    check_equal_to_one_process(spied(workspace / 'several', ranks), spied(workspace / 'one', 1)[0])

    # Three held-out images: the sampler repeats one of them, and the metric must not.
    checkpoint = 'several/epoch_1.pth' if kind == 'detector' else 'several/iter_2.pth'
    ended = command('test.py', config, checkpoint, '--work-dir', 'single_test')
    assert ended.status == 0, ended
    several = metrics(workspace / 'several', '*/vis_data/scalars.json')
    # a test prints the AP of each class as well
    assert several and several.items() <= metrics(workspace / 'single_test', '*/*.json').items()


# Runs trainings one after the other in one process group.
JOBS = """
import json, sys
import mila_mm
from mila_mm import cli
from mmengine.utils import ManagerMixin

def main(argv):
    from mila_mm.engine import train
    import os
    for job in json.loads(sys.argv[1]):
        kinds = [ManagerMixin]
        for kind in kinds:
            kinds.extend(kind.__subclasses__())
            if '_instance_dict' in vars(kind):
                kind._instance_dict.clear()
        os.makedirs(job['work_dir'], exist_ok=True)
        os.environ['SPY_OUT'] = job['work_dir']
        train(launcher='pytorch', **job)

sys.exit(cli.execute(main))
"""


def run_jobs(workspace: Path, ranks: int, jobs: list[dict]) -> None:
    (workspace / 'jobs.py').write_text(JOBS)
    start = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--rdzv-backend=c10d',
        '--rdzv-endpoint=127.0.0.1:0',
        '--local-addr=127.0.0.1',
        f'--nproc-per-node={ranks}',
        'jobs.py',
        json.dumps(jobs),
    ]
    env = {'PYTHONPATH': f'{workspace}:{ROOT}', 'OMP_NUM_THREADS': '1', 'PATH': '/usr/bin:/bin'}
    done = subprocess.run(start, cwd=workspace, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False)


@pytest.mark.slow
def test_zero_and_fsdp_train_save_and_resume_as_ddp_does(command, segmentor, scaled, workspace, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(workspace))
    base = scaled(segmentor, NO_BATCH_NORM).read_text()
    adamw = "optim_wrapper.update(optimizer=dict(type='AdamW', lr=1e-3), clip_grad=dict(max_norm=0.5))\n"
    zero = "optim_wrapper.update(optimizer=dict(type='ZeroRedundancyOptimizer', optimizer_type='AdamW', lr=1e-3))\n"
    fsdp = "model_wrapper_cfg = dict(type='mila_mm.FullyShardedModel')\n"
    for name, more in (('ddp', adamw), ('zero', adamw + zero), ('fsdp', adamw + fsdp)):
        (workspace / f'{name}.py').write_text(base + more)

    def job(name, work_dir, **more):
        return dict(
            config=f'{name}.py',
            work_dir=work_dir,
            cfg_options=['train_cfg.max_iters=4', 'val_cfg=None', 'val_dataloader=None', 'val_evaluator=None'],
            **more,
        )

    jobs = [job(name, name) for name in ('ddp', 'zero', 'fsdp')]
    jobs += [job(name, f'{name}_again', resume=f'{name}/iter_2.pth') for name in ('zero', 'fsdp')]
    run_jobs(workspace, 2, jobs)
    exact = weights(workspace / 'ddp/iter_4.pth')
    keys = list(exact['state_dict'])
    assert 'backbone.layers.0.blocks.0.attn.qk.weight' in keys
    for name in ('zero', 'fsdp'):
        for iters in (2, 4):
            saved = weights(workspace / f'{name}/iter_{iters}.pth')
            expected = weights(workspace / f'ddp/iter_{iters}.pth')
            assert list(saved['state_dict']) == keys, 'checkpoints are those of a run without sharding'
            for key in keys:
                torch.testing.assert_close(saved['state_dict'][key], expected['state_dict'][key], rtol=1e-4, atol=2e-5)
            assert len(saved['optimizer']['state']) == len(expected['optimizer']['state'])
        resumed = weights(workspace / f'{name}_again/iter_4.pth')
        straight = weights(workspace / f'{name}/iter_4.pth')
        differing = [key for key in keys if not torch.equal(resumed['state_dict'][key], straight['state_dict'][key])]
        assert not differing, (name, differing[:3], len(differing))

    # One process reads them, and a sharded run was really sharded.
    assert command('test.py', 'fsdp.py', 'fsdp/iter_4.pth').status == 0
    first = spied(workspace / 'fsdp', 2)[0]['state']
    name = next(key for key in first if key.endswith('attn.qk.weight'))
    whole = exact['state_dict']['backbone.layers.0.blocks.0.attn.qk.weight']
    assert first[name].to_local().numel() * 2 == whole.numel()


def test_zero_needs_several_processes(command, refused, segmentor) -> None:
    text = "optim_wrapper = dict(_delete_=True, type='OptimWrapper', optimizer=dict(type='ZeroRedundancyOptimizer', "
    segmentor.write_text(segmentor.read_text() + text + "optimizer_type='AdamW', lr=1e-3))\n")
    refused(command('train.py', segmentor), 'ZeroRedundancyOptimizer', 'tools/dist_train.sh')


def test_fsdp_needs_modules_to_wrap() -> None:
    with pytest.raises(cli.UserError, match='no module of class SwinBlock'):
        FullyShardedModel(torch.nn.Linear(2, 2), shard_modules=['SwinBlock'])


@pytest.mark.parametrize(('batch', 'counts', 'expected'), [(2, 1, 0.2), (2, 2, 0.4), (1, 4, 0.4)])
def test_auto_scale_lr_counts_accumulated_batches(command, detector, workspace, batch, counts, expected) -> None:
    options = [
        'auto_scale_lr.base_batch_size=4',
        'optim_wrapper.optimizer.lr=0.4',
        'param_scheduler=[]',
        f'train_dataloader.batch_size={batch}',
        f'optim_wrapper.accumulative_counts={counts}',
    ]
    assert command('train.py', detector, '--auto-scale-lr', '--cfg-options', *options).status == 0
    records = max((workspace / 'work_dirs/detector').glob('*/vis_data/scalars.json')).read_text().splitlines()
    rates = [json.loads(line)['lr'] for line in records if '"lr"' in line]
    assert rates and rates == pytest.approx([expected] * len(rates))


def test_accumulated_steps_are_those_of_the_larger_batch(command, segmentor, scaled, workspace, monkeypatch) -> None:
    config = scaled(segmentor, NO_BATCH_NORM)
    monkeypatch.syspath_prepend(str(workspace))
    for name, batch, counts, iters in (('large', 4, 1, 1), ('accumulated', 1, 4, 4)):
        (workspace / name).mkdir()
        monkeypatch.setenv('SPY_OUT', str(workspace / name))
        options = [
            f'train_dataloader.batch_size={batch}',
            f'optim_wrapper.accumulative_counts={counts}',
            f'train_cfg.max_iters={iters}',
            'val_cfg=None',
            'val_dataloader=None',
            'val_evaluator=None',
        ]
        assert command('train.py', config, '--work-dir', name, '--cfg-options', *options).status == 0
    large, accumulated = (spied(workspace / name, 1)[0]['state'] for name in ('large', 'accumulated'))
    for name, expected in large.items():
        torch.testing.assert_close(accumulated[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('launcher', ['slurm', 'mpi'])
def test_launchers_by_their_environment(launcher, segmentor, workspace) -> None:
    """Two processes as srun or mpirun would start them; neither is needed for that."""
    started = []
    port = str(20000 + int.from_bytes(launcher.encode(), 'little') % 9973)
    for rank in '01':
        names = {
            'slurm': dict(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NTASKS='2', SLURM_NODELIST='localhost'),
            'mpi': dict(OMPI_COMM_WORLD_RANK=rank, OMPI_COMM_WORLD_LOCAL_RANK=rank, OMPI_COMM_WORLD_SIZE='2'),
        }[launcher]
        env = {
            'PYTHONPATH': str(ROOT),
            'OMP_NUM_THREADS': '1',
            'PATH': '/usr/bin:/bin',
            'MASTER_ADDR': '127.0.0.1',
            'MASTER_PORT': port,
            **names,
        }
        command = [sys.executable, str(ROOT / 'tools/train.py'), str(segmentor), '--work-dir', 'run']
        started.append(
            subprocess.Popen(
                [*command, '--launcher', launcher],
                cwd=workspace,
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        )
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert 'GPU number: 2' in outputs[0] + outputs[1]
    assert (workspace / 'run/iter_2.pth').is_file()
