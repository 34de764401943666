"""
torch's default process group, for train functions that call `torch.distributed` themselves.

    init_process_group()  ->  rendezvous "env://"  ->  the attempt's store  ->  torch's gloo or NCCL

torch reads torchrun's environment variables, and rank 0 would open a TCPStore, which has no
authentication. Here the store is `torch_store.py`'s, which only ranks can use; the first
`init_process_group()` creates it. Otherwise the group is torch's own, including its deadlines. If
it still exists when the train function ends, it is destroyed.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from distplat.actors.collectives.rendezvous import GroupMember
from distplat.actors.collectives.torch_store import Store
from distplat.actors.process_setup import variables
from distplat.strategies import torch_compat
from distplat.strategies.function.function_session import TrainContext

_INTERFACE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # of linux/sockios.h


class DefaultGroup:
    """
    One rank's rendezvous for torch's default process group, in one attempt.

    Args:
        member: this worker's rank among all ranks, with a group name of its own.
    """

    def __init__(self, member: GroupMember) -> None:
        self._member = member
        self._store: Store | None = None
        self._groups = 0

    def rendezvous(self) -> Any:
        """
        Wait for all ranks, and return the store of the next group.

        Raises:
            DistplatError: a rank did not join in time, or the attempt was abandoned.
        """
        if self._store is None:
            self._store = Store(self._member)
            if (interface := _interface_of(self._store.host)) is not None:
                os.environ.setdefault(_INTERFACE, interface)
        self._groups += 1
        return torch_compat.prefix_store(self._store.client, f"group-{self._groups}")

    def close(self) -> None:
        """Stop serving the store."""
        if self._store is not None:
            self._store.close(after_failure=False)


@contextmanager
def as_torchrun(context: TrainContext, rendezvous: Callable[[], Any]) -> Iterator[None]:
    """
    Provide the user's code with torchrun's variables and a working `init_process_group()`.

    Args:
        context: of this rank.
        rendezvous: returns the store of each new group, once all ranks have called it.
    """
    had_group = torch_compat.has_default_group()
    with variables(context.variables, _INTERFACE):
        try:
            with torch_compat.env_rendezvous(rendezvous, context.rank, context.world_size):
                yield
        finally:
            if not had_group:
                torch_compat.destroy_default_group()


def _interface_of(address: str) -> str | None:
    """
    Return the network interface with an IPv4 address; None if there is none, and for IPv6.

    By default gloo uses the interface of the host name's address, which is often loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # the interface has no address
                response = fcntl.ioctl(any_socket, _SIOCGIFADDR, request)
                if socket.inet_ntoa(response[20:24]) == address:
                    return name
    return None
