"""Checkpoints as the commands take them: looked at early, and loaded completely or refused in two lines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mila_mm.engine.config.load import one_line
from mila_mm.errors import UserError
from mila_mm.weights.errors import MismatchError
from mila_mm.weights.load import load_model
from mila_mm.weights.report import LoadReport, listed

_SHOWN_KEYS = 10


def check_checkpoint_file(path: str, flag: str) -> None:
    """Check that a local checkpoint is there; names and addresses (``mila://``, ``https://``) pass.

    Args:
        path: What the user gave.
        flag: Where, the first words of the message.

    Raises:
        UserError: If the file does not exist or is a folder.
    """
    if '://' in path:
        return
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f'{flag}: {path} is a folder, expected a checkpoint file (.pth)')
    if not file.is_file():
        raise UserError(f'{flag}: {path} does not exist (looked in {Path.cwd()})')


def load_checkpoint_into(model: nn.Module, checkpoint: Mapping[str, Any], source: str, strict: bool) -> LoadReport:
    """Put a checkpoint into a model.

    Args:
        model: The model, possibly inside a wrapper.
        checkpoint: What :func:`mila_mm.weights.load.read_checkpoint` returned.
        source: Where it comes from, for messages.
        strict: Whether every key and shape must match.

    Returns:
        The report.

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
    parts = [f'{len(keys)} {what} ({listed(keys, _SHOWN_KEYS)})' for what, keys in kinds if keys]
    return one_line(ValueError('; '.join(parts)), limit=3000)
