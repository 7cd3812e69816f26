"""Whether the weights of a model are numbers."""

from mmengine.model import is_model_wrapper
from torch import Tensor, nn


def broken_weights(model: nn.Module) -> list[str]:
    """Name the parameters that are not finite and the buffers that hold a NaN.

    Infinity is no fault in a buffer: masks are made of it.

    Args:
        model: A model, in a wrapper or not. Of a sharded one, the pieces of this rank are looked at.

    Returns:
        Names in the order of the model.
    """
    module = model.module if is_model_wrapper(model) else model
    broken = {name: ~_piece(value).isfinite().all() for name, value in module.named_parameters()}
    broken.update((name, _piece(value).isnan().any()) for name, value in module.named_buffers())
    return [name for name, flag in broken.items() if bool(flag)]


def _piece(value: Tensor) -> Tensor:
    return (value.to_local() if hasattr(value, 'to_local') else value).detach()
