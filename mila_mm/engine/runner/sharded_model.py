"""A model whose parameters lie in pieces on the ranks, by torch's ``fully_shard``."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import get_world_size
from mmengine.optim import OptimWrapper
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from mila_mm.errors import UserError
from mila_mm.registry import MODEL_WRAPPERS

# What the older FSDP called: whether parameters are cut up again after the forward, and among the GPUs of a node alone.
_STRATEGIES = {
    'FULL_SHARD': (True, False),
    'SHARD_GRAD_OP': (False, False),
    'HYBRID_SHARD': (True, True),
    '_HYBRID_SHARD_ZERO2': (False, True),
}
BLOCKS = ('Block',)
_DTYPES = {
    **dict.fromkeys(('bf16', 'bfloat16', torch.bfloat16), torch.bfloat16),
    **dict.fromkeys(('fp16', 'float16', torch.float16), torch.float16),
    **dict.fromkeys(('fp32', 'float32', torch.float32), torch.float32),
}


@MODEL_WRAPPERS.register_module()
class FullyShardedModel(nn.Module):
    """A model under ``fully_shard`` (FSDP2), with each MILA block as a unit of its own, on GPUs and on CPUs.

    Parameters, gradients and the optimizer's state are divided among the ranks; a block's parameters are whole only
    while the block computes. What is in no block (stem, neck, heads) forms one more unit.

    Args:
        module: The detector or segmentor, with its weights initialised, on its device.
        shard_modules: Names of the classes whose instances become units. Defaults to ('Block',), MILA's.
        reshard_after_forward: Whether a block gives up its whole parameters between forward and backward, which saves
            memory and costs a second gathering. Defaults to True.
        mixed_precision: dtypes in which the units compute and are gathered (``param_dtype``) and in which their
            gradients are summed (``reduce_dtype``), of 'bf16', 'fp16', 'fp32'. They give fp32 on, and stem, neck,
            heads, boxes and losses stay in fp32; parameters and the optimizer do so everywhere. Without it (the
            default), autocast (``amp``) says what is computed in 16 bits.
        replicate_nodes: Whether each machine holds the whole model, divided among its own GPUs. Defaults to False.
        cpu_offload: Whether pieces wait in the host's memory, where the optimizer then steps. Defaults to False.
        sharding_strategy: The older FSDP's name for the two switches above, of 'FULL_SHARD', 'SHARD_GRAD_OP',
            'HYBRID_SHARD', '_HYBRID_SHARD_ZERO2'. Defaults to None.

    Raises:
        UserError: If the model has no such module, or an argument is none of these.
    """

    def __init__(
        self,
        module: nn.Module,
        shard_modules: Sequence[str] = BLOCKS,
        reshard_after_forward: bool = True,
        mixed_precision: Mapping[str, Any] | None = None,
        replicate_nodes: bool = False,
        cpu_offload: bool = False,
        sharding_strategy: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UserError(
                f'model_wrapper_cfg: fully_shard has no {", ".join(sorted(unknown))}; expected some of shard_modules, '
                'reshard_after_forward, mixed_precision, replicate_nodes, cpu_offload, sharding_strategy'
            )
        if sharding_strategy is not None:
            reshard_after_forward, replicate_nodes = _strategy(sharding_strategy)
        units = units_of(module, shard_modules)
        policy = _policy(mixed_precision)
        offload = CPUOffloadPolicy() if cpu_offload and get_device() == 'cuda' else OffloadPolicy()
        options = dict(mesh=_mesh(replicate_nodes), offload_policy=offload)
        for unit in units:
            fully_shard(unit, mp_policy=policy, reshard_after_forward=reshard_after_forward, **options)
            if policy.param_dtype is not None:
                unit.register_forward_pre_hook(partial(_cast_inputs, policy.param_dtype))
        self.module = fully_shard(module, reshard_after_forward=False, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute as the model does."""
        return self.module(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """Train on a batch as the model does."""
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data: Any) -> list:
        """Predict for a validation batch as the model does."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> list:
        """Predict for a test batch as the model does."""
        return self.module.test_step(data)


def units_of(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Find the modules that become units, those inside of others first.

    Args:
        names: Of their classes.

    Raises:
        UserError: If there is none.
    """
    found = [child for child in module.modules() if type(child).__name__ in set(names)]
    if not found:
        raise UserError(
            f'model_wrapper_cfg.shard_modules: the model has no module of class {", ".join(sorted(names))}\n'
            "Name the class of your backbone's blocks, say ['SwinBlock']."
        )
    return found[::-1]


def _strategy(name: str) -> tuple[bool, bool]:
    if name not in _STRATEGIES:
        raise UserError(f'model_wrapper_cfg.sharding_strategy: expected one of {", ".join(_STRATEGIES)}, got {name!r}')
    return _STRATEGIES[name]


def _policy(mixed_precision: Mapping[str, Any] | None) -> MixedPrecisionPolicy:
    if not mixed_precision:
        return MixedPrecisionPolicy()
    unknown = set(mixed_precision) - {'param_dtype', 'reduce_dtype'}
    values = {name: _DTYPES.get(value) for name, value in mixed_precision.items()}
    if unknown or None in values.values():
        raise UserError(
            'model_wrapper_cfg.mixed_precision: expected param_dtype and reduce_dtype of bf16, fp16 or fp32, got '
            f'{dict(mixed_precision)}'
        )
    return MixedPrecisionPolicy(
        param_dtype=values.get('param_dtype'),
        reduce_dtype=values.get('reduce_dtype', torch.float32),
        output_dtype=torch.float32,
        cast_forward_inputs=False,  # not done where a checkpointed block is computed again: _cast_inputs does
    )


def _cast_inputs(dtype: torch.dtype, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def _mesh(replicate_nodes: bool) -> DeviceMesh:
    world = get_world_size()
    local = int(os.environ.get('LOCAL_WORLD_SIZE', '0') or 0) or (torch.cuda.device_count() or world)
    if not replicate_nodes or local >= world or world % local:
        return init_device_mesh(get_device(), (world,))
    return init_device_mesh(get_device(), (world // local, local), mesh_dim_names=('replicate', 'shard'))


class WholeModel:
    """A sharded model as those see it that read and write whole state dicts. Every rank must call alike."""

    def __init__(self, sharded: FullyShardedModel) -> None:
        self.sharded = sharded

    def state_dict(self) -> OrderedDict[str, Tensor]:
        """Gather the parameters and buffers in the host's memory, under the names of the model without wrapper."""
        state = self.sharded.module.state_dict()
        gathered = OrderedDict((name, whole(value)) for name, value in state.items())
        gathered._metadata = state._metadata  # versions of the modules, by which they tell older checkpoints
        return gathered

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
        """Cut a whole state dict up among the ranks.

        Args:
            state_dict: The same on every rank.
            strict: As for :meth:`torch.nn.Module.load_state_dict`.

        Returns:
            Missing and unexpected keys, as a module's method does.
        """
        options = StateDictOptions(full_state_dict=True, strict=strict)
        return set_model_state_dict(self.sharded.module, dict(state_dict), options=options)

    def get_submodule(self, name: str) -> nn.Module:
        """Return a part of the model by its name."""
        return self.sharded.module.get_submodule(name)


def whole(value: Tensor) -> Tensor:
    """Gather a tensor that may lie in pieces, in the host's memory; every rank must call alike."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()


def keep_state_whole(optimizer: Optimizer) -> None:
    """Let an optimizer of a sharded model give its state whole, as without sharding, and take such a one."""

    def gather(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        with_tensors = not getattr(optimizer, 'leaves_tensors_out', False)
        entries = {
            number: {
                key: whole(value) if isinstance(value, Tensor) else value
                for key, value in entry.items()
                if with_tensors or not isinstance(value, Tensor)
            }
            for number, entry in state['state'].items()
        }
        return {**state, 'state': entries}

    def divide(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
        numbers = [number for group in state['param_groups'] for number in group['params']]
        entries = {
            number: {key: _like(value, parameter) for key, value in state['state'][number].items()}
            for number, parameter in zip(numbers, parameters, strict=True)
            if number in state['state']
        }
        return {**state, 'state': entries}

    optimizer.register_state_dict_post_hook(gather)
    optimizer.register_load_state_dict_pre_hook(divide)


@contextmanager
def without_tensors(optimizer: Optimizer) -> Iterator[None]:
    """Let an optimizer of a sharded model leave its tensors out of its state, where they are saved in pieces."""
    optimizer.leaves_tensors_out = True
    try:
        yield
    finally:
        del optimizer.leaves_tensors_out


def _like(value: Any, parameter: Tensor) -> Any:
    """Cut a whole value up as the parameter is that it belongs to; each rank takes its piece of what all have."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or not isinstance(parameter, DTensor):
        return value
    if value.shape != parameter.shape or value.dim() == 0:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def number_by_name(checkpoint: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """Number the parameters of an optimizer's state that names them, as the older FSDP did.

    Args:
        checkpoint: What was read; left as it is where its parameters are numbers.
        model: Without wrapper, its names those in the state.

    Returns:
        The checkpoint, its entry ``optimizer`` replaced where needed.

    Raises:
        UserError: If it names other parameters than this run's optimizer has.
    """
    saved = checkpoint.get('optimizer')
    groups = saved.get('param_groups') if isinstance(saved, Mapping) else None
    if not groups or not all(isinstance(name, str) for group in groups for name in group['params']):
        return checkpoint
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = [[names[id(parameter)] for parameter in group['params']] for group in optimizer.param_groups]
    if [sorted(group['params']) for group in groups] != [sorted(group) for group in ours]:
        raise UserError("--resume: the optimizer's state in the checkpoint is of other parameters than this run's")
    place = {name: number for number, name in enumerate(name for group in ours for name in group)}
    numbered = [
        {**group, 'params': [place[name] for name in ours_of_group]}
        for group, ours_of_group in zip(groups, ours, strict=True)
    ]
    state = {place[name]: entry for name, entry in saved['state'].items() if name in place}
    return {**checkpoint, 'optimizer': {**saved, 'param_groups': numbered, 'state': state}}


def clip_by_whole_norm(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0, **_: Any) -> Tensor:
    """Clip gradients by the norm of all of them, whatever pieces lie on this rank.

    Returns:
        The norm before, a plain tensor, the same on every rank.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters], norm_type)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
