"""What goes wrong around a running training, said in one message."""

import errno
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mila_mm.errors import LostPeerError, UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DEAD_WORKER = re.compile(r'DataLoader worker \(pid\(?s?\)? [\d, ]+\) (is killed by signal: (?P<signal>\w+)|exited)')
_LOST_PEER = re.compile(
    r'Connection (closed|reset) by peer|[Ss]ocket [Tt]imeout|Timed out waiting \d+ms|Broken pipe'
    r'|NCCL communicator was aborted|remote process exited|failed to connect'
)


@contextmanager
def plain_failures() -> Iterator[None]:
    """Turn a full disk, a dead dataloader worker and a lost peer into one message each.

    Yields:
        Nothing.

    Raises:
        UserError: In these cases; everything else passes as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        where = f'{error.filename}: ' if error.filename else ''
        raise UserError(
            f'{where}{error.strerror}\nWhat was saved before is whole: make room, then continue with --resume.'
        ) from error
    except RuntimeError as error:
        message = _dead_worker(str(error))
        if message is not None:
            raise UserError(message) from error
        if _is_lost_peer(error):
            raise LostPeerError(
                'another process of the job has ended or does not answer, see its message; '
                '--resume continues from the last checkpoint'
            ) from error
        raise


def _dead_worker(text: str) -> str | None:
    match = _DEAD_WORKER.search(text)
    if match is None:
        return None
    how = f'was killed ({match["signal"]})' if match['signal'] else 'ended unexpectedly'
    return (
        f'a worker process of the dataloader {how}; if memory was short: '
        '--cfg-options train_dataloader.num_workers=1\nWhat was saved is whole: --resume continues from it.'
    )


def _is_lost_peer(error: RuntimeError) -> bool:
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        return False
    return isinstance(error, getattr(distributed, 'DistError', ())) or _LOST_PEER.search(str(error)) is not None


def say_once_that_the_log_is_full(logger: logging.Logger) -> None:
    """Let a log file that cannot be written any more cost one line instead of a traceback per line of the log.

    Args:
        logger: A logger with file handlers.
    """
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            _watch(handler)


def _watch(handler: logging.FileHandler) -> None:
    usual, said = handler.handleError, []

    def handle(record: logging.LogRecord) -> None:
        """Say once that the disk is full; leave every other error to logging."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError) or error.errno not in _FULL:
            usual(record)
        elif not said:
            said.append(True)
            sys.stderr.write(f'{handler.baseFilename} cannot be written any more: {error.strerror}\n')

    handler.handleError = handle  # type: ignore[method-assign]
