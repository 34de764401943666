"""Traffic counters: an all-reduce sends 2 (N-1)/N of the vector for any N."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from shm_ranks import on_shm_ranks

from distplat.actors.collectives.shm import liveness, shm_group
from distplat.actors.collectives.shm.liveness import LivenessMonitor
from distplat.actors.collectives.shm.shm_group import ShmGroup
from distplat.strategies.collective import ReduceOp

SIZE = 128 * 840 * 4
"""Bytes of a vector that 2 to 8 ranks split evenly at cache lines."""


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("world", range(2, 9))
def test_all_reduce_traffic_per_rank(world: int, shared: bool) -> None:
    def body(group: ShmGroup) -> None:
        tensor = torch.ones(SIZE // 4)
        if shared:
            tensor = group.share(tensor)
        group.all_reduce(tensor)
        traffic = group.traffic
        assert traffic.sent_bytes == traffic.received_bytes == 2 * (world - 1) * SIZE // world

    on_shm_ranks(world, body)


@pytest.mark.parametrize("shared", [False, True])
def test_traffic_of_other_operations(shared: bool) -> None:
    def body(group: ShmGroup) -> None:
        vector = torch.ones(300)
        if shared:
            vector = group.share(vector)
        parts = list(torch.split_with_sizes(vector, [60, 90, 150]))
        moved: list[tuple[int, int]] = []

        def record_traffic() -> None:
            sent, received = group.traffic.sent_bytes, group.traffic.received_bytes
            moved.append(
                (
                    sent - sum(entry[0] for entry in moved),
                    received - sum(entry[1] for entry in moved),
                )
            )

        group.reduce_scatter(parts[group.rank], parts)
        record_traffic()
        group.all_gather(parts, parts[group.rank])
        record_traffic()
        group.broadcast(vector, 1)
        record_traffic()
        group.reduce(vector, ReduceOp.SUM, 2)
        record_traffic()
        group.barrier()
        record_traffic()
        own = parts[group.rank].nbytes
        assert moved == [
            (1200 - own, 2 * own),
            (2 * own, 1200 - own),
            (2400, 0) if group.rank == 1 else (0, 1200),
            (0, 2400) if group.rank == 2 else (1200, 0),
            (0, 0),
        ]

    on_shm_ranks(3, body)


def test_traffic_of_messages() -> None:
    def body(group: ShmGroup) -> None:
        if group.rank == 0:
            group.send(torch.ones(10), 1)
        else:
            group.recv(torch.ones(10), 0)
        traffic = group.traffic
        assert (traffic.sent_bytes, traffic.received_bytes) == ((40, 0), (0, 40))[group.rank]

    on_shm_ranks(2, body)


def test_waiting_and_working_are_measured_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    """The late rank advances the clock while the other one waits."""
    now, is_waiting = [100.0], threading.Event()
    check = LivenessMonitor._check_peers

    def check_and_notify(*args: Any) -> None:
        is_waiting.set()
        check(*args)

    monkeypatch.setattr(LivenessMonitor, "_check_peers", check_and_notify)
    for module in (liveness, shm_group):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def body(group: ShmGroup) -> tuple[float, float]:
        if group.rank == 1:
            assert is_waiting.wait(60)
            now[0] += 0.25
        group.barrier()
        return group.traffic.waiting_s, group.traffic.working_s

    assert on_shm_ranks(2, body) == [(0.25, 0.0), (0.0, 0.0)]
