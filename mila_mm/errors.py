"""Errors that a user can act on."""

_SHOWN = 120


def printable(text: str, limit: int = _SHOWN) -> str:
    """Take from what stands in a file or comes from a server what would steer a terminal, forge a line or fill the log.

    Args:
        text: Any text.
        limit: Characters to keep; the middle of longer texts is left out. Defaults to 120.

    Returns:
        The text, with escapes for what cannot be printed.
    """
    if len(text) > limit:
        text = f'{text[: limit - 23]}...{text[-20:]}'
    return ''.join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def printable_path(path: object) -> str:
    """Return a path for a message; unlike other texts it is kept at the length that file systems take."""
    return printable(str(path), 4096)


class UserError(Exception):
    """A mistake in what the user gave (a path, a config, a checkpoint, a flag).

    The message is one or two lines: what, where, expected, got, what to do. The commands in ``tools/`` print it to
    stderr without a traceback and exit with ``exit_code``. Control characters in it, which may have come with a name
    out of a file, are escaped; line breaks are its own, so a name goes through :func:`printable` before it goes in.

    Attributes:
        exit_code: Exit status of the command.
    """

    exit_code = 2

    def __init__(self, *args: object) -> None:
        super().__init__(*(_steering_nothing(arg) if isinstance(arg, str) else arg for arg in args))


def _steering_nothing(message: str) -> str:
    return '\n'.join(printable(line, len(line)) for line in message.split('\n'))


class LostPeerError(UserError):
    """The end of a process because another one of its job has ended, which tells the reason."""


class DivergedError(UserError):
    """The end of a training whose loss or weights are not finite any more.

    Running it again as it is leads to the same; its exit status is none that a scheduler's script tries again.
    """

    exit_code = 65  # EX_DATAERR of sysexits.h
