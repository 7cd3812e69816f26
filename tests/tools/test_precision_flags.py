"""tools/train.py with --amp, --amp-dtype and --debug-nonfinite, and with the options for speed."""

import json
from pathlib import Path

import pytest
import torch

from mila_mm import cli

# Spoils a weight, or the gradient of one, before the second iteration.
POISON = """
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Poison(Hook):
    def __init__(self, where):
        self.where = where

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter != 1:
            return
        conv = runner.model.decode_head.conv_seg
        if self.where == 'forward':
            conv.weight.data[0, 0] = float('nan')
        else:
            conv.register_forward_hook(lambda module, args, output: Spoil.apply(output))


class Spoil(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[0, 0, 0, 0] = float('inf')
        return grad
"""


def losses(work_dir: Path) -> list[float]:
    log = max(work_dir.glob('*/vis_data/scalars.json'))
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return [record['loss'] for record in records if 'loss' in record]


@pytest.mark.parametrize('flags', [['--amp'], ['--amp-dtype', 'bf16'], ['--cfg-options', 'amp=bf16']], ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason='for the autocast of a CPU')
def test_bf16_trains_on_a_cpu(command, segmentor, workspace, flags) -> None:
    for name, more in (('exact', []), ('amp', flags)):
        ended = command('train.py', segmentor, '--work-dir', name, *more)
        assert ended.status == 0, ended
    exact, amp = losses(workspace / 'exact'), losses(workspace / 'amp')
    assert amp == pytest.approx(exact, rel=0.05) and amp != exact, 'close, and not the same computation'
    saved = torch.load(workspace / 'amp/iter_2.pth', weights_only=False)
    assert all(v.dtype == torch.float32 for v in saved['state_dict'].values() if v.is_floating_point())
    config = (workspace / 'amp/segmentor.py').read_text()
    assert 'mila_mm.AmpOptimWrapper' in config


def test_detector_in_bf16_with_checkpointing_and_channels_last(command, detector, workspace) -> None:
    options = ['model.backbone.with_cp=stage', 'channels_last=True', 'optim_wrapper.accumulative_counts=2']
    ended = command('train.py', detector, '--amp-dtype', 'bf16', '--cfg-options', *options)
    assert ended.status == 0, ended
    assert all(0 < loss < 100 for loss in losses(workspace / 'work_dirs/detector'))


def test_compiled_backbone_trains(command, segmentor, workspace) -> None:
    torch._dynamo.reset()
    options = ['--cfg-options', 'compile_backbone.backend=eager', 'compile_backbone.dynamic=False']
    for name, more in (('plain', []), ('compiled', options)):
        ended = command('train.py', segmentor, '--work-dir', name, *more)
        assert ended.status == 0, ended
    assert losses(workspace / 'compiled') == pytest.approx(losses(workspace / 'plain'), rel=1e-3)
    ended = command('test.py', segmentor, 'compiled/iter_2.pth')
    assert ended.status == 0, 'its checkpoints are ordinary ones'


@pytest.mark.parametrize('amp', [[], ['--amp-dtype', 'bf16']], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('where', ['forward', 'backward'])
def test_debug_nonfinite_names_the_module(command, segmentor, workspace, monkeypatch, where, amp) -> None:
    (workspace / 'poison.py').write_text(POISON)
    monkeypatch.syspath_prepend(str(workspace))
    segmentor.write_text(
        segmentor.read_text() + "\ncustom_imports = dict(imports=['poison'])\n"
        f"custom_hooks = [dict(type='Poison', where='{where}')]\n"
    )
    ended = command('train.py', segmentor, '--debug-nonfinite', *amp)
    assert ended.status == cli.EXIT_USER_ERROR, ended
    what = 'the loss' if where == 'forward' else 'a gradient'
    assert f'--debug-nonfinite: {what} is not finite in iteration 2; it comes from decode_head.conv_seg' in ended.err
    assert 'mean' in ended.err and 'Traceback' not in ended.err
    assert not list((workspace / 'work_dirs/segmentor').glob('*.pth')), 'nothing spoiled is saved'


def test_debug_nonfinite_changes_nothing(command, segmentor, workspace) -> None:
    for name, more in (('plain', []), ('watched', ['--debug-nonfinite'])):
        assert command('train.py', segmentor, '--work-dir', name, *more).status == 0
    plain, watched = (
        torch.load(workspace / name / 'iter_2.pth', weights_only=False)['state_dict'] for name in ('plain', 'watched')
    )
    assert all(torch.equal(plain[key], watched[key]) for key in plain)
