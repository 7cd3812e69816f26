"""Predict on everything that a source gives, and write it."""

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from mila_mm.engine.config.build_errors import plain_failures
from mila_mm.engine.config.checks import check_work_dir
from mila_mm.engine.inference.outputs import Outputs
from mila_mm.engine.inference.predictor import Predictor
from mila_mm.engine.inference.sources import Picture, Source, open_source
from mila_mm.errors import UserError


@dataclass
class Summary:
    """What became of a run.

    Attributes:
        images: Number of images that were predicted on.
        found: Boxes and instances above the threshold, of a detector.
        seconds: Time of reading, predicting, drawing and writing.
        model_seconds: That of the model and its pipeline alone.
        written: A line for each kind of output.
        failures: A line for each image that could not be read, and for a video that broke off.
        interrupted: Whether Ctrl-C ended it, or SIGTERM or SIGHUP.
        signum: The signal that did.
    """

    images: int = 0
    found: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0
    written: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    interrupted: bool = False
    signum: int = signal.SIGINT


class _Interruptions:
    """SIGINT, SIGTERM and SIGHUP as ``KeyboardInterrupt``, which comes between two images and not while one is written.

    Attributes:
        signum: The last signal that came, None before.
        writing: Whether it must wait.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.writing = False

    def receive(self, signum: int, frame: Any) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: At the first one, unless something is being written.
        """
        first, self.signum = self.signum is None, signum
        if first and not self.writing:
            raise KeyboardInterrupt

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Set the handlers, and those of before at the end; outside the main thread Python allows none."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            signals = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, 'SIGHUP') else [])]
            # nohup ignores SIGHUP for a program
            heard = [each for each in signals if signal.getsignal(each) != signal.SIG_IGN]
            before = {signum: signal.signal(signum, self.receive) for signum in heard}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Let a signal wait until the block has ended.

        Raises:
            KeyboardInterrupt: At the end, where one has come.
        """
        self.writing = True
        try:
            yield
        finally:
            self.writing = False
        if self.signum is not None:
            raise KeyboardInterrupt


def predict(
    config: str,
    checkpoint: str,
    source: str,
    *,
    out: str = 'predictions',
    pictures: bool = True,
    write_json: bool = False,
    masks: bool = False,
    score_thr: float = 0.3,
    batch: int = 1,
    device: str | None = None,
    limit: int | None = None,
    cfg_options: Sequence[str] = (),
    progress: Callable[[Iterable[Picture], Source], Iterable[Picture]] | None = None,
) -> Summary:
    """Predict on a picture, a folder, a glob pattern, a video or a camera.

    Args:
        config: As for :class:`Predictor`.
        checkpoint: As for :class:`Predictor`.
        source: As for :func:`mila_mm.engine.inference.sources.open_source`.
        out: Folder to write to. Defaults to ``predictions``.
        pictures: Whether to draw pictures, or a video of a video. Defaults to True.
        write_json: Whether to write ``predictions.json`` in COCO's layout. Defaults to False.
        masks: Whether to write label maps as PNG. Defaults to False.
        score_thr: Boxes and instances of lower scores are left out. Defaults to 0.3.
        batch: Images that the model takes at once. Defaults to 1.
        device: As for :class:`Predictor`.
        limit: Stop after so many images. Defaults to all.
        cfg_options: Overrides as ``key.of.entry=value``.
        progress: Wraps the images, to show how many have come.

    Returns:
        What became of it; a file that cannot be read does not end it.

    Raises:
        UserError: If nothing can be predicted, or the disk is full.
    """
    for flag, value in (('--batch', batch), ('--limit', limit)):
        if value is not None and value < 1:
            raise UserError(f'{flag}: expected a number above 0, got {value}')
    if not 0 <= score_thr <= 1:
        raise UserError(f'--score-thr: expected a score from 0 to 1, got {score_thr}')
    check_work_dir(out, '--out')
    images = open_source(source)  # before the model, which takes longer
    predictor = Predictor(config, checkpoint, device=device, cfg_options=cfg_options)
    options: dict[str, Any] = dict(pictures=pictures, write_json=write_json, masks=masks, score_thr=score_thr)
    outputs = Outputs(out, predictor, images, **options)
    summary = Summary()
    shown = images if progress is None else progress(images, images)
    _predict_all(predictor, _groups(islice(shown, limit), batch), outputs, summary)
    summary.found, summary.failures = outputs.found, images.failures
    return summary


def _predict_all(predictor: Predictor, groups: Iterable[list[Picture]], outputs: Outputs, summary: Summary) -> None:
    start = time.perf_counter()
    interruptions = _Interruptions()
    with interruptions.heard():
        try:
            with plain_failures():
                for group in groups:
                    began = time.perf_counter()
                    samples = _run(predictor, group)
                    summary.model_seconds += time.perf_counter() - began
                    for picture, sample in zip(group, samples, strict=True):
                        with interruptions.held_back():
                            outputs.add(picture, sample)
                            summary.images += 1
        except KeyboardInterrupt:
            summary.interrupted = True
        finally:
            interruptions.writing = True  # Ctrl-C here would leave half a video
            summary.written = outputs.close()
    if interruptions.signum is not None:  # one that came behind the last image is not lost either
        summary.interrupted, summary.signum = True, interruptions.signum
    summary.seconds = time.perf_counter() - start


def _run(predictor: Predictor, group: list[Picture]) -> list[Any]:
    try:
        return predictor([picture.image for picture in group])
    except torch.OutOfMemoryError as error:
        height, width = group[0].image.shape[:2]
        raise UserError(
            f'the GPU has too little memory for {len(group)} images of {width} x {height}: give a smaller --batch'
        ) from error


def _groups(images: Iterable[Picture], size: int) -> Iterator[list[Picture]]:
    iterator = iter(images)
    while group := list(islice(iterator, size)):
        yield group
