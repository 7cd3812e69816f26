"""What is noted while a row trains, and what keeps the images the same for every backbone."""

from __future__ import annotations

import math
import random
import time
import zlib
from typing import Any

import numpy as np
from mmengine.hooks import Hook
from mmengine.runner import Runner


class DivergedError(Exception):
    """A loss that is not finite ended a run."""


class WatchHook(Hook):
    """Notes losses, times, held-out figures and a checksum of the images, and fixes the augmentation.

    Transforms draw from Python's and numpy's generators, which building a model and sampling boxes use too. Before each
    batch both are set from seed and step, so that every backbone sees the same pixels; the checksum proves it.

    Args:
        seed: Of the run.
        batch: Images of a step.
    """

    def __init__(self, seed: int, batch: int) -> None:
        self.seed, self.batch = seed, batch
        self.losses: list[float] = []
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.curve: list[dict[str, Any]] = []
        self.digest = 0
        self.diverged = False
        self._start = (0.0, 0.0)

    def _fix(self, step: int) -> None:
        random.seed(f'{self.seed} {step}')
        np.random.seed((self.seed * 1_000_003 + step) % 2**32)

    def before_train(self, runner: Runner) -> None:
        """Fix the first batch."""
        self._fix(0)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Take the checksum and the time."""
        for image in data_batch['inputs']:
            self.digest = zlib.crc32(image.contiguous().numpy().tobytes(), self.digest)
        self._start = time.perf_counter(), time.process_time()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Note the step and fix the next batch.

        Raises:
            DivergedError: If the loss is not finite.
        """
        loss = outputs['loss'].item()  # waits for a GPU
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])
        self.losses.append(loss)
        if not math.isfinite(loss):
            self.diverged = True
            raise DivergedError
        self._fix(runner.iter + 1)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Note a point of the curve."""
        point = {key: float(value) for key, value in (metrics or {}).items() if not key.startswith(('IoU.', 'share.'))}
        self.curve.append({'images': len(self.losses) * self.batch, **point})
