"""Models and optimizers that lie in pieces on the ranks: FSDP and ZeRO in a runner whose checkpoints stay whole.

mmengine's own runner initialises weights after it has wrapped the model, and writes checkpoints on rank 0 alone: the
first fails with parameters that are cut up, the second waits for ever for the other ranks' pieces.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import broadcast, is_main_process
from mmengine.model import MMFullyShardedDataParallel, convert_sync_batchnorm, is_model_wrapper, revert_sync_batchnorm
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner as MMEngineRunner
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)
from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from mila_mm.engine.optimizers.amp import AMP_WRAPPER
from mila_mm.errors import UserError
from mila_mm.registry import MODEL_WRAPPERS


@MODEL_WRAPPERS.register_module()
class FullyShardedModel(MMFullyShardedDataParallel):
    """mmengine's FSDP wrapper with each MILA block as a unit of its own, on GPUs and on CPUs.

    Parameters, gradients and the optimizer's state are divided among the ranks; a block's parameters are whole only
    while the block computes. What is in no block (stem, neck, heads) forms one more unit. Parameters stay in fp32:
    for mixed precision take autocast (``amp = 'bf16'``), since in ``mixed_precision`` of FSDP boxes and losses of the
    heads would be computed in 16 bits as well.

    Args:
        module: The detector or segmentor, with its weights initialised.
        shard_modules: Names of the classes whose instances become units. Defaults to ('Block',), MILA's.
        **kwargs: As for :class:`mmengine.model.MMFullyShardedDataParallel`: ``sharding_strategy`` ('FULL_SHARD',
            'SHARD_GRAD_OP', 'HYBRID_SHARD'), ``cpu_offload``, ``mixed_precision`` ...

    Raises:
        UserError: If the model has no such module.
    """

    def __init__(self, module: nn.Module, shard_modules: Sequence[str] = ('Block',), **kwargs: Any) -> None:
        names = set(shard_modules)
        if not any(type(child).__name__ in names for child in module.modules()):
            raise UserError(
                f'model_wrapper_cfg.shard_modules: the model has no module of class {", ".join(sorted(names))}\n'
                "Name the class of your backbone's blocks, say ['SwinBlock']."
            )
        device = get_device()
        super().__init__(
            module=module,
            auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=lambda child: type(child).__name__ in names),
            device_id=torch.device(device, torch.cuda.current_device()) if device == 'cuda' else torch.device(device),
            **kwargs,
        )


class WholeModel:
    """A sharded model as those see it that read and write whole state dicts. Every rank must call alike."""

    def __init__(self, sharded: FullyShardedDataParallel) -> None:
        self.sharded = sharded

    def state_dict(self) -> OrderedDict[str, Tensor]:
        """Gather the parameters and buffers.

        Returns:
            Them under the names of the model without wrapper.
        """
        gathered = get_model_state_dict(self.sharded, options=StateDictOptions(full_state_dict=True))
        # FSDP leaves a mark on its tensors, which a pickle would keep and a safe reader refuses: detach() drops it.
        state = OrderedDict((name, value.detach()) for name, value in gathered.items())
        # The versions of the modules, by which they tell older checkpoints: FSDP leaves them out.
        state._metadata = OrderedDict(
            (_name_without_wrappers(name), dict(version=module._version))
            for name, module in self.sharded.module.named_modules()
        )
        return state

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
        """Cut a whole state dict up among the ranks.

        Args:
            state_dict: The same on every rank.
            strict: As for :meth:`torch.nn.Module.load_state_dict`.

        Returns:
            Missing and unexpected keys, as a module's method does.
        """
        options = StateDictOptions(full_state_dict=True, strict=strict)
        return set_model_state_dict(self.sharded, dict(state_dict), options=options)

    def get_submodule(self, name: str) -> nn.Module:
        """Return a part of the model by its name."""
        return self.sharded.module.get_submodule(name)


def whole_model(model: nn.Module) -> nn.Module | WholeModel:
    """Look through the wrapper of distributed training.

    Args:
        model: A model, in a wrapper or not.

    Returns:
        The model, or what stands for it where it lies in pieces.
    """
    if isinstance(model, FullyShardedDataParallel):
        return WholeModel(model)
    return model.module if is_model_wrapper(model) else model


class ShardingRunner(MMEngineRunner):
    """mmengine's runner for models under FSDP and optimizers under ZeRO, and for accumulated batches."""

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        """Wrap the model; initialise its weights first where it will be cut up.

        Returns:
            The model, wrapped in a distributed job.
        """
        if not self.distributed or not _cuts_up(model_wrapper_cfg):
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
        if not isinstance(self.model, FullyShardedDataParallel):
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
        is_sharded = isinstance(self.model, FullyShardedDataParallel)
        if is_sharded and optim_wrapper.get('type') == AMP_WRAPPER:
            optim_wrapper.setdefault('use_fsdp', True)
        built = super().build_optim_wrapper(optim_wrapper)
        if is_sharded:
            _keep_state_whole(built.optimizer, self.model)
            if built.clip_grad_kwargs:
                _clip_over_ranks(built, self.model)
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
            if isinstance(self.model, FullyShardedDataParallel):
                stack.enter_context(_answering(self.model.module, WholeModel(self.model).state_dict()))
            if kwargs.get('save_optimizer', True) and self._optimizer_in_pieces():
                stack.enter_context(_answering(self.optim_wrapper, self.optim_wrapper.state_dict()))
            super().save_checkpoint(*args, **kwargs)

    def _optimizer_in_pieces(self) -> bool:
        optimizer = getattr(self.optim_wrapper, 'optimizer', None)
        return isinstance(self.model, FullyShardedDataParallel) or isinstance(optimizer, ZeroRedundancyOptimizer)


def _name_without_wrappers(name: str) -> str:
    return '.'.join(part for part in name.split('.') if part != FSDP_WRAPPED_MODULE)


def _cuts_up(model_wrapper_cfg: Any) -> bool:
    if not isinstance(model_wrapper_cfg, dict):
        return False
    kind = model_wrapper_cfg.get('type')
    kind = MODEL_WRAPPERS.get(kind) if isinstance(kind, str) else kind
    return isinstance(kind, type) and issubclass(kind, FullyShardedDataParallel)


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


@contextmanager
def _whole_states(model: FullyShardedDataParallel) -> Iterator[None]:
    # Copies to the CPU are made on a GPU only: on a CPU they would be views of memory that FSDP frees again.
    offload = get_device() != 'cpu'
    with FullyShardedDataParallel.state_dict_type(
        model,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=offload),
        FullOptimStateDictConfig(offload_to_cpu=offload),
    ):
        yield


def _keep_state_whole(optimizer: Optimizer, model: FullyShardedDataParallel) -> None:
    """Let an optimizer's state dict be the gathered one, by names of parameters, and let it take such a one."""

    def gather(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        with _whole_states(model):
            return FullyShardedDataParallel.optim_state_dict(model, optimizer, optim_state_dict=state)

    def divide(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        with _whole_states(model):
            return FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, state)

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(divide)


def _clip_over_ranks(wrapper: OptimWrapper, model: FullyShardedDataParallel) -> None:
    """Clip by the norm of the whole gradient: each rank's own would scale the pieces differently."""
    if wrapper.grad_name != 'grad_norm':
        return  # by value: element by element, which needs no other rank

    def clip(_: list[Tensor], max_norm: float, norm_type: float = 2.0, **__: Any) -> Tensor:
        return model.clip_grad_norm_(max_norm, norm_type)

    wrapper.clip_func = clip
