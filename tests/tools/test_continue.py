"""A run that continues, as the command line does it, where the config leaves things to chance."""

import signal

import torch

from mila_mm.stopping import Stopped

TRAIN = 'train.py'


def weights(path):
    return torch.load(path, weights_only=False)['state_dict']


def test_without_a_seed_the_first_run_s_counts(command, segmentor, workspace, monkeypatch) -> None:
    """Stopped after iteration 1, the second one goes on with the order of the images that the first one drew."""
    from mila_mm.engine.hooks import stop as stop_hook

    options = [
        '--cfg-options',
        'randomness.seed=None',
        'train_cfg.max_iters=3',
        'train_cfg.val_interval=3',
        'default_hooks.checkpoint.interval=1',
    ]
    assert command(TRAIN, segmentor, '--work-dir', 'a', *options).status == 0
    seed = torch.load(workspace / 'a/iter_3.pth', weights_only=False)['meta']['seed']
    asked = stop_hook.StopHook._asked
    monkeypatch.setattr(stop_hook.StopHook, '_asked', lambda hook: setattr(hook, '_agreed', signal.SIGTERM) or True)
    ended = command(TRAIN, segmentor, '--work-dir', 'b', '--cfg-options', f'randomness.seed={seed}', *options[2:])
    assert ended.status == 75
    assert 'stopped by SIGTERM: --resume continues from' in ended.err
    monkeypatch.setattr(stop_hook.StopHook, '_asked', asked)
    # no seed: drawn anew, and then that of the checkpoint
    assert command(TRAIN, segmentor, '--work-dir', 'b', '--resume', *options).status == 0
    one, two = weights(workspace / 'a/iter_3.pth'), weights(workspace / 'b/iter_3.pth')
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_gradients_that_are_accumulated_are_applied_before_a_stop(command, segmentor, workspace, monkeypatch) -> None:
    from mila_mm.engine.hooks import stop as stop_hook

    monkeypatch.setattr(stop_hook.StopHook, '_asked', lambda hook: setattr(hook, '_agreed', signal.SIGTERM) or True)
    options = ['train_cfg.max_iters=6', 'train_cfg.val_interval=6', 'optim_wrapper.accumulative_counts=2']
    assert command(TRAIN, segmentor, '--work-dir', 'run', '--cfg-options', *options).status == 75
    assert [path.name for path in (workspace / 'run').glob('*.pth')] == ['stop_iter_2.pth']


def test_a_signal_while_the_model_is_built_leaves_nothing(command, segmentor, workspace, monkeypatch) -> None:
    from mila_mm.engine import training

    def stopped(*_: object) -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(training, 'build_runner', stopped)
    ended = command(TRAIN, segmentor, '--work-dir', 'run')
    assert ended.status == 75
    assert 'before the training began' in ended.err
    assert not (workspace / 'run').exists()


def test_a_run_that_diverges_keeps_its_last_sound_checkpoint(command, segmentor, workspace, monkeypatch) -> None:
    from mmengine.model import BaseModel

    parse = BaseModel.parse_losses

    def broken_from_the_fourth(self: BaseModel, losses: dict) -> tuple:
        total, parts = parse(self, losses)
        seen.append(total)
        if len(seen) < 4:
            return total, parts
        return total * float('nan'), dict(parts, loss=total * float('nan'))

    options = ['train_cfg.max_iters=9', 'train_cfg.val_interval=9', 'default_hooks.checkpoint.interval=1']
    options += ['default_hooks.checkpoint.max_keep_ckpts=1']
    for more in ([], ['--max-nonfinite', 2]):
        seen = []
        with monkeypatch.context() as patch:
            patch.setattr(BaseModel, 'parse_losses', broken_from_the_fourth)
            ended = command(TRAIN, segmentor, '--work-dir', 'run', *more, '--cfg-options', *options)
        assert ended.status == 65, ended.err
        assert len(ended.err.splitlines()) == 2 and 'iter_3.pth' in ended.err
        assert [path.name for path in (workspace / 'run').glob('*.pth')] == ['iter_3.pth']
    assert command(TRAIN, segmentor, '--work-dir', 'run', '--resume', '--cfg-options', *options).status == 0
    assert all(value.isfinite().all() for value in weights(workspace / 'run/iter_9.pth').values())
