"""What all ranks of a job know together: decisions that one takes for all, and numbers that they agree on."""

import logging
import os
import socket
import struct
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from mmengine.dist import all_reduce, broadcast_object_list, get_comm_device, get_world_size, is_main_process
from mmengine.logging import print_log
from torch import Tensor, distributed

from mila_mm.errors import LostPeerError, UserError

T = TypeVar('T')
_PROBE = timedelta(seconds=60)
_SIOCGIFADDR = 0x8915  # of Linux: the address of an interface


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


class Agreement:
    """Numbers that all ranks know together, sent beside the training.

    Over a gloo group of its own, so that no GPU is waited for; where gloo finds no way between the machines, over the
    training's. All ranks make it alike.

    Args:
        timeout: Of the group; None for torch's.
    """

    def __init__(self, timeout: timedelta | None) -> None:
        if distributed.get_backend() != 'gloo':
            _name_interface()
        self._device = torch.device('cpu')
        self._group = distributed.new_group(backend='gloo', timeout=timeout) if _gloo_works() else None
        if self._group is None:
            self._device = get_comm_device(None)
            print_log(
                'gloo does not reach all ranks (GLOO_SOCKET_IFNAME names the interface to take): they agree to stop '
                "over the training's own process group",
                logger='current',
                level=logging.WARNING,
            )

    def begin(self, value: int) -> tuple[Any, Tensor]:
        """Start to find the greatest value of all ranks; ``wait()`` on the first result, then read the second."""
        number = torch.tensor([value], device=self._device)
        return distributed.all_reduce(number, distributed.ReduceOp.MAX, group=self._group, async_op=True), number

    def least(self, value: int) -> int:
        """Return the least value of all ranks."""
        work, number = self.begin(-value)
        work.wait()
        return -int(number)


def _gloo_works() -> bool:
    """Try gloo, on all ranks together."""
    works = torch.ones(1)
    try:
        group = distributed.new_group(backend='gloo', timeout=_PROBE)
        distributed.all_reduce(torch.zeros(1), group=group)
        distributed.destroy_process_group(group)
    except RuntimeError:
        works.zero_()
    all_reduce(works, 'min')  # over the training's group
    return bool(works)


def _name_interface() -> None:
    """Let gloo take the network interface that leads to rank 0; of its own it takes that of the host's name."""
    address = os.environ.get('MASTER_ADDR')
    if 'GLOO_SOCKET_IFNAME' in os.environ or not address or sys.platform != 'linux':
        return
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: the system looks up the route
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                if own == _address_of(probe, name):
                    os.environ['GLOO_SOCKET_IFNAME'] = name
                    return
    except OSError:
        return  # no IPv4 between them: gloo's own choice


def _address_of(probe: socket.socket, interface: str) -> str | None:
    import fcntl  # not on Windows

    try:
        answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack('256s', interface[:15].encode()))
    except OSError:
        return None  # it has none
    return socket.inet_ntoa(answer[20:24])
