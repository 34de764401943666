"""The contract of `Collective`, held against `ray.util.collective` with our gloo backend."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from collective_contract import CHECKS, FAILURES
from members import TIMEOUT_S, Member
from ray.experimental.internal_kv import _internal_kv_del

from distplat.actors.messages import rendezvous_key
from distplat.platform.errors import CollectiveError

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]


@pytest.fixture(autouse=True)
def no_keys() -> Iterator[None]:
    """Do what a run's driver does at its end: a rank 0 that was killed leaves its address."""
    yield
    _internal_kv_del(rendezvous_key(""), del_by_prefix=True)


def members(world: int) -> list[Any]:
    kind = ray.remote(Member).options(num_cpus=0.5)
    return [kind.remote() for _ in range(world)]


def everybody(actors: list[Any], method: str, *args: object) -> None:
    ray.get([getattr(a, method).remote(*args) for a in actors], timeout=60)


def join(actors: list[Any], name: str) -> None:
    calls = [a.join.remote(name, rank, len(actors)) for rank, a in enumerate(actors)]
    ray.get(calls, timeout=60)


def test_contract() -> None:
    actors = members(3)
    join(actors, "contract")
    for name in CHECKS:
        everybody(actors, "check", name)
    everybody(actors, "leave")
    join(actors, "contract")  # a name is free again once all have left
    everybody(actors, "check", "place")


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_may_come_later_than_an_operation_may_take(late: int) -> None:
    actors = members(2)
    first = actors[1 - late].join.remote("late", 1 - late, 2)
    time.sleep(TIMEOUT_S + 1)
    ray.get([first, actors[late].join.remote("late", late, 2)], timeout=60)
    everybody(actors, "check", "send_recv")


@pytest.mark.parametrize("failure", FAILURES)
def test_late_rank_is_named(failure: str) -> None:
    actors = members(2)
    join(actors, failure)
    everybody(actors, "fail", failure)


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_rank_is_named(victim: int, number: int) -> None:
    actors = members(3)
    join(actors, f"lost-{victim}-{number}")
    pid = ray.get(actors[victim].pid.remote(), timeout=60)
    survivors = [a for rank, a in enumerate(actors) if rank != victim]
    calls = [a.all_reduce_for_ever.remote() for a in actors]
    time.sleep(0.5)
    os.kill(pid, number)
    began = time.monotonic()
    for actor in survivors:
        with pytest.raises(CollectiveError) as caught:
            ray.get(calls[actors.index(actor)], timeout=60)
        assert caught.value.missing == (victim,)
    assert time.monotonic() - began < TIMEOUT_S + 10
    for actor in actors:
        ray.kill(actor)
