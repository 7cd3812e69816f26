"""Checkpoints that all ranks of a sharded model write together: whole or not there, also in the background.

:mod:`mila_mm.weights.file.sharded` describes the folder. It is filled under a hidden name and renamed once every rank
has brought its pieces to the disk.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, is_main_process
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor, zeros
from torch.optim import Optimizer

from mila_mm.errors import UserError, printable_path
from mila_mm.files import UNFINISHED, sync_folder
from mila_mm.weights.errors import CheckpointError
from mila_mm.weights.file.sharded import MODEL, OPTIMIZER, ShardReader, ShardWriter, load_into, numbered
from mila_mm.weights.report import listed

_SHOWN = 10
_AT_A_TIME = 1 << 28  # bytes


@dataclass
class _Pending:
    future: Any
    draft: Path
    path: Path
    done: Callable[[], None]


class ShardedSaving:
    """Saves one checkpoint at a time; every rank must call alike."""

    def __init__(self) -> None:
        self._pending: _Pending | None = None
        self._group: Any = None

    def save(
        self,
        path: Path,
        tensors: dict[str, Tensor],
        write_state: Callable[[Path], None],
        done: Callable[[], None],
        in_background: bool,
    ) -> None:
        """Save, or begin to.

        Args:
            path: Name of the folder.
            tensors: Pieces and whole tensors of this rank. They may change once this returns.
            write_state: Writes everything else into a folder; called on every rank.
            done: Called on rank 0 once the checkpoint has its name.
            in_background: Whether to return once the tensors are copied.

        Raises:
            UserError: If it, or the one before, cannot be written.
        """
        self.wait()
        draft = path.with_name(f'.{path.name}{UNFINISHED}')
        if is_main_process():
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        barrier()
        write_state(draft)
        writer = ShardWriter(draft)
        if not in_background:
            _told(lambda: dcp.save(tensors, storage_writer=writer), path)
            self._finish(draft, path, done)
            barrier()  # nobody goes on to what would remove older ones before it has its name
            return
        if self._group is None:
            self._group = distributed.new_group(backend='gloo')
        copies = {name: _copy(value) for name, value in tensors.items()}
        future = dcp.async_save(copies, storage_writer=writer, process_group=self._group)
        self._pending = _Pending(future, draft, path, done)

    def poll(self) -> None:
        """Give a checkpoint its name if it has been written by now."""
        if self._pending is not None and self._pending.future.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            UserError: If it cannot be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            _told(pending.future.result, pending.path)
            self._finish(pending.draft, pending.path, pending.done)

    def _finish(self, draft: Path, path: Path, done: Callable[[], None]) -> None:
        # The rank that coordinates has heard from all others that their files are on the disk
        if is_main_process():
            _put_in_place(draft, path)
            done()


def _copy(value: Tensor) -> Tensor:
    # Of a GPU torch makes the copy in the host's memory; on a CPU it would write what training goes on to change.
    return value.detach().clone() if value.device.type == 'cpu' else value


def _told(save: Callable[[], Any], path: Path) -> None:
    try:
        save()
    except (OSError, dcp.api.CheckpointException) as error:
        causes = [cause for cause, _ in getattr(error, 'failures', {}).values()]
        full = next((cause for cause in [error, *causes] if isinstance(cause, OSError)), None)
        if full is None:
            raise
        raise UserError(
            f'{printable_path(path)} cannot be written: {full.strerror}\n'
            'What was saved before is whole: make room, then continue with --resume.'
        ) from error


def _put_in_place(draft: Path, path: Path) -> None:
    """Give a finished folder its name; what had it, of a run that was rolled back, goes."""
    sync_folder(draft)
    old = path.with_name(f'.{path.name}.old{UNFINISHED}')
    remove(old)
    if os.path.lexists(path):
        os.rename(path, old)
    os.rename(draft, path)
    sync_folder(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def pieces(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Name the tensors that this rank brings to a checkpoint.

    Args:
        model: Without wrapper.
        optimizer: Its optimizer, None to leave it out.

    Returns:
        Its pieces; on rank 0 also what each rank has whole, such as buffers and counts of steps.
    """
    found = {f'{MODEL}{name}': value for name, value in model.state_dict().items()}
    parameters = [] if optimizer is None else [each for group in optimizer.param_groups for each in group['params']]
    for number, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f'{OPTIMIZER}{number}.{key}'] = value
    return {name: value for name, value in found.items() if isinstance(value, DTensor) or is_main_process()}


def load_pieces(
    folder: Path, model: nn.Module, optimizer: Optimizer | None, strict: bool
) -> dict[int, dict[str, Tensor]]:
    """Read this rank's pieces of a model into it, and those of its optimizer's state.

    Args:
        model: Without wrapper.
        optimizer: Whose state is read, None for none. It is not filled.
        strict: Whether every name and shape of the model must match.

    Returns:
        The state, by number of parameter, cut up as the parameters are.

    Raises:
        UserError: If the folder is damaged or does not fit.
    """
    reader = ShardReader(folder)
    theirs = reader.sizes()
    ours = {f'{MODEL}{name}': value for name, value in model.state_dict().items()}
    if strict:
        check_fit(folder, sizes_of_model(reader), model)
    wanted = {name: value for name, value in ours.items() if theirs.get(name) == value.shape}
    parameters = [] if optimizer is None else [each for group in optimizer.param_groups for each in group['params']]
    for name, size in theirs.items():
        if parameters and name.startswith(OPTIMIZER):
            wanted[name] = _like(reader, name, size, parameters)
    load_into(folder, wanted)
    return numbered(wanted)


def _like(reader: ShardReader, name: str, size: Any, parameters: list[Tensor]) -> Tensor:
    """Make what a tensor of the optimizer is read into: cut up as its parameter where it has the shape of that."""
    number = name.removeprefix(OPTIMIZER).partition('.')[0]
    if not number.isdecimal() or int(number) >= len(parameters):
        raise CheckpointError(f'{reader.path}: its optimizer has a state of parameter {number}, which no group has')
    parameter, empty = parameters[int(number)], reader.empty(name)
    if not isinstance(parameter, DTensor) or size != parameter.shape:
        return empty
    return zeros(size, dtype=empty.dtype, device_mesh=parameter.device_mesh, placements=parameter.placements)


def sizes_of_model(reader: ShardReader) -> dict[str, torch.Size]:
    """Return the shapes of a model's tensors in a folder, by the model's names."""
    return {name.removeprefix(MODEL): size for name, size in reader.sizes().items() if name.startswith(MODEL)}


def check_fit(path: Path, theirs: Mapping[str, torch.Size], model: nn.Module) -> None:
    """Check that a checkpoint holds the tensors of a model, without reading them.

    Args:
        path: Of the checkpoint, for the message.
        theirs: The shapes in it, by name.
        model: Without wrapper; it may lie in pieces.

    Raises:
        UserError: If a name is missing or unexpected, or a shape differs.
    """
    ours = {name: value.shape for name, value in model.state_dict().items()}
    kinds = (
        ('missing', [name for name in ours if name not in theirs]),
        ('unexpected', [name for name in theirs if name not in ours]),
        ('of another shape', [name for name in theirs if name in ours and theirs[name] != ours[name]]),
    )
    parts = [f'{len(names)} {what} ({listed(names, _SHOWN)})' for what, names in kinds if names]
    if parts:
        raise UserError(
            f"checkpoint {printable_path(path)} does not fit the config's model: {'; '.join(parts)}\n"
            'If the difference is meant, --cfg-options load_strict=False takes what fits.'
        )


def broken_in(reader: ShardReader) -> list[str]:
    """Name the parameters of a model in a folder that are not finite; one process reads them, some at a time."""
    broken: list[str] = []
    names = [name for name in reader.index if name.startswith(MODEL)]
    while names:
        part: dict[str, Tensor] = {}
        while names and sum(value.nbytes for value in part.values()) < _AT_A_TIME:
            name = names.pop(0)
            part[name] = reader.empty(name)
        load_into(reader.path, part, alone=True)
        # buffers may hold infinity, and cannot be told from parameters here
        broken += [name.removeprefix(MODEL) for name, value in part.items() if value.isnan().any()]
    return broken
