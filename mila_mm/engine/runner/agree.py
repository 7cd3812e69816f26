"""Decisions that one rank takes for all."""

from collections.abc import Callable
from typing import Any, TypeVar

from mmengine.dist import broadcast_object_list, get_world_size, is_main_process

from mila_mm.errors import LostPeerError, UserError

T = TypeVar('T')


def from_rank_0(decide: Callable[[], T]) -> T:
    """Call a function on rank 0, and return or raise on every rank what comes of it.

    A rank that is told nothing would wait in the broadcast for as long as the process group allows.

    Raises:
        UserError: What the function raised, on all ranks.
        LostPeerError: On the other ranks, where the function raised anything else on rank 0.
    """
    box: list[Any] = [None, None]
    failure: Exception | None = None
    if is_main_process():
        try:
            box[0] = decide()
        except UserError as error:
            box[1] = failure = error
        except Exception as error:  # noqa: BLE001 - raised below, once the others know
            box[1], failure = LostPeerError(f'rank 0 failed: {type(error).__name__}: {error}'), error
    if get_world_size() > 1:
        broadcast_object_list(box)
    if failure is not None:
        raise failure
    if box[1] is not None:
        raise box[1]
    return box[0]
