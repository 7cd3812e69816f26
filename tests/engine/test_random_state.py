"""The generators' states: what comes back, and what other ranks draw."""

import random

import numpy as np
import pytest
import torch

from mila_mm.engine.random_state import capture_random_state, restore_random_state


def draws():
    """Something of every generator; numpy keeps the second of two normal numbers for the next call."""
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), *torch.randn(3).tolist()


@pytest.fixture(autouse=True)
def put_back():
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


@pytest.mark.parametrize('half_a_pair', [False, True])
def test_the_same_numbers_come_again(half_a_pair):
    if half_a_pair:
        random.gauss(0, 1)
        np.random.randn()
    state = capture_random_state()
    expected = draws(), draws()
    restore_random_state(state)
    assert (draws(), draws()) == expected


def test_a_rank_draws_its_own_from_the_same_state():
    states = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        states.append(capture_random_state())
    seen = {}
    for number, state in enumerate(states):
        for rank in range(4):
            restore_random_state(state, rank)
            seen[number, rank] = draws()
            restore_random_state(state, rank)
            assert draws() == seen[number, rank]
    for one in range(len(draws())):  # no two ranks and no two states share a stream, in any generator
        values = [value[one] for value in seen.values()]
        assert len(set(values)) == len(values)
