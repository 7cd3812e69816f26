"""Errors of the weights room, each one naming the file and the cause."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mila_mm.errors import UserError

if TYPE_CHECKING:
    from mila_mm.weights.report import LoadReport


class DownloadError(UserError):
    """A file that could not be fetched; says what to fetch by hand and where to put it."""


class CheckpointError(UserError):
    """A file that is not a usable checkpoint: truncated, a web page, a foreign format, ..."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """A path at which there is no file."""

    def __str__(self) -> str:
        return str(self.args[0])  # OSError would show its errno


class UnsafeCheckpointError(CheckpointError):
    """A file that asks for more than tensors and plain containers."""


class MismatchError(CheckpointError):
    """Weights that do not fit the model.

    Attributes:
        report: What matched and what did not, in full (the message shortens long lists).
    """

    def __init__(self, message: str, report: LoadReport) -> None:
        super().__init__(message)
        self.report = report
