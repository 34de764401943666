"""
What gloo puts on the wire in an all-reduce, by the kernel's own counters.

Patarasu & Yuan's ring sends 2 (N-1)/N of the vector per rank, whatever N is. Ranks are threads here
and the wire is loopback: what it carried is what all ranks sent.
"""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from rank_threads import on_ranks

from distplat.strategies.algorithms.reduce import traffic_elements

dist: Any = torch.distributed  # torch's stubs leave out most of ProcessGroupGloo

COUNTERS = Path("/proc/net/dev")
ELEMENTS = 2 * 2**20  # 8 MiB of float32
DEADLINE_S = 30.0


def carried_by_loopback() -> int | None:
    """Bytes that loopback has carried since it is up; None: there is no such counter."""
    if not COUNTERS.exists():
        return None
    for line in COUNTERS.read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[0])
    return None


pytestmark = pytest.mark.skipif(carried_by_loopback() is None, reason="no counter of loopback")


def connected(world: int) -> dict[int, Any]:
    store, groups = dist.HashStore(), {}

    def connect(rank: int) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=DEADLINE_S)
        options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        groups[rank] = dist.ProcessGroupGloo(store, rank, world, options)

    on_ranks(world, connect)
    return groups


def carried_by_all_reduces(groups: dict[int, Any], times: int) -> int:
    tensors = {rank: torch.full((ELEMENTS,), rank + 1.0) for rank in groups}
    before = carried_by_loopback() or 0
    for _ in range(times):
        on_ranks(len(groups), lambda rank: groups[rank].allreduce([tensors[rank]]).wait())
    time.sleep(0.05)  # acknowledgements on their way
    return (carried_by_loopback() or 0) - before


@pytest.mark.parametrize("world", range(2, 9))
def test_an_all_reduce_is_a_ring_on_the_wire(world: int) -> None:
    groups = connected(world)
    expected = sum(4 * traffic_elements(ELEMENTS, rank, world)[0] for rank in range(world))
    assert expected == 4 * 2 * (world - 1) * ELEMENTS
    ratios = []
    for _ in range(5):  # what others send in the meantime only adds: the least is the truest
        ratios.append(carried_by_all_reduces(groups, 2) / (2 * expected))
        if abs(min(ratios) - 1) < 0.05:
            return
    pytest.fail(f"carried / computed: {ratios}")
