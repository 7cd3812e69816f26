"""Errors of reading and loading weights, each one naming the file and the cause."""

from __future__ import annotations

from mila_mm.errors import UserError


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
