"""A hook for trainings under test: says in a file that a phase has been reached, and stays in it for a while.

``FAULTS_PHASE`` names the phase, ``FAULTS_RANK`` the rank that stays in it, ``FAULTS_FOLDER`` where the file goes.
"""

import atexit
import os
import time
from pathlib import Path
from typing import Any

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mila_mm.engine.hooks import checkpoint as checkpointing

STAY = 3.0  # seconds; longer than a signal takes on a busy machine
SECOND = 2  # iterations that a start does before it announces anything


@HOOKS.register_module()
class PhaseHook(Hook):
    """Announce a phase once, and stay in it."""

    def __init__(self) -> None:
        self.phase = os.environ.get('FAULTS_PHASE', '')
        self.concerned = get_rank() == int(os.environ.get('FAULTS_RANK', '0'))
        self.seen = 0

    def before_train(self, runner: Any) -> None:
        """Prepare the phases that are no calls of a hook."""
        if not self.concerned:
            return
        if self.phase == 'saving':
            checkpointing._fill = self.fill
        if self.phase in ('exit', 'slow end'):
            atexit.register(self.reached)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """In a step."""
        self.seen += 1
        if self.seen == SECOND and self.phase in ('step', 'slow end'):
            self.reached('step')

    def before_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """In a validation."""
        if self.phase == 'validation':
            self.reached()

    def fill(self, file: Any, content: bytes) -> None:
        """Write a file in two halves."""
        file.write(content[: len(content) // 2])
        file.flush()
        self.reached()
        file.write(content[len(content) // 2 :])

    def reached(self, phase: str | None = None) -> None:
        """Say so once, and stay."""
        path = Path(os.environ['FAULTS_FOLDER']) / (phase or self.phase)
        if self.concerned and not path.exists():
            draft = path.with_suffix('.draft')
            draft.write_text(str(os.getpid()))
            draft.rename(path)
            time.sleep(STAY)
