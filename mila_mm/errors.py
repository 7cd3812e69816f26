"""Errors that a user can act on."""


class UserError(Exception):
    """A mistake in what the user gave (a path, a config, a checkpoint, a flag).

    The message is one or two lines: what, where, expected, got, what to do. The
    commands in ``tools/`` print it to stderr without a traceback and exit with 2.
    """


class LostPeerError(UserError):
    """The end of a process because another one of its job has ended, which tells the reason."""
