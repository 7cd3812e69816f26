"""Models and optimizers that lie in pieces on the ranks: FSDP and ZeRO in the runner that trains everything else.

mmengine's own runner initialises weights after it has wrapped the model, and writes checkpoints on rank 0 alone: the
first fails with parameters that are cut up, the second waits for ever for the other ranks' pieces.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.device import get_device
from mmengine.dist import broadcast, is_main_process
from mmengine.hooks import EMAHook
from mmengine.model import convert_sync_batchnorm, is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner as MMEngineRunner
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.optim import ZeroRedundancyOptimizer

from mila_mm.engine.runner.sharded_checkpoint import ShardedSaving, load_pieces, pieces
from mila_mm.engine.runner.sharded_model import (
    FullyShardedModel,
    WholeModel,
    clip_by_whole_norm,
    keep_state_whole,
    without_tensors,
)
from mila_mm.errors import UserError
from mila_mm.registry import MODEL_WRAPPERS
from mila_mm.weights.file.sharded import STATE


def whole_model(model: nn.Module) -> nn.Module | WholeModel:
    """Look through the wrapper of distributed training.

    Args:
        model: A model, in a wrapper or not.

    Returns:
        The model, or what stands for it where it lies in pieces.
    """
    if isinstance(model, FullyShardedModel):
        return WholeModel(model)
    return model.module if is_model_wrapper(model) else model


class ShardingRunner(MMEngineRunner):
    """mmengine's runner for models under FSDP and optimizers under ZeRO, and for accumulated batches."""

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        """Wrap the model; initialise its weights first where it will be cut up.

        Returns:
            The model, wrapped in a distributed job.
        """
        if not self.distributed or not cuts_up(model_wrapper_cfg):
            return super().wrap_model(model_wrapper_cfg, model)
        model = model.to(get_device())
        if get_device() == 'cpu':
            model = revert_sync_batchnorm(model)
        elif self.cfg.get('sync_bn'):
            model = convert_sync_batchnorm(model, self.cfg.sync_bn)
        if hasattr(model, 'init_weights'):
            model.init_weights()
        for value in model.state_dict().values():
            broadcast(value)
        return MODEL_WRAPPERS.build(dict(model_wrapper_cfg), default_args=dict(module=model))

    def _init_model_weights(self) -> None:
        if not isinstance(self.model, FullyShardedModel):
            super()._init_model_weights()

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """Build the optimizer; one of a sharded model gathers its state, and clips by the norm over all ranks.

        Raises:
            UserError: If ZeRO is asked for in a job of one process.
        """
        if not isinstance(optim_wrapper, dict):
            return super().build_optim_wrapper(optim_wrapper)
        kind = (optim_wrapper.get('optimizer') or {}).get('type')
        if kind == 'ZeroRedundancyOptimizer' and not self.distributed:
            raise UserError(
                'optim_wrapper.optimizer.type=ZeroRedundancyOptimizer divides its state among processes, got one\n'
                'Start through tools/dist_train.sh, or take the optimizer itself (type=AdamW).'
            )
        built = super().build_optim_wrapper(optim_wrapper)
        if isinstance(self.model, FullyShardedModel):
            if any(isinstance(hook, EMAHook) for hook in self.hooks):
                raise UserError(
                    'EMAHook averages a copy of the model, and one in pieces cannot be copied\n'
                    'Leave it out of custom_hooks, or train without model_wrapper_cfg.'
                )
            keep_state_whole(built.optimizer)
            if built.clip_grad_kwargs and built.grad_name == 'grad_norm':  # by value needs no other rank
                built.clip_func = clip_by_whole_norm
        return built

    def scale_lr(self, optim_wrapper: OptimWrapper, auto_scale_lr: dict[str, Any] | None = None) -> None:
        """Scale the learning rate to the total batch: ranks times images of each times accumulated batches.

        Args:
            auto_scale_lr: ``base_batch_size`` and ``enable``, or None.
        """
        counts = getattr(optim_wrapper, '_accumulative_counts', 1)
        if auto_scale_lr and auto_scale_lr.get('enable') and counts > 1:
            # mmengine leaves the accumulation out
            auto_scale_lr = {**auto_scale_lr, 'base_batch_size': auto_scale_lr['base_batch_size'] / counts}
            self.logger.info(f'{counts} batches are accumulated for a step: the base is divided by {counts}.')
        super().scale_lr(optim_wrapper, auto_scale_lr)

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint; all ranks hand over their pieces, rank 0 writes."""
        with ExitStack() as stack:
            if isinstance(self.model, FullyShardedModel):
                stack.enter_context(_answering(self.model.module, WholeModel(self.model).state_dict()))
            if kwargs.get('save_optimizer', True) and self._optimizer_in_pieces():
                stack.enter_context(_answering(self.optim_wrapper, self.optim_wrapper.state_dict()))
            super().save_checkpoint(*args, **kwargs)

    def save_sharded(
        self,
        saving: ShardedSaving,
        path: Path,
        done: Callable[[], None],
        in_background: bool,
        **options: Any,
    ) -> None:
        """Save a checkpoint of a sharded model, each rank its pieces.

        Args:
            saving: What writes it.
            path: Name of the folder.
            done: Called on rank 0 once it is whole.
            in_background: Whether to return before that.
            **options: As for mmengine's ``save_checkpoint``.
        """
        optimizer = self.optim_wrapper.optimizer if options.get('save_optimizer', True) else None
        tensors = pieces(self.model.module, optimizer)
        saving.save(path, tensors, partial(self.save_state, **options), done, in_background)

    def save_state(self, folder: Path, **options: Any) -> None:
        """Write all but the tensors of model and optimizer into the folder of a sharded checkpoint."""
        with ExitStack() as stack:
            stack.enter_context(_answering(self.model.module, OrderedDict()))
            if options.get('save_optimizer', True):
                with without_tensors(self.optim_wrapper.optimizer):
                    state = self.optim_wrapper.state_dict()
                stack.enter_context(_answering(self.optim_wrapper, state))
            super().save_checkpoint(str(folder), STATE, **options)

    def _load_pieces(self, folder: str, checkpoint: dict[str, Any], strict: bool) -> None:
        """Read each rank's pieces of a sharded checkpoint into the model, and the optimizer's into the checkpoint."""
        optimizer = getattr(self.optim_wrapper, 'optimizer', None) if self._resume else None
        state = load_pieces(Path(folder), self.model.module, optimizer, strict)
        if optimizer is not None and isinstance(checkpoint.get('optimizer'), dict):
            kept = checkpoint['optimizer'].get('state') or {}
            merged = {number: {**kept.get(number, {}), **state.get(number, {})} for number in {**kept, **state}}
            checkpoint['optimizer'] = {**checkpoint['optimizer'], 'state': merged}

    def _optimizer_in_pieces(self) -> bool:
        optimizer = getattr(self.optim_wrapper, 'optimizer', None)
        return isinstance(self.model, FullyShardedModel) or isinstance(optimizer, ZeroRedundancyOptimizer)


def cuts_up(model_wrapper_cfg: Any) -> bool:
    """Tell whether a config of a wrapper asks for a sharded model.

    Raises:
        UserError: If it asks for the older FSDP.
    """
    if not isinstance(model_wrapper_cfg, dict):
        return False
    kind = model_wrapper_cfg.get('type')
    kind = MODEL_WRAPPERS.get(kind) if isinstance(kind, str) else kind
    if isinstance(kind, type) and issubclass(kind, FullyShardedDataParallel):
        raise UserError(
            f'model_wrapper_cfg.type={kind.__name__}: the older FSDP, whose checkpoints this runner does not write\n'
            "Take type='mila_mm.FullyShardedModel', which is torch's fully_shard."
        )
    return isinstance(kind, type) and issubclass(kind, FullyShardedModel)


@contextmanager
def _answering(owner: Any, state: Any) -> Iterator[None]:
    """Let ``owner.state_dict()`` return what has been gathered, on rank 0, where it is asked for alone."""
    if not is_main_process():
        yield
        return
    owner.state_dict = lambda: state
    try:
        yield
    finally:
        del owner.state_dict
