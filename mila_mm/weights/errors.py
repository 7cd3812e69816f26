"""Errors of reading and loading weights, each one naming the file and the cause."""

from __future__ import annotations

from mila_mm.errors import UserError

_SHOWN = 120


def printable(text: str, limit: int = _SHOWN) -> str:
    """Take from what stands in a file or comes from a server what would steer a terminal or fill it.

    Args:
        text: Any text.
        limit: Characters to keep; the middle of longer texts is left out.

    Returns:
        The text, with escapes for what cannot be printed.
    """
    if len(text) > limit:
        text = f'{text[: limit - 23]}...{text[-20:]}'
    return ''.join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class _Told(UserError):
    """An error whose message may quote a file or a server: no more than its lines reach the terminal."""

    def __init__(self, message: str) -> None:
        super().__init__('\n'.join(printable(line, len(line)) for line in message.split('\n')))


class DownloadError(_Told):
    """A file that could not be fetched; says what to fetch by hand and where to put it."""


class CheckpointError(_Told):
    """A file that is not a usable checkpoint: truncated, a web page, a foreign format, ..."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """A path at which there is no file."""

    def __str__(self) -> str:
        return str(self.args[0])  # OSError would show its errno


class UnsafeCheckpointError(CheckpointError):
    """A file that asks for more than tensors and plain containers."""
