"""Each rank goes on with its own random numbers."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mila_mm.engine.hooks import resume_state
from mila_mm.engine.hooks.resume_state import ResumeStateHook
from mila_mm.engine.random_state import capture_random_state


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def states_and_what_follows(count: int) -> tuple[list[dict], list[tuple]]:
    """States of ranks that were seeded apart, as ``diff_rank_seed=True`` does, and what each draws next."""
    states, following = [], []
    for rank in range(count):
        seed(100 + rank)
        states.append(capture_random_state())
        following.append(draw())
    assert len(set(following)) == count
    return states, following


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch):
    def become(number: int, size: int) -> None:
        monkeypatch.setattr(resume_state, 'get_rank', lambda: number)
        monkeypatch.setattr(resume_state, 'get_world_size', lambda: size)

    return become


def resumed(tmp_path, **entries) -> tuple:
    """What is drawn first after a checkpoint has been resumed."""
    runner = SimpleNamespace(
        _resume=True, _load_from='iter_1.pth', hooks=[], work_dir=str(tmp_path), model=nn.Linear(1, 1)
    )
    hook = ResumeStateHook()
    hook.after_load_checkpoint(
        runner, dict(optimizer={}, message_hub=dict(runtime_info={}), meta=dict(iter=1, epoch=0)) | entries
    )
    seed(0)
    hook.before_train_epoch(runner)
    return draw()


@pytest.mark.parametrize('size', [2, 3])
def test_a_rank_takes_its_own_state(tmp_path, rank, size) -> None:
    states, following = states_and_what_follows(size)
    for number in range(size):
        rank(number, size)
        assert resumed(tmp_path, random_state=states[0], random_states=states) == following[number]


def test_without_a_state_of_its_own_a_rank_does_not_repeat_rank_0(tmp_path, rank) -> None:
    """From one process to two, or from three to two: rank 0 goes on, the others draw numbers of their own."""
    states, following = states_and_what_follows(3)
    for entries in (dict(random_state=states[0]), dict(random_state=states[0], random_states=states)):
        drawn = []
        for number in range(2):
            rank(number, 2)
            drawn.append(resumed(tmp_path, **entries))
        assert drawn[0] == following[0]
        assert all(own != of_rank_0 for own, of_rank_0 in zip(drawn[1], drawn[0], strict=True))


def test_the_states_of_all_ranks_are_written_in_their_order(rank, monkeypatch) -> None:
    states, _ = states_and_what_follows(2)
    rank(0, 2)
    gathered = []

    def all_gather_object(own):
        gathered.append(own)
        return [own, states[1]]

    monkeypatch.setattr(resume_state, 'all_gather_object', all_gather_object)
    hook, checkpoint = ResumeStateHook(), {}
    runner = SimpleNamespace(train_loop=SimpleNamespace(), train_dataloader=SimpleNamespace())
    seed(100)
    hook.gather_for_checkpoint(runner)
    hook.before_save_checkpoint(runner, checkpoint)
    assert len(gathered) == 1
    for written, state in zip(checkpoint['random_states'], states, strict=True):
        assert torch.equal(written['torch'], state['torch'])
