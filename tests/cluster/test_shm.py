"""The shared-memory backend in processes: Ray's two ways to make a group, faults, nothing left."""

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
"""For tests in which a rank is late: they wait for it."""
FAR_S = 100.0
"""A deadline that is not to be waited for: what is lost is found before."""
Ranks = Callable[[int], list[Any]]


class Rank:
    """One rank; has nothing of distplat but the backend."""

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
        rendezvous_s: float = FAR_S,
        operation_s: float = FAR_S,
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

    def every_call(self, name: str, rank: int, world: int) -> None:
        """Each of Ray's calls once, on tensors, and all-reduce on an array of numpy."""
        whole = sum(float(r + 1) for r in range(world))
        tensor = torch.full((5,), rank + 1.0)
        rayc.reduce(tensor, 1, name, ReduceOp.SUM)
        assert tensor.tolist() == [whole if rank == 1 else rank + 1.0] * 5
        rayc.broadcast(tensor, 1, name)
        assert tensor.tolist() == [whole] * 5
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
            arriving = torch.zeros(4, dtype=torch.int64)
            rayc.recv(arriving, 0, name)
            assert arriving.tolist() == [0, 1, 2, 3]
        array = torch.full((3,), rank + 1.0).numpy()
        rayc.allreduce(array, name, ReduceOp.PRODUCT)
        assert array.tolist() == [torch.arange(1.0, world + 1).prod().item()] * 3
        rayc.barrier(name)

    def for_ever(self, name: str, elements: int) -> None:
        tensor = torch.ones(elements)
        while True:
            rayc.allreduce(tensor, name, ReduceOp.SUM)

    def maps(self) -> int:
        """Our mappings in this process."""
        with open("/proc/self/maps") as file:
            return sum("memfd:distplat" in line for line in file)


@pytest.fixture(scope="module")
def living(local_ray: None) -> list[Any]:
    """Ranks for all tests: starting one takes seconds."""
    return []


@pytest.fixture
def ranks(living: list[Any]) -> Iterator[Ranks]:
    """Gives so many ranks; after the test they are in no group, and the dead are forgotten."""

    def take(world: int) -> list[Any]:
        kind = ray.remote(Rank).options(num_cpus=0.1)
        living.extend(kind.remote() for _ in range(world - len(living)))
        everybody([actor.pid.remote() for actor in living])  # their start is in no deadline
        return living[:world]

    yield take
    leaving = [(actor, actor.leave_all.remote()) for actor in living]
    living.clear()
    for actor, call in leaving:
        with suppress(ray.exceptions.RayActorError):
            ray.get(call, timeout=60)
            living.append(actor)


def everybody(calls: list[Any], timeout_s: float = 150) -> list[Any]:
    return list(ray.get(calls, timeout=timeout_s))


def join(actors: list[Any], name: str, operation_s: float = FAR_S) -> None:
    world = len(actors)
    everybody([a.join.remote(name, r, world, FAR_S, operation_s) for r, a in enumerate(actors)])


def test_every_call_of_ray(ranks: Ranks) -> None:
    actors = ranks(3)
    join(actors, "calls")
    everybody([a.every_call.remote("calls", r, 3) for r, a in enumerate(actors)])
    assert not _internal_kv_list(b"distplat/")  # rank 0 has taken its word back


def test_the_driver_declares_a_group(ranks: Ranks) -> None:
    register("shm")
    actors = ranks(3)
    rayc.create_collective_group(actors, 3, [2, 0, 1], BACKEND, "declared")
    sums = everybody([a.sum_of.remote([1.0, float(i)], "declared") for i, a in enumerate(actors)])
    assert sums == [[3.0, 3.0]] * 3
    everybody([a.leave.remote("declared") for a in actors])


def test_groups_that_overlap(ranks: Ranks) -> None:
    actors = ranks(4)
    groups = {"all": [0, 1, 2, 3], "left": [0, 1, 2], "right": [3, 2], "turned": [3, 2, 1, 0]}
    for name, members in groups.items():
        join([actors[m] for m in members], name)
    for name, members in list(groups.items()) * 2:
        sums = everybody([actors[m].sum_of.remote([10.0**m], name) for m in members])
        assert sums == [[sum(10.0**m for m in members)]] * len(members)


def test_nothing_is_left_of_a_group_that_was_destroyed(ranks: Ranks) -> None:
    actors = ranks(2)
    for number in range(3):
        join(actors, f"gone-{number}")
        everybody([a.every_call.remote(f"gone-{number}", r, 2) for r, a in enumerate(actors)])
        everybody([a.leave.remote(f"gone-{number}") for a in actors])
    assert everybody([a.maps.remote() for a in actors]) == [0, 0]


def test_more_ranks_than_cores(ranks: Ranks) -> None:
    actors = ranks(6)
    join(actors, "many")
    sums = everybody([a.sum_of.remote([float(i)] * 300_000, "many") for i, a in enumerate(actors)])
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
    join(actors, name, FAR_S if kill == signal.SIGKILL else TIMEOUT_S)
    pid = ray.get(actors[victim].pid.remote(), timeout=60)
    calls = [a.for_ever.remote(name, elements) for a in actors]
    time.sleep(0.5)
    os.kill(pid, kill)
    began = time.monotonic()
    for rank, call in enumerate(calls):
        if rank != victim:
            with pytest.raises(CollectiveError) as caught:
                ray.get(call, timeout=60)
            assert (caught.value.missing, caught.value.operation) == ((victim,), "all_reduce")
    # A death is seen at once, a frozen rank at the deadline; the rest is Ray's.
    assert time.monotonic() - began < FAR_S / 2
    ray.kill(actors[victim])


def test_who_does_not_come_is_named(ranks: Ranks) -> None:
    actors = ranks(3)
    calls = [actors[r].join.remote("alone", r, 3, 1.0) for r in (0, 1)]
    for call in calls:
        with pytest.raises(DeadlineExceeded) as caught:
            ray.get(call, timeout=60)
        assert caught.value.missing == ("worker-2",)
    assert not _internal_kv_list(b"distplat/")


def test_ranks_must_agree_on_their_number(ranks: Ranks) -> None:
    actors = ranks(2)
    first = actors[0].join.remote("count", 0, 2, 2.0)
    with pytest.raises(CollectiveError, match="rank 0 expects 2 ranks, rank 1 expects 3"):
        ray.get(actors[1].join.remote("count", 1, 3, 2.0), timeout=60)
    with pytest.raises(DeadlineExceeded):
        ray.get(first, timeout=60)
