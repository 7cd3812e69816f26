"""Where a NaN or an infinity comes from: the first module that makes one out of finite numbers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mila_mm.engine.nested import tensors_in
from mila_mm.engine.random_state import capture_random_state, restore_random_state
from mila_mm.engine.runner.sharded_model import FullyShardedModel
from mila_mm.errors import UserError
from mila_mm.registry import HOOKS


def is_finite(value: Any) -> bool:
    """Tell whether all floating-point tensors in a value are finite."""
    return all(bool(tensor.detach().isfinite().all()) for tensor in tensors_in(value))


def describe(value: Any) -> str:
    """Describe the tensors in a value in one line each.

    Returns:
        For each tensor its shape and dtype, how many elements are not finite, and of the finite ones
        the least, the greatest, mean and standard deviation.
    """
    lines = []
    for tensor in tensors_in(value):
        values = tensor.detach().float()
        finite = values[values.isfinite()]
        line = f'{"x".join(map(str, tensor.shape)) or "scalar"} {str(tensor.dtype)[6:]}'
        if finite.numel() < values.numel():
            nans = int(values.isnan().sum())
            line += f', {nans} NaN and {values.numel() - finite.numel() - nans} infinite of {values.numel()}'
        if finite.numel():
            spread = finite.std(correction=0).item()
            line += f', from {finite.min():.4g} to {finite.max():.4g}, mean {finite.mean():.4g}, std {spread:.4g}'
        lines.append(line)
    return '; '.join(lines) or 'no tensor'


@dataclass
class Finding:
    """The first place where something was not finite.

    Attributes:
        module: Qualified name of the module, '' for the model itself.
        what: What happened there, with the class of the module.
        inputs: Description of what the module made it from.
        result: Description of what is not finite.
    """

    module: str
    what: str
    inputs: str
    result: str

    def __str__(self) -> str:
        return f'{self.module or "the model itself"} ({self.what})\n  from: {self.inputs}\n  got:  {self.result}'


@dataclass
class Tracer:
    """Watches every module in one forward and one backward.

    In the forward a module is at fault whose inputs were finite and whose output is not; the innermost such module ends
    first and is the one that is named. Where an input of a module is not finite already while nothing was found before,
    the code of the module around it is at fault. In the backward the same holds for the gradients of outputs and
    inputs: each module gets an alias of its inputs, so that its own gradient is seen and not the sum with others'.
    """

    model: nn.Module
    found: Finding | None = None
    _names: dict[nn.Module, str] = field(default_factory=dict)
    _calls: list[tuple[nn.Module, str]] = field(default_factory=list)
    _called: set[nn.Module] = field(default_factory=set)
    _gradients: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._names = {module: name for name, module in self.model.named_modules()}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook all modules while the context lasts."""
        with ExitStack() as stack:
            for module in self._names:
                stack.callback(module.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._leave, with_kwargs=True).remove)
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    stack.callback(parameter.register_hook(self._parameter_hook(name)).remove)
            yield

    def _describe_module(self, module: nn.Module) -> tuple[str, str]:
        return self._names[module], type(module).__name__

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = (args, kwargs)
        self._called.add(module)
        if self.found is None and not is_finite(inputs):
            outer = self._calls[-1][0] if self._calls else self.model
            name, kind = self._describe_module(outer)
            where = f'{kind}, in its own code before it calls {self._names[module]}'
            if module is self.model or not self._calls:
                where = f'{kind}, whose inputs are not finite'
            self.found = Finding(name, where, self._calls[-1][1] if self._calls else 'the data', describe(inputs))
        # Described now: a module may overwrite its input.
        self._calls.append((module, describe(inputs) if self.found is None else ''))
        return self._alias(args, module), self._alias(kwargs, module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        _, inputs = self._calls.pop()
        if self.found is None and not is_finite(output):
            name, kind = self._describe_module(module)
            broken = [key for key, value in module.named_parameters(recurse=False) if not is_finite(value)]
            what = f'{kind}, whose {", ".join(broken)} is not finite' if broken else f'{kind}, in the forward'
            self.found = Finding(name, what, inputs, describe(output))
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(self._output_hook(module))

    def _alias(self, value: Any, module: nn.Module) -> Any:
        """Give a module its inputs under names of its own, whose gradient is what this module alone sends back."""
        if isinstance(value, Tensor):
            if not (value.requires_grad and torch.is_grad_enabled() and value.is_floating_point()):
                return value
            value = value.view_as(value)
            value.register_hook(self._input_hook(module))
            return value
        if type(value) in (list, tuple):
            return type(value)(self._alias(inner, module) for inner in value)
        if type(value) is dict:
            return {key: self._alias(inner, module) for key, inner in value.items()}
        return value

    def _output_hook(self, module: nn.Module) -> Any:
        def check(grad: Tensor) -> None:
            """Note the gradient of the module's output; one that is not finite comes from behind the module."""
            if self.found is not None:
                return
            name, kind = self._describe_module(module)
            if is_finite(grad):
                self._gradients[id(module)] = describe(grad)
                return
            outer = name.rpartition('.')[0]
            self.found = Finding(
                outer,
                f'in its own code, or a loss, behind {name} ({kind}), in the backward',
                'finite gradients',
                f'gradient of the output of {name}: {describe(grad)}',
            )

        return check

    def _input_hook(self, module: nn.Module) -> Any:
        def check(grad: Tensor) -> None:
            """Blame the module for a gradient of its input that is not finite."""
            if self.found is None and not is_finite(grad):
                name, kind = self._describe_module(module)
                came = self._gradients.get(id(module), 'unknown')
                self.found = Finding(
                    name,
                    f'{kind}, in the backward',
                    f'gradient of its output: {came}',
                    f'gradient of its input: {describe(grad)}',
                )

        return check

    def _parameter_hook(self, parameter: str) -> Any:
        def check(grad: Tensor) -> None:
            """Blame the module that used the parameter for a gradient of it that is not finite."""
            if self.found is None and not is_finite(grad):
                name = parameter.rpartition('.')[0]
                while name and self.model.get_submodule(name) not in self._called:
                    name = name.rpartition('.')[0]  # a module that only keeps parameters for the one around it
                module = self.model.get_submodule(name)
                came = self._gradients.get(id(module), 'unknown')
                self.found = Finding(
                    name,
                    f'{type(module).__name__}, in the backward',
                    f'gradient of its output: {came}',
                    f'gradient of {parameter}: {describe(grad)}',
                )

        return check


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Stop before a step whose loss or gradient is not finite, and name the module that it comes from.

    A step costs one maximum over the gradients and one look at it. When that is not finite, the batches since the last
    step are computed again, with the random numbers of the first time and every module watched by a :class:`Tracer`.
    The weights are those before the step. fp16's loss scaling makes gradients overflow on purpose and skips such steps;
    they are followed up only if the loss itself is not finite or the scale has come down to 1.

    In a distributed job all ranks look for it together, since after the reduction every rank has the gradients of all;
    that costs a reduction of two numbers in a step.

    Not for models under FSDP, whose ranks hold different pieces of a gradient.
    """

    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self._batches: list[tuple[Any, dict[str, Any]]] = []
        self._losses: list[Tensor] = []

    def before_train(self, runner: Runner) -> None:
        """Watch the optimizer's steps.

        Raises:
            UserError: If the model is sharded.
        """
        if isinstance(runner.model, FullyShardedModel):
            raise UserError(
                '--debug-nonfinite: expected a model whose parameters are whole, got one under FSDP\n'
                'Run it without model_wrapper_cfg, on one process or under DDP.'
            )
        wrapper = runner.optim_wrapper
        backward, step = wrapper.backward, wrapper.step

        def backward_and_note(loss: Tensor, **kwargs: Any) -> None:
            self._losses.append(loss.detach())
            backward(loss, **kwargs)

        def check_and_step(**kwargs: Any) -> None:
            self._check(runner)
            step(**kwargs)
            self._batches.clear()
            self._losses.clear()

        wrapper.backward, wrapper.step = backward_and_note, check_and_step

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Note the batch and the random numbers that it will meet."""
        self._batches.append((data_batch, capture_random_state()))

    def _check(self, runner: Runner) -> None:
        grads = [
            p.grad
            for group in runner.optim_wrapper.optimizer.param_groups
            for p in group['params']
            if p.grad is not None
        ]
        # The greatest magnitude: a sum of squares could overflow where no gradient does.
        greatest = torch.nn.utils.get_total_norm(grads, norm_type=float('inf'))
        loss = torch.stack([loss.float() for loss in self._losses]).sum()
        broken = torch.stack([~(greatest.to(loss) + loss.abs()).isfinite(), ~loss.isfinite()]).float()
        all_reduce(broken, 'max')  # so that all ranks decide alike
        any_broken, loss_broken = broken.bool().tolist()
        if not any_broken:
            return
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        if scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1 and not loss_broken:
            return
        what = 'the loss' if loss_broken else 'a gradient'
        place = self._first_place(runner)
        where = f'{what} is not finite in iteration {runner.iter + 1}'
        raise UserError(f'--debug-nonfinite: {where}; it comes from {place}')

    def _first_place(self, runner: Runner) -> str:
        """Look for it on all ranks, and return what the first one has found."""
        found = all_gather_object(self._trace(runner))
        for rank, finding in enumerate(found):
            if finding is not None:
                return str(finding) + (f'\n  on rank {rank}' if len(found) > 1 else '')
        return 'no module: computed again with the same random numbers all is finite (non-deterministic kernels?)'

    def _trace(self, runner: Runner) -> Finding | None:
        """Compute the batches since the last step again, watched."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        wrapper = runner.optim_wrapper
        # SyncBN waits for the other ranks, in the forward and in the backward: each rank goes through all of it
        alone, first = get_world_size() == 1, None
        for batch, state in self._batches:
            restore_random_state(state)
            tracer = Tracer(model)
            with torch.compiler.set_stance('force_eager'), tracer.watching():
                with wrapper.optim_context(model):
                    data = model.data_preprocessor(batch, True)
                    losses = model(**data, mode='loss') if isinstance(data, dict) else model(*data, mode='loss')
                loss, _ = model.parse_losses(losses)
                if tracer.found is None and not is_finite(loss):
                    terms = [f'{key} {describe(value)}' for key, value in losses.items() if not is_finite(value)]
                    what = 'the sum or mean of its losses'
                    tracer.found = Finding('', what, 'finite outputs', ', '.join(terms) or describe(loss))
                if tracer.found is None or not alone:
                    parameters = [p for p in model.parameters() if p.requires_grad]
                    scale = getattr(wrapper, 'loss_scaler', None)
                    loss = wrapper.scale_loss(loss)
                    loss = scale.scale(loss) if scale is not None else loss
                    # Not backward(): what has been accumulated stays as it is, and no other rank waits.
                    torch.autograd.grad(loss, parameters, allow_unused=True)
            first = first or tracer.found
            if first is not None and alone:
                break
        return first
