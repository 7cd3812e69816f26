"""What may be asked of an export, looked at before anything is built, and how a failed writing is told."""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mila_mm.engine.config.checks import check_work_dir
from mila_mm.engine.config.load import one_line
from mila_mm.errors import UserError
from mila_mm.export.deployed import Deployed, example_inputs
from mila_mm.export.formats import FORMATS, LEAST_STEPS, METADATA_MARK, MOST_STEPS, STEP
from mila_mm.export.samples import predict

_MOST_BATCH = 64
_FULL = 1 << 20  # bytes that may be free where a writer gave up for lack of space


def check_out(config: str, checkpoint: str, out: str | None, format: str) -> Path:
    """Return the file to write.

    Raises:
        UserError: If it cannot be written, or would take the place of something that it should not.
    """
    suffix = FORMATS[format].suffix
    path = Path(out if out is not None else Path(config.rpartition('::')[2]).stem + suffix)
    try:
        return _checked_out(config, checkpoint, path, format, suffix)
    except OSError as error:  # a name that is too long, a file that may not be read
        raise UserError(f'--out {path}: {error.strerror}') from error


def _checked_out(config: str, checkpoint: str, path: Path, format: str, suffix: str) -> Path:
    if path.suffix != suffix:
        raise UserError(f'--out {path}: expected a file that ends with {suffix} for --format {format}')
    check_work_dir(path.absolute().parent, '--out')
    if path.exists() and not path.is_file():
        raise UserError(
            f'--out {path} is {"a folder" if path.is_dir() else "no regular file"}, expected a file to write'
        )
    weights = path.with_suffix('.bin')
    written = (path, weights) if format == 'openvino' else (path,)
    for file in written:
        if any(Path(given).exists() and file.exists() and file.samefile(given) for given in (config, checkpoint)):
            raise UserError(f'--out {path}: would overwrite {file}, which is an input; give another name')
    ours = path.exists() and _is_exported(path)
    if format == 'openvino' and weights.exists() and not ours:
        raise UserError(f'--out {path}: its weights would overwrite {weights}, which is of something else')
    if path.exists() and path.stat().st_size and not ours:
        raise UserError(f'--out {path}: is there, and not a file of this command; remove it, or give another name')
    return path


def _is_exported(path: Path) -> bool:
    """Whether a file has the metadata of an exported one, which no format compresses."""
    if not path.stat().st_size:
        return False
    with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(METADATA_MARK) >= 0


def check_finite(deployed: Deployed, checkpoint: str) -> None:
    """Raise UserError for weights that are no numbers: of such a model a file can say nothing wrong."""
    for name, values in deployed.named_parameters():
        if 'auxiliary_head.' not in name and not values.isfinite().all():
            own = name.removeprefix('core.model.')
            raise UserError(f'CHECKPOINT {checkpoint}: {own} has values that are not finite; the training diverged')


def check_size(size: tuple[int, int], dynamic: bool, batch: int) -> None:
    """Raise UserError for sizes and batches that no file is made for."""
    least, most = LEAST_STEPS * STEP if dynamic else STEP, MOST_STEPS * STEP
    if not all(least <= side <= most for side in size):
        raise UserError(f'--size: expected sides from {least} to {most}, got {size[0]} x {size[1]}')
    if dynamic and any(side % STEP for side in size):
        raise UserError(f'--size with --dynamic: expected multiples of {STEP}, got {size[0]} x {size[1]}')
    if not 1 <= batch <= _MOST_BATCH:
        raise UserError(f'--batch: expected 1 to {_MOST_BATCH}, got {batch}')


def check_smallest(smallest: int, size: tuple[int, int], format: str) -> None:
    """Raise UserError where a file for any size does not take the one that was asked for."""
    if min(size) < smallest:
        raise UserError(
            f'--size: a {format} file of this model for any size takes sides from {smallest} on, got {size[0]} x '
            f'{size[1]}'
        )


def check_options(deployed: Deployed, format: str, precision: str, dynamic: bool, pasted: bool, logits: bool) -> None:
    """Raise UserError for what a model does not have, or a format cannot do of it."""
    if pasted and 'masks' not in deployed.output_names:
        raise UserError(f'--masks image: the model is a {deployed.kind} without masks')
    if logits and deployed.kind != 'segmentor':
        raise UserError(f'--logits: only segmentors return them, the model is a {deployed.kind}')
    if not deployed.fixed:
        return
    if precision == 'fp16':
        raise UserError('--precision fp16: DINO computes positions in fp32; export it in fp32')
    if format in ('pt2', 'aoti') or dynamic:
        raise UserError(
            'export: DINO is exported for one size, as onnx, openvino or torchscript: mmdet splits its maps by sizes '
            'that a graph for any size does not know'
        )


@contextmanager
def stating(model: nn.Module) -> Iterator[None]:
    """Tell in one message that a model has no exported form, where stating it fails on a part that it does not know."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f'export: {type(model).__name__} has no exported form: {type(error).__name__}: {one_line(error)}'
        ) from error


def check_runs(model: nn.Module, deployed: Deployed, batch: int, size: tuple[int, int]) -> None:
    """Run a model's exported form on noise of a size.

    Raises:
        UserError: If it fails: the model itself may fail on such images, too, or only what is exported of it.
    """
    inputs = example_inputs(deployed, batch, *size)
    try:
        with torch.no_grad():
            deployed(*inputs)
    except Exception as error:
        why = f'{type(error).__name__}: {one_line(error)}'
        try:
            predict(model, deployed.kind, inputs[0].numpy(), np.array([size] * batch))
        except Exception:  # noqa: BLE001  whatever it is, the first one is told
            raise UserError(
                f'--size: the model does not run on images of {size[0]} x {size[1]}: {why}\n'
                'Sides that are multiples of 32 and not too small suit every model.'
            ) from error
        raise UserError(f'export: {type(model).__name__} has no exported form that runs: {why}') from error


@contextmanager
def telling(path: Path, format: str) -> Iterator[None]:
    """Tell in one message why a file could not be written or run: the disk, or a part that the format does not take.

    Raises:
        UserError: In place of any other exception; exporters and runtimes raise all kinds.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(
            f'--out {path}: cannot be written: {error.strerror or one_line(error)}; no file is left'
        ) from error
    except Exception as error:
        # Writers in C++ do not say that it was the disk.
        if shutil.disk_usage(path.absolute().parent).free < _FULL:
            raise UserError(f'--out {path}: cannot be written: the disk is full; no file is left') from error
        raise UserError(
            f'export: this model does not go into --format {format}: {type(error).__name__}: {one_line(error)}\n'
            'No file is left. MILA_MM_TRACEBACK=1 shows which part of the model it is.'
        ) from error
