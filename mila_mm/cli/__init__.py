"""The command ``mila``: a module for each subcommand, and what they share: their parser, and how a failed run ends.

``mila NAME`` is the module ``mila_mm.cli.NAME`` (dashes as underscores) with ``add_arguments(parser)`` and
``main(argv=None)``; the first line of its docstring is its line in ``mila --help``. :mod:`mila_mm.cli.command` finds
it. Neither of them imports torch or mmengine before it is needed, so that ``--help`` and a wrong flag answer at once.
"""

import argparse
import os
import select
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NoReturn

from mila_mm.cli.ending import job
from mila_mm.errors import LostPeerError, UserError
from mila_mm.stopping import EXIT_INTERRUPTED, Stopped

EXIT_USER_ERROR = 2
EXIT_NO_READER = 141  # 128 + SIGPIPE, as shells say it

# Seconds that the other ranks leave to rank 0 for saying what is wrong on all of them and for ending, on which the
# launcher ends them.
_FIRST_WORD = 15.0

# Raised at import or at every start by the libraries below us. Each is about a choice of theirs
# that no user of a command can change, and would bury the one line that the user can act upon.
_NOISE = (
    (UserWarning, r'pkg_resources is deprecated as an API'),
    (UserWarning, r'Fail to import ``MultiScaleDeformableAttention``'),
    (UserWarning, r'The draw is False'),
    (UserWarning, r'The show is True'),
    (UserWarning, r'faster_coco_eval is not installed'),
    (UserWarning, r'Default ``avg_non_ignore`` is False'),
    (UserWarning, r'The shape of value will convert from'),
    (UserWarning, r'Warning: The (bbox|polygon) is out of bounds'),
    (UserWarning, r'`reduce_zero_label` will be deprecated'),
    (UserWarning, r'For binary segmentation, we suggest'),
    (UserWarning, r'threshold is not defined for binary'),
    (UserWarning, r'``build_loss`` would be deprecated soon'),
    (UserWarning, r"Failed to add <class 'mmengine\.visualization\.vis_backend\.LocalVisBackend'>"),
    # with mixed precision, and where gradients are accumulated: mmengine steps them in its own order
    (UserWarning, r'Seems like `optimizer\.step\(\)` has been overridden'),
    (UserWarning, r'Detected call of `scheduler\.step\(\)` before `optimizer\.step\(\)`'),
)


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are a :class:`UserError` instead of a page of usage.

    Attributes:
        program: What messages call the program where a parser is not told; None for the name of the script.
    """

    program: str | None = None

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        super().__init__(prog=prog or self.program, **options)

    def error(self, message: str) -> NoReturn:
        """Report a wrong command line.

        Raises:
            UserError: Always.
        """
        raise UserError(f'{message}\nRun {self.prog} --help for the arguments.')


def parse(
    add_arguments: Callable[[argparse.ArgumentParser], None], argv: Sequence[str] | None, **options: Any
) -> argparse.Namespace:
    """Parse the command line of a subcommand.

    Args:
        add_arguments: Adds the subcommand's arguments to a parser.
        options: For :class:`ArgumentParser`, the description among them.

    Raises:
        UserError: If an argument is wrong.
    """
    parser = ArgumentParser(**options)
    add_arguments(parser)
    return parser.parse_args(argv)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, which ``mila_mm.engine.load_config`` takes."""
    parser.add_argument(
        'config',
        metavar='CONFIG',
        help='config file; mask_rcnn_mila_t_3x or another name of this package; mmdet::FOLDER/FILE, mmseg::FOLDER/FILE',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``train.py`` and ``test.py`` share, under OpenMMLab's names."""
    parser.add_argument(
        '--work-dir', metavar='DIR', help='folder for logs and checkpoints [./work_dirs/NAME_OF_THE_CONFIG]'
    )
    add_cfg_options(parser)
    add_verbose(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes of a distributed job [none]',
    )
    # torch.distributed.launch passes one of these spellings; torchrun sets LOCAL_RANK instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Add ``--verbose``."""
    parser.add_argument(
        '--verbose', action='store_true', help='show on the screen all that goes to the log file, and every warning'
    )


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``; ``mila_mm.engine.load_config`` takes what it collects."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        default=[],
        metavar='KEY=VALUE',
        help='override entries of the config: key.of.entry=value, lists as key="[a,b]" or key=a,b, '
        'tuples as key="(a,b)", without spaces; put it after CONFIG',
    )


def export_local_rank(args: argparse.Namespace) -> None:
    """Set ``LOCAL_RANK`` for mmengine where the launcher only passed the flag, and note which launcher it is.

    Args:
        args: Parsed arguments with ``local_rank`` and ``launcher``.
    """
    job.launcher = args.launcher
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))


def look_first(args: argparse.Namespace, *stages: str) -> None:
    """Refuse what config and data show to be wrong before the imports of a run; a job leaves that to its whole check.

    Args:
        args: Parsed arguments with ``config``, ``cfg_options``, ``no_check`` and ``launcher``.
        stages: Those that will run, of 'train', 'val', 'test'.

    Raises:
        UserError: If something is wrong.
    """
    if args.no_check or args.launcher != 'none':
        return
    from mila_mm.engine.data.first_look import first_look

    first_look(args.config, args.cfg_options, stages)


def execute(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Run a command; turn the user's mistakes into one message and an exit status.

    Anything that is not a :class:`UserError` is a bug and keeps its traceback; all processes of the job end with 1.

    Args:
        main: The command; takes the arguments, None for ``sys.argv[1:]``.
        argv: Arguments without the name of the program. Defaults to None.

    Returns:
        The exit status: 0; 2 after a mistake of the user's; 65 after a training that diverged; 69 after one
        that was stopped in vain again and again; 130 after Ctrl-C;
        141 where nobody reads the output any more;
        75 after another signal that asked a training to stop, which then continues from what it saved. All ranks of a
        job that was stopped end with the same, and rank 0 tells so.
    """
    if '--verbose' not in (sys.argv if argv is None else argv):
        for category, message in _NOISE:
            warnings.filterwarnings('ignore', message=message, category=category)
        os.environ.setdefault('OPENCV_LOG_LEVEL', 'ERROR')  # what a file lacks is told once, with its name
    job.begin(owns_process=argv is None)
    try:
        return _execute(main, argv)
    except Exception:
        job.crashed = True
        raise


def _execute(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None) -> int:
    try:
        main(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():  # a pipe of something else has broken
            raise
        return _without_reader()
    except UserError as error:
        if os.environ.get('MILA_MM_TRACEBACK'):
            raise
        return _end_after(error, argv)
    except Stopped as stopped:
        saved = stopped.checkpoint is not None
        # Where nothing was saved the others may wait for this rank, and it is for the launcher to end them.
        if not saved or not job.rank():
            _say(f'{stopped}\n')
        if not saved:
            return job.fail(stopped.exit_code, waits=False)
        job.leave(stopped.exit_code)
        return stopped.exit_code
    except KeyboardInterrupt:
        sys.stderr.write('interrupted\n')
        return EXIT_INTERRUPTED
    job.leave(0)
    return 0


def _say(text: str) -> None:
    """Write to the screen, which may be gone: that changes no status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.write(text if stream is sys.stderr else '')
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else Python's end tries again, and fails


def _end_after(error: UserError, argv: Sequence[str] | None) -> int:
    """Say what is wrong, once in a job, and return the exit status."""
    rank = job.rank()
    lost = isinstance(error, LostPeerError)
    if rank and lost and os.environ.get('LOCAL_RANK') != '0':
        return EXIT_USER_ERROR  # each machine says it once
    if not lost:
        _join_late(sys.argv if argv is None else argv)
        rank = job.rank()
    if rank and job.peers is None:
        # What is wrong on all ranks, rank 0 says, and the launcher then ends this process within the time.
        time.sleep(_FIRST_WORD)
    if job.peers is None or lost or job.peers.is_first(_FIRST_WORD):
        who = 'error' if rank is None else f'error (rank {rank})'
        _say(f'{who}: {user_message(error)}\n')
    return error.exit_code if lost else job.fail(error.exit_code)


def _join_late(argv: Sequence[str]) -> None:
    """Join the other processes where the mistake comes before that: they make it, too."""
    if job.peers is not None or not job.owns_process:
        return
    words = ' '.join(argv).replace('=', ' ').split()
    job.launcher = next((word for name, word in pairwise(words) if name == '--launcher'), job.launcher)
    if job.launcher not in (None, 'none'):
        from mila_mm.engine.config.environment import name_ranks

        with suppress(UserError, ValueError, KeyError):  # then each says its own
            name_ranks(job.launcher)
            job.join()


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # an error or a hang-up is told unasked
    return bool(poll.poll(0))


def _without_reader() -> int:
    """End as ``ls | head`` does, whose reader has gone: without a word."""
    # what is still in the buffer would raise once more while the interpreter ends
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return EXIT_NO_READER


def user_message(error: UserError) -> str:
    """Return the message of an error, also of one that a dataloader's worker raised.

    torch raises a worker's exception again with the worker's whole traceback as its text;
    the message is what follows the name of the exception there.

    Args:
        error: The error as it was caught.

    Returns:
        The message as it was raised.
    """
    text = str(error)
    if text.startswith('Caught ') and 'Original Traceback' in text:
        return text.rpartition(f'{UserError.__module__}.{UserError.__qualname__}: ')[2].strip()
    return text
