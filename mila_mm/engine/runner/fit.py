"""Whether a checkpoint fits the model that a run is about to continue."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mila_mm.engine.config.load import one_line
from mila_mm.engine.runner.finite import broken_weights
from mila_mm.engine.runner.sharded_checkpoint import broken_in, check_fit, sizes_of_model
from mila_mm.engine.runner.sharded_model import FullyShardedModel
from mila_mm.errors import UserError
from mila_mm.weights.errors import CheckpointError
from mila_mm.weights.file.sharded import ShardReader, is_sharded
from mila_mm.weights.load import load_model, read_checkpoint
from mila_mm.weights.report import LoadReport, MismatchError, listed

_SHOWN_OF_A_KIND = 3


def check_weights(path: Path, model: nn.Module, strict: bool) -> None:
    """Compare a checkpoint with the model that it must fit, and look whether its weights are finite.

    A model that lies in pieces is not filled: that takes all ranks.
    """
    broken: list[str] = []
    if is_sharded(path):
        reader = ShardReader(path)
        if strict:
            check_fit(path, sizes_of_model(reader), getattr(model, 'module', model))
        broken = broken_in(reader)
    elif path.is_file() and isinstance(model, FullyShardedModel):
        state = read_checkpoint(path).get('state_dict') or {}
        if strict:
            check_fit(path, {name: value.shape for name, value in state.items()}, model.module)
        broken = [name for name, value in state.items() if value.isnan().any()]
    elif path.is_file():
        load_checkpoint_into(model, read_checkpoint(path), f'checkpoint {path}', strict)
        broken = broken_weights(model)
    if broken:
        raise CheckpointError(f'{path}: {len(broken)} weights are not finite ({listed(broken, 2)})')


def load_checkpoint_into(model: nn.Module, checkpoint: Mapping[str, Any], source: str, strict: bool) -> LoadReport:
    """Put a checkpoint into a model.

    Args:
        checkpoint: What :func:`mila_mm.weights.load.read_checkpoint` returned.
        source: Where it comes from, for messages.
        strict: Whether every key and shape must match.

    Raises:
        UserError: If ``strict`` and a key is missing or unexpected, or a shape differs.
    """
    try:
        return load_model(model, checkpoint, strict=strict, label=source)
    except MismatchError as error:
        advice = str(error).rpartition('\n')[2]
        raise UserError(f"{source} does not fit the config's model: {_summary(error.report)}\n{advice}") from error


def _summary(report: LoadReport) -> str:
    kinds = (('missing', report.missing), ('unexpected', report.unexpected), ('of another shape', report.mismatched))
    parts = [f'{len(keys)} {what} ({listed(keys, _SHOWN_OF_A_KIND)})' for what, keys in kinds if keys]
    return one_line(ValueError('; '.join(parts)), limit=3000)
