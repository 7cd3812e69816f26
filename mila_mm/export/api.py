"""``export_model``: from a config and a checkpoint to a file that has been run and compared."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mila_mm.engine.config.build_errors import building
from mila_mm.engine.config.load import load_config, one_line, scope_of
from mila_mm.engine.inference.classes import saved_meta
from mila_mm.engine.runner.fit import load_checkpoint_into
from mila_mm.errors import UserError
from mila_mm.export.checks import (
    check_finite,
    check_options,
    check_out,
    check_runs,
    check_size,
    check_smallest,
    stating,
    telling,
)
from mila_mm.export.compare import Comparison, compare, tolerance_for
from mila_mm.export.deployed import Deployed, example_inputs
from mila_mm.export.formats import FORMATS, MOST_STEPS, STEP, Run, check_packages
from mila_mm.export.metadata import metadata, settings_of
from mila_mm.export.pipelines import check_pipeline
from mila_mm.export.samples import contents, find_images, inputs_of, load_images, predict
from mila_mm.files import UNFINISHED, move_into_place
from mila_mm.weights.load import read_checkpoint

_REPEATS = 5

Sample = tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], list[dict[str, Any]]]


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        kind: 'detector', 'segmentor' or 'classifier'.
        bytes: Its size, for OpenVINO with the weights beside it.
        operators: How often each operator is in it; empty where the format does not tell.
        comparison: With the model, at all sizes that were tried.
        shapes: These sizes, height and width.
        smallest: The smallest side of images that the file takes; None where it takes one size.
        images: What it was compared on, in words.
        seconds: Of one batch at the exported size, the file's and the model's, medians.
        notes: What the user should know.
    """

    path: Path
    kind: str
    bytes: int
    operators: dict[str, int]
    comparison: Comparison
    shapes: list[tuple[int, int]]
    smallest: int | None
    images: str
    seconds: tuple[float, float]
    notes: list[str] = field(default_factory=list)


def export_model(
    config: str,
    checkpoint: str,
    *,
    format: str = 'onnx',
    size: tuple[int, int],
    dynamic: bool = False,
    batch: int = 1,
    precision: str = 'fp32',
    masks: str = 'box',
    logits: bool = False,
    out: str | None = None,
    images: Sequence[str] = (),
    cfg_options: Sequence[str] = (),
) -> Exported:
    """Export a trained model, run the file, and compare it with the model.

    Args:
        config: Path of a config, or ``mmdet::`` / ``mmseg::`` and a path there.
        checkpoint: File, name or address of its weights.
        format: 'onnx', 'pt2' (torch.export), 'aoti' (compiled for this machine's CPU), 'torchscript' or 'openvino'.
        size: Height and width of the images that the file takes.
        dynamic: Whether to take any multiples of 32 as height and width.
        batch: Images of one call.
        precision: 'fp32', or 'fp16' for the network between preprocessing and boxes.
        masks: 'box', 28 x 28 probabilities over each box, or 'image', pasted and thresholded.
        logits: Whether a segmentor's file returns logits too.
        out: File to write; an exported one that is there is replaced at the end. Defaults to the config's name with the
            format's suffix, in the current folder.
        images: Files or folders to compare on. Defaults to the config's test set where it is here, else drawn ones.
        cfg_options: Overrides as ``key.of.entry=value``.

    Returns:
        What was written.

    Raises:
        UserError: For anything in the arguments that does not work, a model without an exported form, and a file that
            differs from the model. No file is left then.
    """
    check_packages(format)
    path = check_out(config, checkpoint, out, format)
    check_size(size, dynamic, batch)
    cfg = load_config(config, cfg_options)
    paths = find_images(images, cfg, batch)
    model, notes = load_model(cfg, checkpoint)
    pasted, shaped = masks == 'image', {'every_row': FORMATS[format].every_row, 'multiple': STEP if dynamic else 1}
    with stating(model):
        deployed = Deployed(model, precision, pasted=pasted, logits=logits, **shaped).eval()
    check_options(deployed, format, precision, dynamic, pasted, logits)
    shapes = _shapes(size, dynamic)
    settings = settings_of(deployed)
    asked = {'size': list(size), 'any_multiple_of': STEP if dynamic else None, 'batch': batch, 'precision': precision}
    about = metadata(cfg, model.dataset_meta, deployed, config, settings, **asked, notes=notes)
    inputs = example_inputs(deployed, batch, *size)
    for shape in shapes:
        check_runs(model, deployed, batch, shape)
    check_finite(deployed, checkpoint)
    samples = [_sample(model, deployed, paths, batch, shape) for shape in shapes]
    comparison, tolerance = Comparison(), tolerance_for(precision, deployed.ranked)
    with telling(path, format), _drafting(path) as draft, telling(path, format):
        smallest = FORMATS[format].write(draft, deployed, inputs, dynamic, about)
        if smallest is not None:
            check_smallest(smallest, size, format)
            shapes.append((smallest, smallest))
            samples.append(_sample(model, deployed, paths, batch, shapes[-1]))
        run = FORMATS[format].load(draft, deployed, torch.get_num_threads())
        for shape, (_, sizes, named, expected) in zip(shapes, samples, strict=True):
            compare(deployed.kind, run(named), expected, sizes, tolerance, settings, comparison)
            if comparison.faults:
                raise UserError(
                    f'export: the {format} file differs from the model at {shape[0]} x {shape[1]}, and is not kept: '
                    f'{comparison.faults[0]}'
                )
        seconds = _times(run, model, deployed.kind, samples[0])
        operators = _operators(draft, format)
    notes += _doubts(deployed.kind, comparison, logits)
    total = sum(x.stat().st_size for x in (path, path.with_suffix('.bin')) if x.exists() and _belongs(x, path, format))
    shown = ', '.join(x.name for x in paths) if paths else 'drawn images (no --images, and no test set here)'
    return Exported(path, deployed.kind, total, operators, comparison, shapes, smallest, shown, seconds, notes)


def load_model(cfg: Config, checkpoint: str) -> tuple[nn.Module, list[str]]:
    """Build a config's model, load a checkpoint completely, and return it in eval mode, with notes for the user.

    The model's ``dataset_meta`` is what the checkpoint says of its data set.

    Raises:
        UserError: If the config cannot be built, or the checkpoint is another model's.
    """
    scope = scope_of(cfg)
    init_default_scope(scope)
    model_cfg = ConfigDict(cfg.model)
    if cfg.get('data_preprocessor'):  # as mmengine's runner takes it
        model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
    _without_pretrained(model_cfg)
    notes = check_pipeline(cfg)
    with building('model'):
        model = MODELS.build(model_cfg).eval()
    try:
        content = read_checkpoint(checkpoint)
    except FileNotFoundError as error:
        raise UserError(f'CHECKPOINT {checkpoint} does not exist') from error
    strict = bool(cfg.get('load_strict', True))
    missing = load_checkpoint_into(model, content, f'checkpoint {checkpoint}', strict).missing
    if missing:
        notes.append(f'load_strict=False: {len(missing)} tensors of the model are not in the checkpoint, and random')
    model.dataset_meta = saved_meta(content)
    if scope == 'mmseg' and getattr(model, 'test_cfg', {}) is None:
        model.test_cfg = ConfigDict(mode='whole')
    if scope == 'mmseg' and getattr(model, 'test_cfg', {}).get('mode') == 'slide':
        model.test_cfg.mode = 'whole'
        notes.append('the config tests in sliding windows; the file takes each image as a whole')
    return model, notes


def _without_pretrained(part: Any) -> None:
    """Take out weights to start from: the checkpoint replaces them."""
    if isinstance(part, dict):
        for name in ('init_cfg', 'pretrained'):
            if part.get(name):
                part[name] = None
        for value in part.values():
            _without_pretrained(value)
    elif isinstance(part, (list, tuple)):
        for value in part:
            _without_pretrained(value)


def _shapes(size: tuple[int, int], dynamic: bool) -> list[tuple[int, int]]:
    """The sizes to compare at: that of the export and, if others are to do, one of the other orientation.

    The smallest that the file takes comes to them when it is written.
    """
    if not dynamic:
        return [size]
    height, width = size
    step = STEP if max(size) < MOST_STEPS * STEP else -STEP
    return [size, (width, height) if height != width else (height, width + step)]


def _doubts(kind: str, comparison: Comparison, logits: bool) -> list[str]:
    """Notes where images show too little for the comparison to say much."""
    if kind == 'detector' and not comparison.detections:
        return ['the model found nothing on the images, so that only this was compared; give others by --images']
    if kind == 'segmentor' and len(comparison.labels) == 1 and not logits:
        return [
            'the model gives every pixel of the images one label, so that little was compared; give others by '
            '--images, or --logits'
        ]
    return []


@contextmanager
def _drafting(path: Path) -> Iterator[Path]:
    """Give a name to write to, in a folder of its own beside the file; what lies there goes into place at the end."""
    place = path.absolute().parent
    new = [folder for folder in (place, *place.parents) if not folder.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{path.stem}.', suffix=UNFINISHED, dir=place) as folder:
            draft = Path(folder) / path.name
            yield draft
            for file in sorted(Path(folder).iterdir(), key=lambda x: x == draft):  # what belongs to it first
                with file.open('rb+') as content:
                    os.fsync(content.fileno())
                move_into_place(file, path.with_name(file.name))
    except BaseException:
        for folder in new:  # an empty folder would be a trace, too
            with suppress(OSError):
                folder.rmdir()
        raise


def _belongs(file: Path, path: Path, format: str) -> bool:
    return file == path or format == 'openvino'


def _operators(path: Path, format: str) -> dict[str, int]:
    if format != 'onnx':
        return {}
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())


def _sample(model: nn.Module, deployed: Deployed, paths: Sequence[Path], batch: int, shape: tuple[int, int]) -> Sample:
    """Images of a size, the sizes of their content, both by the names of a file's inputs, and what the model says."""
    images = load_images(paths, batch, *shape)
    sizes = contents(deployed, batch, *shape)
    try:
        expected = predict(model, deployed.kind, images, sizes)
    except Exception as error:  # of its own code, or of the libraries'
        raise UserError(
            f'export: the model does not run on images of {shape[0]} x {shape[1]}: {type(error).__name__}: '
            f'{one_line(error)}'
        ) from error
    return images, sizes, inputs_of(deployed, images, sizes), expected


def _times(run: Run, model: nn.Module, kind: str, sample: Sample) -> tuple[float, float]:
    """Median seconds of the file and of the model, in turns."""
    images, sizes, named, _ = sample
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_REPEATS):
        for kept, function in zip(
            times, (lambda: run(named), lambda: predict(model, kind, images, sizes)), strict=True
        ):
            start = time.perf_counter()
            function()
            kept.append(time.perf_counter() - start)
    return median(times[0]), median(times[1])
