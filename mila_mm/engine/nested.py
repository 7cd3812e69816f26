"""Walk the values that models, losses and batches are nested into."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in nested tuples, lists and dicts, in order.

    Unlike ``torch.utils._pytree`` it also looks into subclasses of these, such as mmengine's ``ConfigDict``.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors_in(inner)
