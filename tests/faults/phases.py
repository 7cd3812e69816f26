"""A hook for trainings under test: says in a file that a phase has been reached, and stays in it for a while.

``FAULTS_PHASE`` names the phase, ``FAULTS_RANK`` the rank that stays in it, ``FAULTS_FOLDER`` where the file goes.
"""

import atexit
import os
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmseg.datasets import BaseSegDataset

from mila_mm.engine.hooks import checkpoint as checkpointing
from mila_mm.weights.file.sharded import ShardWriter

STAY = 3.0  # seconds; longer than a signal takes on a busy machine
SECOND = 2  # iterations that a start does before it announces anything
PHASE = os.environ.get('FAULTS_PHASE', '')


def reached(phase: str, rank: int) -> None:
    """Say once that a rank has reached a phase, and stay."""
    path = Path(os.environ['FAULTS_FOLDER']) / phase
    if rank == int(os.environ.get('FAULTS_RANK', '0')) and not path.exists():
        draft = path.with_suffix('.draft')
        draft.write_text(str(os.getpid()))
        draft.rename(path)
        time.sleep(STAY)


def before(method: Any, phase: str) -> Any:
    """Let a method announce a phase first."""

    def call(*args: Any, **kwargs: Any) -> Any:
        reached(phase, int(os.environ.get('RANK', '0')))
        return method(*args, **kwargs)

    return call


@torch._dynamo.register_backend(name='faults')
def compile_slowly(graph: Any, inputs: Any) -> Any:
    """Compile to what is there already."""
    reached('compile', get_rank())
    return graph.forward


if PHASE == 'loading':
    BaseSegDataset.load_data_list = before(BaseSegDataset.load_data_list, PHASE)
if PHASE in ('pieces', 'background'):
    ShardWriter.write_data = before(ShardWriter.write_data, PHASE)


@HOOKS.register_module()
class PhaseHook(Hook):
    """Announce a phase once, and stay in it."""

    def __init__(self) -> None:
        self.seen = 0
        self.is_best = False

    def before_train(self, runner: Any) -> None:
        """Prepare the phases that are no calls of a hook."""
        if PHASE in ('saving', 'best'):
            checkpointing._fill = self.fill
        if PHASE == 'best':
            self.mark_best(checkpointing.CheckpointHook)
        if PHASE in ('exit', 'slow end'):
            atexit.register(reached, PHASE, get_rank())

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """In a step; in a collective operation is the rank that the other one waits for."""
        self.seen += 1
        if PHASE == 'bug' and get_rank() == int(os.environ['FAULTS_RANK']):
            raise ZeroDivisionError('as a bug does')
        if self.seen == SECOND and PHASE in ('step', 'collective', 'slow end'):
            reached('step' if PHASE == 'slow end' else PHASE, get_rank())

    def before_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """In a validation."""
        if PHASE == 'validation':
            reached(PHASE, get_rank())

    def mark_best(self, kind: Any) -> None:
        """Note while the best checkpoint is written."""
        inner = kind._save_best_checkpoint

        def save(hook: Any, *args: Any, **kwargs: Any) -> None:
            self.is_best = True
            try:
                inner(hook, *args, **kwargs)
            finally:
                self.is_best = False

        kind._save_best_checkpoint = save

    def fill(self, file: Any, content: bytes) -> None:
        """Write a file in two halves."""
        file.write(content[: len(content) // 2])
        file.flush()
        # a validation that was due may save before the first iteration, where there is nothing new to save for a stop
        if self.seen and (PHASE == 'saving' or self.is_best):
            reached(PHASE, get_rank())
        file.write(content[len(content) // 2 :])
