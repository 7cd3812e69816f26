"""Train a detector or segmentor."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mila_mm import cli
from mila_mm.errors import UserError
from mila_mm.stopping import StopRequest, stop_signals

if TYPE_CHECKING:
    from mila_mm.engine.config.extras import Extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the subcommand."""
    cli.add_config(parser)
    cli.add_run_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from CHECKPOINT, without one from what the run in the work dir has saved last',
    )
    parser.add_argument(
        '--resume-changed',
        default='',
        metavar='NAMES',
        help='what differs on purpose from the run that --resume continues, which it refuses else: '
        'lr,optimizer,schedule,batch,world_size,accumulation,epoch_length,precision,data',
    )
    parser.add_argument(
        '--pretrained',
        metavar='WEIGHTS',
        help='start the backbone from these weights: mila://tiny-in1k (small, base) or a file; '
        'mila weights list names all',
    )
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--amp-dtype',
        choices=['bf16', 'fp16'],
        help='dtype of --amp, which it implies [bf16 where the device has it, else fp16 with dynamic loss scaling]',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by total batch / auto_scale_lr.base_batch_size of the config',
    )
    _add_extras(parser)
    parser.add_argument(
        '--debug-nonfinite',
        action='store_true',
        help='stop at the first loss or gradient that is not finite, and name the module that it comes from',
    )
    parser.add_argument(
        '--max-nonfinite',
        type=int,
        metavar='N',
        help='end with status 65 after N losses in a row that are NaN or infinite [10]',
    )
    parser.add_argument('--no-check', action='store_true', help='start without checking config and data')


def _add_extras(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--logger',
        action='append',
        choices=['tensorboard', 'wandb', 'mlflow'],
        default=[],
        help='log there as well; may repeat',
    )
    parser.add_argument('--tensorboard', action='store_true', help='short for --logger tensorboard')
    parser.add_argument(
        '--ema', action='store_true', help='validate and save an exponential moving average of the weights'
    )
    parser.add_argument('--early-stop', metavar='METRIC', help='end when METRIC (bbox_mAP, mIoU) no longer gets better')
    parser.add_argument(
        '--patience', type=int, default=5, metavar='N', help='validations that --early-stop waits for a better one [5]'
    )
    parser.add_argument(
        '--save-best', metavar='METRIC', help='keep the checkpoint with the best METRIC too; auto for the first metric'
    )
    parser.add_argument('--keep', type=int, metavar='N', help='keep the N newest checkpoints only')


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    args = cli.parse(add_arguments, argv, description='Train a detector (mmdet) or a segmentor (mmseg).')
    if args.max_nonfinite is not None and args.max_nonfinite < 1:
        raise UserError(f'--max-nonfinite: expected a number of iterations above 0, got {args.max_nonfinite}')
    cli.export_local_rank(args)
    with stop_signals(until_exit=cli.job.owns_process) as stop:
        cli.look_first(args, 'train', 'val')
        _train(args, stop)


def _train(args: argparse.Namespace, stop: StopRequest) -> None:
    from mila_mm.engine.config.extras import Extras
    from mila_mm.engine.screen import quiet

    loggers = dict.fromkeys([*args.logger, *(['tensorboard'] if args.tensorboard else [])])
    extras = Extras(tuple(loggers), args.ema, args.early_stop, args.patience, args.save_best, args.keep)
    with quiet(args.verbose):
        _run(args, stop, extras)


def _run(args: argparse.Namespace, stop: StopRequest, extras: 'Extras') -> None:
    from mila_mm.engine import train
    from mila_mm.engine.config.environment import check_environment, name_ranks

    check_environment()
    name_ranks(args.launcher)
    cli.job.join()
    train(
        args.config,
        work_dir=args.work_dir,
        resume=args.resume,
        pretrained=args.pretrained,
        amp=args.amp or args.amp_dtype is not None,
        amp_dtype=args.amp_dtype,
        auto_scale_lr=args.auto_scale_lr,
        extras=extras,
        debug_nonfinite=args.debug_nonfinite,
        resume_changed=args.resume_changed,
        max_nonfinite=args.max_nonfinite,
        launcher=args.launcher,
        check=not args.no_check,
        cfg_options=args.cfg_options,
        stop=stop,
    )
