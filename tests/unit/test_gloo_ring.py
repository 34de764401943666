"""
Traffic of gloo's all-reduce, measured by the kernel's counters of its connections.

The ring of Patarasu & Yuan sends 2 (N-1)/N of the vector per rank. Ranks are threads connected by
loopback: the bytes received by the process are the bytes sent by all ranks.
"""

import os
import socket
import stat
import struct
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed
from rank_threads import on_ranks

from distplat.strategies.algorithms.reduce import traffic_elements

dist: Any = torch.distributed  # torch's stubs lack most of ProcessGroupGloo

ELEMENTS = 2 * 2**20  # 8 MiB of float32
DEADLINE_S = 30.0
RECEIVED = struct.Struct("128xQ")  # `tcpi_bytes_received` of the kernel's `struct tcp_info`


def opened_socket(descriptor: str) -> socket.socket | None:
    """Return the socket of a descriptor, or None if it is no socket or was closed meanwhile."""
    try:
        is_socket = stat.S_ISSOCK(os.fstat(int(descriptor)).st_mode)
        return socket.socket(fileno=int(descriptor)) if is_socket else None
    except OSError:  # the directory's descriptor, or one of an earlier test's thread
        return None


def received_bytes() -> int:
    """Return the bytes received over the TCP connections of this process."""
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        connection = opened_socket(descriptor)
        if connection is None:
            continue
        if connection.type == socket.SOCK_STREAM and connection.family != socket.AF_UNIX:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += RECEIVED.unpack_from(info)[0]
        connection.detach()  # gloo owns it
    return total


pytestmark = pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="counters of Linux")


def connect_groups(world: int) -> dict[int, Any]:
    store, groups = dist.HashStore(), {}

    def connect(rank: int) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=DEADLINE_S)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        groups[rank] = dist.ProcessGroupGloo(store, rank, world, options)

    on_ranks(world, connect)
    return groups


def received_bytes_of_all_reduces(groups: dict[int, Any], times: int) -> int:
    tensors = {rank: torch.full((ELEMENTS,), rank + 1.0) for rank in groups}
    before = received_bytes()
    for _ in range(times):
        on_ranks(len(groups), lambda rank: groups[rank].allreduce([tensors[rank]]).wait())
    return received_bytes() - before


@pytest.mark.sweep(2)
@pytest.mark.parametrize("world", range(2, 9))
def test_all_reduce_has_the_traffic_of_a_ring(world: int) -> None:
    groups = connect_groups(world)
    expected = sum(4 * traffic_elements(ELEMENTS, rank, world)[0] for rank in range(world))
    assert expected == 4 * 2 * (world - 1) * ELEMENTS
    assert received_bytes_of_all_reduces(groups, 2) == pytest.approx(2 * expected, rel=0.01)
