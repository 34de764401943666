"""
torch's default process group, for what a train function calls of `torch.distributed` itself.

    init_process_group()  ->  rendezvous "env://"  ->  the attempt's store  ->  torch's gloo or NCCL

torch finds the ranks by torchrun's variables, and rank 0 would open a store that answers everybody.
Here the store is one of ours (`torch_store.py`), which answers ranks alone, and it is made when a
function first asks for it. In all else the group is torch's own, its
deadlines included. What is left of it when the function ends is destroyed.
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
    One rank's way to the others, for torch's default process group, in one attempt.

    Args:
        member: this worker's rank, among all; the name is the group's alone.
    """

    def __init__(self, member: GroupMember) -> None:
        self._member = member
        self._store: Store | None = None
        self._made = 0

    def rendezvous(self) -> Any:
        """
        Give the store of the next group, once all ranks are here.

        Raises:
            DistplatError: a rank did not come, or this one was told to give up.
        """
        if self._store is None:
            self._store = Store(self._member)
            if (interface := _interface_of(self._store.host)) is not None:
                os.environ.setdefault(_INTERFACE, interface)
        self._made += 1
        return torch_compat.prefix_store(self._store.client, f"group-{self._made}")

    def close(self) -> None:
        """Serve the store no more."""
        if self._store is not None:
            self._store.close(troubled=False)


@contextmanager
def as_torchrun(context: TrainContext, rendezvous: Callable[[], Any]) -> Iterator[None]:
    """
    Give the user's code what it has under torchrun: its variables and `init_process_group()`.

    Args:
        context: of this rank.
        rendezvous: gives the store of each group that is made, once all ranks ask for it.
    """
    ours = not torch_compat.has_default_group()
    with variables(context.variables, _INTERFACE):
        try:
            with torch_compat.env_rendezvous(rendezvous, context.rank, context.world):
                yield
        finally:
            if ours:
                torch_compat.destroy_default_group()


def _interface_of(address: str) -> str | None:
    """
    Give the network interface that has an address; None where there is none, or it is IPv6's.

    By itself gloo takes the one that the host's name leads to, which is often loopback.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            question = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # it has no address
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, question)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
