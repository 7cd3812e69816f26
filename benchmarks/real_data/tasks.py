"""What is trained: three sets with a model each, in sizes for a CPU and for a GPU, and the order of the runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_data.backbones import NAMES

CONFIGS = Path(__file__).resolve().parent / 'configs'
RATES = (4e-4, 1e-3, 2.5e-3)
"""Learning rates of AdamW that each backbone tries on each set."""
QUICK_IMAGES = 10


@dataclass(frozen=True)
class Task:
    """A set, the model that is trained on it, and for how long.

    Attributes:
        config: Stem of a file in ``configs/``.
        model: What readers call the model.
        shape: Height and width for counting multiply-adds: those of a test image.
        metric: Key of the figure that is compared, and ``goal`` what MILA is to reach in the long schedule.
        tried: Steps of a run that tries a learning rate.
        steps: Steps of each schedule.
        seeds: Seeds of the short schedule.
        curve: Every how many of the held-out images serve for the curve; the last figure is of all of them.
        swapped: Whether ``mila_mm.swap_backbone`` makes the detector from a config with ResNet.
    """

    config: str
    model: str
    shape: tuple[int, int]
    metric: str
    goal: float
    tried: int
    steps: dict[str, int]
    seeds: tuple[int, ...] = (0,)
    curve: int = 4
    swapped: bool = False

    @property
    def detects(self) -> bool:
        """Whether it is a detector."""
        return self.metric.startswith('coco/')

    @property
    def has_masks(self) -> bool:
        """Whether it gives masks of instances."""
        return self.config.startswith('nuclei')


SHORT, LONG = 'short', 'long'
TASKS: dict[str, dict[str, Task]] = {
    'narrow': {
        'nuclei': Task(
            'nuclei', 'Mask R-CNN', (320, 320), 'coco/bbox_mAP_50', 0.75, 64, {SHORT: 640, LONG: 2560}, (0, 1, 2)
        ),
        'bccd': Task(
            'bccd', 'RetinaNet', (180, 240), 'coco/bbox_mAP_50', 0.80, 64, {SHORT: 640, LONG: 2560}, swapped=True
        ),
        'camvid': Task('camvid', 'UperNet', (270, 360), 'mIoU', 45.0, 64, {SHORT: 640, LONG: 2560}, curve=8),
    },
    'tiny': {
        'nuclei': Task(
            'nuclei_gpu', 'Mask R-CNN', (640, 640), 'coco/bbox_mAP_50', 0.75, 64, {SHORT: 640, LONG: 2560}, (0, 1, 2)
        ),
        'camvid': Task('camvid_gpu', 'UperNet', (360, 480), 'mIoU', 45.0, 64, {SHORT: 640, LONG: 2560}, curve=8),
    },
}

Row = dict[str, Any]
KEY = ('size', 'set', 'backbone', 'schedule', 'steps', 'lr', 'seed', 'quick')
"""What tells rows apart. ``lr`` is None until the tries of the same set and backbone have settled it."""


def rates(quick: bool) -> tuple[float, ...]:
    """The learning rates that are tried."""
    return RATES[:1] if quick else RATES


def planned(size: str, quick: bool = False, scale: float = 1.0) -> Iterator[Row]:
    """All rows in the order in which they are worth most.

    The tries of all learning rates and the first seed of the short schedule, set by set; MILA alone in the long
    schedule; more seeds.

    Args:
        size: A key of :data:`TASKS`.
        quick: One step for a try, two for a run, and no long ones.
        scale: Factor on the steps of all schedules.
    """
    tasks = TASKS[size]

    def row(name: str, backbone: str, schedule: str, lr: float | None, seed: int) -> Row:
        steps = tasks[name].tried if schedule == 'try' else tasks[name].steps[schedule]
        steps = (1 if schedule == 'try' else 2) if quick else max(2, round(scale * steps))
        values = (size, name, backbone, schedule, steps, lr, seed, quick)
        return dict(zip(KEY, values, strict=True))

    for name in tasks:
        for backbone in NAMES:
            yield from (row(name, backbone, 'try', lr, 0) for lr in rates(quick))
        yield from (row(name, backbone, SHORT, None, 0) for backbone in NAMES)
    if quick:
        return
    yield from (row(name, 'MILA', LONG, None, 0) for name in tasks)
    for name, task in tasks.items():
        yield from (row(name, backbone, SHORT, None, seed) for seed in task.seeds[1:] for backbone in NAMES)
