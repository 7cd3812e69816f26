"""Errors that a user can act on."""


class UserError(Exception):
    """A mistake in what the user gave (a path, a config, a checkpoint, a flag).

    The message is one or two lines: what, where, expected, got, what to do. The
    commands in ``tools/`` print it to stderr without a traceback and exit with ``exit_code``.

    Attributes:
        exit_code: Exit status of the command.
    """

    exit_code = 2


class LostPeerError(UserError):
    """The end of a process because another one of its job has ended, which tells the reason."""


class DivergedError(UserError):
    """The end of a training whose loss or weights are not finite any more.

    Running it again as it is leads to the same; its exit status is none that a scheduler's script tries again.
    """

    exit_code = 65  # EX_DATAERR of sysexits.h
