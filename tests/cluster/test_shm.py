"""The shared-memory backend through `ray.util.collective`, in processes, with faults."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import ray
import ray.util.collective as rayc
import torch
from marks import slow
from ray.experimental.internal_kv import _internal_kv_list
from ray.util.collective.types import ReduceOp

from distplat.actors.collectives.ray_groups import prepare, register
from distplat.actors.collectives.rendezvous import GroupSettings
from distplat.platform.errors import CollectiveError, DeadlineExceeded

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]

BACKEND = "DISTPLAT_SHM"
TIMEOUT_S = 3.0
"""Deadline of tests that wait for its expiry."""
LONG_TIMEOUT_S = 100.0
"""Deadline that does not expire: a lost rank is detected earlier."""
Ranks = Callable[[int], list[Any]]


class Rank:
    """One rank, which uses only the backend of distplat."""

    def __init__(self) -> None:
        register("shm")
        self.joined: list[str] = []

    def pid(self) -> int:
        return os.getpid()

    def join(
        self,
        name: str,
        rank: int,
        world: int,
        rendezvous_s: float = LONG_TIMEOUT_S,
        operation_s: float = LONG_TIMEOUT_S,
    ) -> None:
        prepare(name, GroupSettings(operation_s, rendezvous_s))
        rayc.init_collective_group(world, rank, BACKEND, name)
        self.joined.append(name)

    def leave(self, name: str) -> None:
        rayc.destroy_collective_group(name)
        self.joined = [other for other in self.joined if other != name]

    def leave_all(self) -> None:
        for name in [*self.joined]:
            self.leave(name)

    def sum_of(self, values: list[float], name: str) -> list[float]:
        tensor = torch.tensor(values)
        rayc.allreduce(tensor, name, ReduceOp.SUM)
        return tensor.tolist()

    def call_every_operation(self, name: str, rank: int, world: int) -> None:
        """Call each operation of Ray once with tensors, and all-reduce with a NumPy array."""
        total = sum(float(r + 1) for r in range(world))
        tensor = torch.full((5,), rank + 1.0)
        rayc.reduce(tensor, 1, name, ReduceOp.SUM)
        assert tensor.tolist() == [total if rank == 1 else rank + 1.0] * 5
        rayc.broadcast(tensor, 1, name)
        assert tensor.tolist() == [total] * 5
        gathered = [torch.zeros(2) for _ in range(world)]
        rayc.allgather(gathered, torch.full((2,), float(rank)), name)
        assert [t.tolist() for t in gathered] == [[float(r)] * 2 for r in range(world)]
        output = torch.zeros(2)
        inputs = [torch.full((2,), float(r)) for r in range(world)]
        rayc.reducescatter(output, inputs, name, ReduceOp.MAX)
        assert output.tolist() == [float(rank)] * 2
        if rank == 0:
            rayc.send(torch.arange(4), 1, name)
        elif rank == 1:
            received = torch.zeros(4, dtype=torch.int64)
            rayc.recv(received, 0, name)
            assert received.tolist() == [0, 1, 2, 3]
        array = torch.full((3,), rank + 1.0).numpy()
        rayc.allreduce(array, name, ReduceOp.PRODUCT)
        assert array.tolist() == [torch.arange(1.0, world + 1).prod().item()] * 3
        rayc.barrier(name)

    def all_reduce_until_error(self, name: str, elements: int) -> None:
        tensor = torch.ones(elements)
        while True:
            rayc.allreduce(tensor, name, ReduceOp.SUM)

    def mapping_count(self) -> int:
        """Return the number of mapped segments of distplat in this process."""
        with open("/proc/self/maps") as file:
            return sum("memfd:distplat" in line for line in file)


@pytest.fixture(scope="module")
def pool(local_ray: None) -> list[Any]:
    """Return the list of ranks shared by all tests: the start of one takes seconds."""
    return []


@pytest.fixture
def ranks(pool: list[Any]) -> Iterator[Ranks]:
    """Return a function that takes ranks from the pool; afterwards the ranks leave their groups."""

    def take(world: int) -> list[Any]:
        cls = ray.remote(Rank).options(num_cpus=0.1)
        pool.extend(cls.remote() for _ in range(world - len(pool)))
        get_all([actor.pid.remote() for actor in pool])  # deadlines begin after their start
        return pool[:world]

    yield take
    leaving = [(actor, actor.leave_all.remote()) for actor in pool]
    pool.clear()
    for actor, call in leaving:
        with suppress(ray.exceptions.RayActorError):
            ray.get(call, timeout=60)
            pool.append(actor)


def get_all(calls: list[Any], timeout_s: float = 150) -> list[Any]:
    return list(ray.get(calls, timeout=timeout_s))


def join(actors: list[Any], name: str, operation_s: float = LONG_TIMEOUT_S) -> None:
    world = len(actors)
    get_all(
        [a.join.remote(name, r, world, LONG_TIMEOUT_S, operation_s) for r, a in enumerate(actors)]
    )


def test_every_operation_of_ray(ranks: Ranks) -> None:
    actors = ranks(3)
    join(actors, "calls")
    get_all([a.call_every_operation.remote("calls", r, 3) for r, a in enumerate(actors)])
    assert not _internal_kv_list(b"distplat/")  # rank 0 has deleted its address


def test_group_declared_by_the_driver(ranks: Ranks) -> None:
    register("shm")
    actors = ranks(3)
    rayc.create_collective_group(actors, 3, [2, 0, 1], BACKEND, "declared")
    sums = get_all([a.sum_of.remote([1.0, float(i)], "declared") for i, a in enumerate(actors)])
    assert sums == [[3.0, 3.0]] * 3
    get_all([a.leave.remote("declared") for a in actors])


def test_overlapping_groups(ranks: Ranks) -> None:
    actors = ranks(4)
    groups = {"all": [0, 1, 2, 3], "left": [0, 1, 2], "right": [3, 2], "turned": [3, 2, 1, 0]}
    for name, members in groups.items():
        join([actors[m] for m in members], name)
    for name, members in list(groups.items()) * 2:
        sums = get_all([actors[m].sum_of.remote([10.0**m], name) for m in members])
        assert sums == [[sum(10.0**m for m in members)]] * len(members)


def test_destroyed_group_leaves_no_mappings(ranks: Ranks) -> None:
    actors = ranks(2)
    for number in range(3):
        join(actors, f"gone-{number}")
        get_all(
            [a.call_every_operation.remote(f"gone-{number}", r, 2) for r, a in enumerate(actors)]
        )
        get_all([a.leave.remote(f"gone-{number}") for a in actors])
    assert get_all([a.mapping_count.remote() for a in actors]) == [0, 0]


def test_more_ranks_than_cores(ranks: Ranks) -> None:
    actors = ranks(6)
    join(actors, "many")
    sums = get_all([a.sum_of.remote([float(i)] * 300_000, "many") for i, a in enumerate(actors)])
    assert all(s == [15.0] * 300_000 for s in sums)


@pytest.mark.parametrize(
    ("victim", "kill", "elements"),
    [
        (0, signal.SIGKILL, 1000),
        (2, signal.SIGKILL, 4_000_000),
        slow(2, signal.SIGSTOP, 1000),
        (0, signal.SIGSTOP, 4_000_000),
    ],
)
def test_lost_rank_is_named(ranks: Ranks, victim: int, kill: signal.Signals, elements: int) -> None:
    name = f"lost-{victim}-{kill}-{elements}"
    actors = ranks(3)
    join(actors, name, LONG_TIMEOUT_S if kill == signal.SIGKILL else TIMEOUT_S)
    pid = ray.get(actors[victim].pid.remote(), timeout=60)
    calls = [a.all_reduce_until_error.remote(name, elements) for a in actors]
    time.sleep(0.5)
    os.kill(pid, kill)
    start = time.monotonic()
    for rank, call in enumerate(calls):
        if rank != victim:
            with pytest.raises(CollectiveError) as caught:
                ray.get(call, timeout=60)
            assert (caught.value.missing, caught.value.operation) == ((victim,), "all_reduce")
    # A dead rank is detected at once, a frozen rank at the deadline; Ray adds some time.
    assert time.monotonic() - start < LONG_TIMEOUT_S / 2
    ray.kill(actors[victim])


def test_missing_rank_is_named(ranks: Ranks) -> None:
    actors = ranks(3)
    calls = [actors[r].join.remote("alone", r, 3, 1.0) for r in (0, 1)]
    for call in calls:
        with pytest.raises(DeadlineExceeded) as caught:
            ray.get(call, timeout=60)
        assert caught.value.missing == ("worker-2",)
    assert not _internal_kv_list(b"distplat/")


def test_different_world_sizes_are_refused(ranks: Ranks) -> None:
    actors = ranks(2)
    first = actors[0].join.remote("count", 0, 2, 2.0)
    with pytest.raises(CollectiveError, match="rank 0 expects 2 ranks, rank 1 expects 3"):
        ray.get(actors[1].join.remote("count", 1, 3, 2.0), timeout=60)
    with pytest.raises(DeadlineExceeded):
        ray.get(first, timeout=60)
