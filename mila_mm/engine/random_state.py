"""The state of every random generator that training draws from, as plain data for a checkpoint."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch

from mila_mm.engine.resumed_state import check_random_state
from mila_mm.weights.errors import CheckpointError


def capture_random_state() -> dict[str, Any]:
    """Take down the states of Python's, numpy's and torch's generators (CPU and the current GPU).

    Returns:
        Tensors, tuples and numbers, which a safe reader reads back.
    """
    name, words, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        'python': random.getstate(),
        'numpy': (str(name), torch.from_numpy(words.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any], rank: int = 0) -> None:
    """Put generators back where :func:`capture_random_state` found them.

    A checkpoint is written by rank 0 and holds its state alone. The other ranks start streams of their
    own that follow from that state and the rank, instead of repeating those of their first epoch.

    Raises:
        CheckpointError: If the state cannot be understood.
    """
    try:
        if rank:
            digest = hashlib.sha256(state['torch'].cpu().numpy().tobytes() + str(rank).encode()).digest()
            seed = int.from_bytes(digest[:4], 'little')
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            return
        version, words, gauss = state['python']
        random.setstate((version, tuple(words), gauss))
        check_random_state(state)
        name, words, *rest = state['numpy']
        np.random.set_state((name, words.cpu().numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state['torch'].cpu())
        if 'cuda' in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state['cuda'].cpu())
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f'random_state of the checkpoint cannot be restored ({type(error).__name__}: {error}); '
            'was the file written by this version?'
        ) from error
