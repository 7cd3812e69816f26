"""What a resumed checkpoint says about files is taken only where this run may have written them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mila_mm.engine.hooks.checkpoint import CheckpointHook
from mila_mm.engine.hooks.resume_state import ResumeStateHook
from mila_mm.engine.random_state import capture_random_state


def believed(work_dir: Path, best: str, out_dir: str | None = None) -> str | None:
    """Return which best checkpoint a run believes in that resumes a checkpoint which names one."""
    hook = CheckpointHook(out_dir=out_dir)
    runner = SimpleNamespace(_resume=True, hooks=[hook], work_dir=str(work_dir), model=nn.Linear(1, 1))
    info = dict(best_ckpt=best)
    checkpoint = dict(
        optimizer={}, message_hub=dict(runtime_info=info), random_state=capture_random_state(), meta=dict(iter=1)
    )
    ResumeStateHook().after_load_checkpoint(runner, checkpoint)
    return info.get('best_ckpt')


def touch(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({}, path)
    return str(path)


@pytest.mark.parametrize('spelling', ['{}', '{}/', './{}', '{}/../out', '{}//'])
def test_the_best_checkpoint_in_out_dir_is_the_run_s(tmp_path, monkeypatch, spelling) -> None:
    monkeypatch.chdir(tmp_path)
    best = touch(tmp_path / 'out/run/best_x_iter_3.pth')
    for out_dir in (spelling.format('out'), str(tmp_path / 'out')):
        got = believed(tmp_path / 'run', best, out_dir)
        assert got is not None and Path(got).samefile(best)


def test_the_best_checkpoint_of_a_folder_that_was_moved(tmp_path) -> None:
    best = touch(tmp_path / 'run/best_x_iter_3.pth')
    assert believed(tmp_path / 'run', '/where/it/was/best_x_iter_3.pth') == best


def test_one_on_remote_storage(tmp_path) -> None:
    best = 's3://bucket/runs/run/best_x_iter_3.pth'
    assert believed(tmp_path / 'run', best, 's3://bucket/runs/') == best
    for foreign in ('s3://bucket/runs/run/../other/best_x.pth', 's3://other/runs/run/best_x.pth', 's3://bucket/runs/x'):
        assert believed(tmp_path / 'run', foreign, 's3://bucket/runs/') is None


@pytest.mark.parametrize('out_dir', [None, 'out'])
def test_what_lies_elsewhere_is_left_alone(tmp_path, out_dir) -> None:
    out_dir = out_dir and str(tmp_path / out_dir)
    for path in (tmp_path / 'other/best_x.pth', tmp_path / 'best_x.pth', tmp_path / 'out/other/best_x.pth'):
        assert believed(tmp_path / 'run', touch(path), out_dir) is None
