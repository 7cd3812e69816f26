"""Pictures of a test run's predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from mila_mm.registry import HOOKS

_WRITABLE = ('.jpg', '.jpeg', '.png', '.bmp')


@HOOKS.register_module()
class PredictionDrawHook(Hook):
    """Draw each tested image with its predictions, beside its ground truth where the data have one.

    The drawing is the config's own visualizer's. mmdet's and mmseg's hooks do nearly this, but each
    puts the pictures elsewhere, and mmdet's lets equal names from two folders overwrite each other.

    Args:
        out_dir: Folder for the pictures, one per image under the image's name; None to write none.
        show: Whether to open a window for each. Defaults to False.
        wait_time: Seconds that a window stays, 0 for until a key is pressed. Defaults to 0.
        draw_options: More arguments of the visualizer's ``add_datasample``, such as mmdet's
            ``pred_score_thr``. Defaults to None.
    """

    def __init__(
        self,
        out_dir: str | None,
        show: bool = False,
        wait_time: float = 0.0,
        draw_options: dict[str, Any] | None = None,
    ) -> None:
        self.out_dir = None if out_dir is None else Path(out_dir)
        self.show = show
        self.wait_time = wait_time
        self.draw_options = dict(draw_options or {})
        self._taken: set[str] = set()

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence[BaseDataElement] | None = None,
    ) -> None:
        """Draw the images of a batch."""
        for sample in outputs or ():
            image = mmcv.imfrombytes(get(sample.img_path), channel_order='rgb')
            target = None if self.out_dir is None else str(self.out_dir / self._name_for(Path(sample.img_path)))
            runner.visualizer.add_datasample(
                Path(sample.img_path).name,
                image,
                data_sample=sample,
                show=self.show,
                wait_time=self.wait_time,
                out_file=target,
                step=batch_idx,
                **self.draw_options,
            )

    def _name_for(self, image: Path) -> str:
        suffix = image.suffix if image.suffix.lower() in _WRITABLE else '.png'
        name = f'{image.stem}{suffix}'
        if name in self._taken:
            name = f'{image.parent.name}_{name}'
        count = 1
        while name in self._taken:
            count += 1
            name = f'{image.parent.name}_{image.stem}_{count}{suffix}'
        self._taken.add(name)
        return name
