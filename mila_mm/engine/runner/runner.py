"""mmengine's runner, strict where it is lenient, and clean when a run fails before it starts."""

import os
import shutil
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import RUNNERS
from mmengine.runner import BaseLoop
from mmengine.runner import Runner as MMEngineRunner
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from mila_mm.engine.config.build_errors import building, fault_of_annotations, reading
from mila_mm.engine.data.samples import name_failing_samples
from mila_mm.engine.optimizers.groups import check_kind, merge_groups, regroup, use_fused
from mila_mm.engine.resumed_state import check_groups, check_optimizer, check_resumed, check_schedulers
from mila_mm.engine.runner.find_checkpoint import settle_resume
from mila_mm.engine.runner.fit import load_checkpoint_into
from mila_mm.engine.runner.late_config import LateConfigRunner
from mila_mm.engine.runner.lease import leased
from mila_mm.engine.runner.model_options import apply_model_options
from mila_mm.engine.runner.own_checkpoints import checkpoint_folders
from mila_mm.engine.runner.sharded_model import FullyShardedModel, number_by_name
from mila_mm.engine.runner.sharding import whole_model
from mila_mm.engine.screen import watch
from mila_mm.errors import UserError, printable_path
from mila_mm.weights.file.sharded import is_sharded, read_state
from mila_mm.weights.load import disarm, read_checkpoint

# What comes of it when mmengine's dataset packs an empty list.
_NUMPY_OF_NO_IMAGE = 'need at least one array to concatenate'


class Runner(LateConfigRunner):
    """Runner with four differences to mmengine's.

    - Checkpoints are read without running code, and must fit the model key by key unless the
      config says ``load_strict=False``.
    - Broken annotations, images and config values end in a :class:`UserError` that names them.
    - Until the first batch is there, nothing counts as started: a run that fails
      earlier removes the log folder and the work folder that it made, and has not replaced the config in it.
    - A fixed name of the visualizer in the config does not tie a second run of the same process to the
      first one's folder.

    Takes the arguments of :class:`mmengine.runner.Runner`.
    """

    def __init__(self, *args: Any, work_dir: str, visualizer: Any = None, **kwargs: Any) -> None:
        self._made_folders = _missing_folders(Path(work_dir).absolute())
        # mmengine names the log folder by the second, and another run may have begun in the same one
        self._others = {path.name for path in Path(work_dir).glob('*/')}
        if isinstance(visualizer, dict):
            visualizer = {key: value for key, value in visualizer.items() if key != 'name'}
        try:
            super().__init__(*args, work_dir=work_dir, visualizer=visualizer, **kwargs)
        except BaseException:
            self._leave_nothing()
            raise

    def train(self) -> nn.Module:
        """Train."""
        return self._clean_unless_started(self._train_alone)

    def _train_alone(self) -> nn.Module:
        with ExitStack() as stack:
            # two work folders of one name share a folder in out_dir, and links may make one folder of the two
            for folder in dict.fromkeys(map(os.path.realpath, checkpoint_folders(self.work_dir, self._out_dir()))):
                self._made_folders += _missing_folders(Path(folder))
                stack.enter_context(leased(Path(folder)))
            return super().train()

    def _out_dir(self) -> str | None:
        hook = (self.cfg.get('default_hooks') or {}).get('checkpoint')
        return hook.get('out_dir') if isinstance(hook, dict) else None

    def test(self) -> dict[str, float]:
        """Test."""
        return self._clean_unless_started(super().test)

    def val(self) -> dict[str, float]:
        """Validate."""
        return self._clean_unless_started(super().val)

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Build the logger, whose screen shows less inside of :func:`mila_mm.engine.screen.quiet`."""
        logger = super().build_logger(*args, **kwargs)
        watch(logger)
        return logger

    def build_model(self, model: nn.Module | dict[str, Any]) -> nn.Module:
        """Build the model.

        Raises:
            UserError: If a value in the config is refused.
        """
        with building('model'):
            return apply_model_options(super().build_model(model), self.cfg)

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        """Move the model to its device and wrap it for distributed training.

        Args:
            model_wrapper_cfg: Config of a wrapper, None for mmengine's ``MMDistributedDataParallel``.

        Returns:
            The model, wrapped in a distributed job.
        """
        if not self.distributed or model_wrapper_cfg is not None or get_device() != 'cpu':
            return super().wrap_model(model_wrapper_cfg, model)
        # mmengine names a GPU whatever the device is, which DistributedDataParallel refuses for a model on the CPU.
        # SyncBN has no CPU kernel: each process normalises with its own batch.
        return MMDistributedDataParallel(
            module=revert_sync_batchnorm(model),
            broadcast_buffers=False,
            find_unused_parameters=self.cfg.get('find_unused_parameters', False),
        )

    def build_train_loop(self, loop: Any) -> BaseLoop:
        """Build the training loop; a value in ``train_cfg`` that is refused is a :class:`UserError`."""
        with building('train_cfg'):
            return super().build_train_loop(loop)

    def build_val_loop(self, loop: Any) -> BaseLoop:
        """Build the validation loop; a value in ``val_cfg`` that is refused is a :class:`UserError`."""
        with building('val_cfg'):
            return super().build_val_loop(loop)

    def build_test_loop(self, loop: Any) -> BaseLoop:
        """Build the test loop; a value in ``test_cfg`` that is refused is a :class:`UserError`."""
        with building('test_cfg'):
            return super().build_test_loop(loop)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Build the optimizer, fused on a GPU, its parameters of equal settings in one group.

        A value in ``optim_wrapper`` that is refused is a :class:`UserError`.
        """
        with building('optim_wrapper'):
            if isinstance(optim_wrapper, dict) and isinstance(optim_wrapper.get('optimizer'), dict):
                check_kind(optim_wrapper['optimizer'])
                use_fused(optim_wrapper['optimizer'], self.model)
            built = super().build_optim_wrapper(optim_wrapper)
        self._groupings = merge_groups(built)
        return built

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """Build the schedulers; a value in ``param_scheduler`` that is refused is a :class:`UserError`."""
        with building('param_scheduler'):
            return super().build_param_scheduler(scheduler)

    def register_hook(self, hook: Any, priority: Any = None) -> None:
        """Register a hook; a value in its config that is refused is a :class:`UserError`."""
        with building('hook'):
            super().register_hook(hook, priority)

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        """Build an evaluator.

        Args:
            evaluator: An evaluator, its config or a list of metrics' configs.

        Raises:
            UserError: If a value in the config is refused or an annotation file is broken.
        """
        metrics = evaluator if isinstance(evaluator, list) else [evaluator]
        files = [Path(metric['ann_file']) for metric in metrics if isinstance(metric, dict) and metric.get('ann_file')]
        with reading('evaluator', files):
            return super().build_evaluator(evaluator)

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict[str, Any], seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Build a dataloader whose dataset names the files that it cannot read.

        Args:
            seed: Seed of the sampler. Defaults to None.
            diff_rank_seed: Whether ranks get different seeds. Defaults to False.

        Raises:
            UserError: If a value in the config is refused, an annotation file is broken, or the
                dataset holds no image.
        """
        if isinstance(dataloader, DataLoader):
            return dataloader
        files = _annotation_files(dataloader.get('dataset'))
        try:
            with reading('dataset', files):
                loader = MMEngineRunner.build_dataloader(dataloader, seed=seed, diff_rank_seed=diff_rank_seed)
        except UserError as error:
            if _is_of_loader(error.__cause__):
                raise UserError(f'dataloader: {str(error).removeprefix("dataset: ")}') from error
            if _NUMPY_OF_NO_IMAGE not in str(error):
                raise
            raise _no_image(files) from error
        if len(loader.dataset) == 0:
            raise _no_image(files)
        name_failing_samples(loader.dataset)
        return loader

    def load_checkpoint(
        self, filename: str, map_location: Any = 'cpu', strict: bool | None = None, revise_keys: Any = None
    ) -> dict[str, Any]:
        """Load a checkpoint, all of it or with a report of what did not fit.

        Args:
            filename: A file or an address.
            map_location: As for :func:`torch.load`. Defaults to 'cpu'.
            strict: Whether every key must match. Defaults to the config's ``load_strict``, which defaults to True.
            revise_keys: Not supported.

        Raises:
            UserError: If it cannot be read or does not fit.
        """
        if revise_keys is not None:
            raise NotImplementedError('revise_keys: rename the keys before loading')
        in_pieces = isinstance(self.model, FullyShardedModel) and is_sharded(filename)
        checkpoint = disarm(read_state(filename)) if in_pieces else read_checkpoint(filename, map_location)
        source = f'--resume: {printable_path(filename)}'
        if self._resume:
            check_resumed(checkpoint, source)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        model = whole_model(self.model)
        strict = self.cfg.get('load_strict', True) if strict is None else strict
        if in_pieces:
            self._load_pieces(filename, checkpoint, strict)
        else:
            load_checkpoint_into(model, checkpoint, f'checkpoint {filename}', strict)
        self._has_loaded = True
        # Of a run that loads before it has an optimizer nothing is asked but weights.
        groupings = getattr(self, '_groupings', None)
        if groupings is None:
            return checkpoint
        if self._resume:
            check_groups(checkpoint, source)
        checkpoint = regroup(checkpoint, self.optim_wrapper, groupings)
        optimizer = getattr(self.optim_wrapper, 'optimizer', None)
        if isinstance(optimizer, Optimizer):
            inner = self.model.module if is_model_wrapper(self.model) else self.model
            checkpoint = number_by_name(checkpoint, optimizer, inner)
        if self._resume:
            self._check_fitting(checkpoint, source)
        return checkpoint

    def _check_fitting(self, checkpoint: dict[str, Any], source: str) -> None:
        """Check what schedulers and optimizer are about to take."""
        if self.param_schedulers and 'param_schedulers' in checkpoint:
            states = check_schedulers(checkpoint['param_schedulers'], self.param_schedulers, source)
            checkpoint['param_schedulers'] = states
        optimizer = getattr(self.optim_wrapper, 'optimizer', None)
        if 'optimizer' in checkpoint and isinstance(optimizer, Optimizer):
            check_optimizer(checkpoint['optimizer'], optimizer, source)

    def load_or_resume(self) -> None:
        """Load or resume as the config says; a run that resumes by itself takes the newest readable checkpoint.

        Raises:
            UserError: If there are checkpoints and none can be resumed.
        """
        if not self._has_loaded:
            settle_resume(self)
        super().load_or_resume()

    def _clean_unless_started(self, step: Any) -> Any:
        try:
            return step()
        except BaseException:
            if not self._started:
                self._leave_nothing()
            raise

    def _leave_nothing(self) -> None:
        """Remove what this run wrote, and nothing that was there or that another run writes."""
        if not is_main_process():
            return
        log_dir = getattr(self, '_log_dir', None)
        if log_dir is not None and Path(log_dir).name not in self._others:
            shutil.rmtree(log_dir, ignore_errors=True)
        for folder in self._made_folders:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _missing_folders(path: Path) -> list[Path]:
    """Return a folder and its parents as far as they do not exist yet, the deepest first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _annotation_files(dataset: Any) -> list[Path]:
    """Return the annotation files that a dataset's config names, through its wrappers."""
    if not isinstance(dataset, dict):
        return []
    nested = [dataset.get('dataset'), *(dataset.get('datasets') or [])]
    files = [file for inner in nested for file in _annotation_files(inner)]
    if isinstance(dataset.get('ann_file'), str) and dataset['ann_file']:
        files.append(Path(dataset.get('data_root') or '', dataset['ann_file']))
    return files


def _is_of_loader(error: BaseException | None) -> bool:
    """Tell whether torch's loader itself refused its arguments; the data set is built by then."""
    frames = list(traceback.walk_tb(error.__traceback__)) if error is not None else []
    return bool(frames) and frames[-1][0].f_globals.get('__name__') == DataLoader.__module__


def _no_image(files: list[Path]) -> UserError:
    """Return the error for a dataset in which nothing is left to read."""
    for path in files:
        fault = fault_of_annotations(path)
        if fault:
            return UserError(f'dataset: annotation file {path} {fault}')
    return UserError(
        'dataset: finds no image that it can use\n'
        'Wrong folder or suffix, or metainfo.classes that do not occur in the annotations?'
    )


def build_runner(cfg: Config) -> MMEngineRunner:
    """Build the runner of a config.

    Args:
        cfg: Complete config, with ``work_dir``.

    Returns:
        A :class:`Runner`, or what the config's ``runner_type`` names.
    """
    if 'runner_type' in cfg:
        with building('runner'):
            return RUNNERS.build(cfg)
    with building('config'):
        return Runner.from_cfg(cfg)
