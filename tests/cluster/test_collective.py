"""The contract of `Collective` over Ray on one node; lost, late and confused ranks; giving up."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest
import ray
from collective_contract import CHECKS, FAILURES
from marks import slow
from members import FAR_S, TIMEOUT_S, Pool, everybody, join
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_list

from distplat.actors.messages import rendezvous_key
from distplat.platform.errors import CollectiveError, MismatchError

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]

BACKENDS = ["gloo", "auto", "hierarchical"]


@pytest.fixture(autouse=True)
def no_keys() -> Iterator[None]:
    """Do what a run's driver does at its end: a rank 0 that was killed leaves its address."""
    yield
    _internal_kv_del(rendezvous_key(""), del_by_prefix=True)


@pytest.fixture(scope="module")
def pool(local_ray: None) -> Pool:
    return Pool()


@pytest.fixture
def members(pool: Pool) -> Iterator[Callable[[int], list[Any]]]:
    yield pool.take
    pool.give_back()


Take = Callable[[int], list[Any]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_contract(backend: str, members: Take) -> None:
    actors = members(3)
    join(actors, "contract", backend)
    for name in CHECKS:
        everybody(actors, "check", name)
    everybody(actors, "leave")
    assert not _internal_kv_list(rendezvous_key(""))
    join(actors, "contract", backend)  # a name is free again once all have left
    everybody(actors, "check", "place")


def test_auto_takes_memory_on_one_node_and_says_why(members: Take) -> None:
    actors = members(2)
    calls = [a.join_logged.remote("why", rank, 2, "auto") for rank, a in enumerate(actors)]
    assert ray.get(calls, timeout=60) == [
        ["collective why: shm (all 2 workers are on one node)"],
        [],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_may_come_later_than_an_operation_may_take(late: int, members: Take) -> None:
    actors = members(2)
    settings = "gloo", False, TIMEOUT_S
    first = actors[1 - late].join.remote("late", 1 - late, 2, *settings)
    time.sleep(TIMEOUT_S + 1)
    ray.get([first, actors[late].join.remote("late", late, 2, *settings)], timeout=60)
    everybody(actors, "check", "send_recv")


@pytest.mark.parametrize("failure", FAILURES)
def test_late_rank_is_named(failure: str, members: Take) -> None:
    actors = members(2)
    join(actors, failure, "gloo", False, TIMEOUT_S)
    everybody(actors, "fail", failure)


@pytest.mark.parametrize("apart", [0, 1])
def test_ranks_that_part_later_are_named_at_the_deadline(apart: int, members: Take) -> None:
    """As loops do of which one ends earlier."""
    actors = members(3)
    join(actors, f"parted-{apart}", "gloo", False, TIMEOUT_S)
    everybody(actors, "repeat", "all_reduce", 21)
    ways = ["barrier" if rank == apart else "all_reduce" for rank in range(3)]
    calls = [actor.repeat.remote(way, 2) for actor, way in zip(actors, ways, strict=True)]
    for call in calls:
        with pytest.raises(MismatchError, match=rf"rank {apart} in barrier") as caught:
            ray.get(call, timeout=60)
        assert caught.value.missing == (apart,)


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGSTOP)])
def test_lost_rank_is_named(victim: int, number: int, members: Take) -> None:
    """By every survivor, neighbours in the ring or not, and by all at about the same time."""
    actors = members(4)
    deadline = FAR_S if number == signal.SIGKILL else TIMEOUT_S
    join(actors, f"lost-{victim}-{number}", "gloo", False, deadline)
    pid = ray.get(actors[victim].pid.remote(), timeout=60)
    survivors = [rank for rank in range(4) if rank != victim]
    calls = [a.all_reduce_for_ever.remote() for a in actors]
    time.sleep(0.5)
    os.kill(pid, number)
    began = time.monotonic()
    for rank in survivors:
        with pytest.raises(CollectiveError) as caught:
            ray.get(calls[rank], timeout=60)
        assert caught.value.missing == (victim,)
    assert time.monotonic() - began < FAR_S / 2
    ray.kill(actors[victim])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", ["all_reduce", "start_all_reduce", "barrier", "recv"])
def test_abort_frees_a_blocked_rank(operation: str, backend: str, members: Take) -> None:
    actors = members(2)
    join(actors, f"abort-{operation}-{backend}", backend)
    everybody(actors, "repeat", "all_reduce", 21)  # past the comparisons: gloo itself is waited for
    stuck = actors[0].blocked.remote(operation, 2_000_000)
    time.sleep(0.5)
    ray.get(actors[0].abort.remote(), timeout=60)
    seconds, text = ray.get(stuck, timeout=60)
    assert seconds < FAR_S / 4
    assert "told to give up" in text


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rendezvous_can_be_given_up(rank: int, backend: str, members: Take) -> None:
    (actor,) = members(1)
    name = f"vain-{rank}-{backend}"
    waiting = actor.join_in_vain.remote(name, rank, 2, backend)
    ray.get(actor.give_up.remote(name), timeout=60)
    assert 0 < ray.get(waiting, timeout=60) < FAR_S / 4


def test_a_rendezvous_with_a_dead_rank_0_ends_at_once(members: Take) -> None:
    actors = members(2)
    pid = ray.get(actors[0].pid.remote(), timeout=60)
    actors[0].join.remote("dead", 0, 2)
    until_rank_0_serves("dead")
    os.kill(pid, signal.SIGKILL)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(60)
    with pytest.raises(CollectiveError, match="no answer from rank 0") as caught:
        ray.get(actors[1].join.remote("dead", 1, 2), timeout=60)
    assert caught.value.missing == (0,)


def test_a_rendezvous_with_a_frozen_rank_0_can_be_given_up(members: Take) -> None:
    actors = members(2)
    pid = ray.get(actors[0].pid.remote(), timeout=60)
    actors[0].join.remote("frozen", 0, 2)
    until_rank_0_serves("frozen")
    os.kill(pid, signal.SIGSTOP)
    waiting = actors[1].join_in_vain.remote("frozen", 1, 2, "gloo")
    ray.get(actors[1].give_up.remote("frozen"), timeout=60)
    assert 0 < ray.get(waiting, timeout=60) < FAR_S / 4
    ray.kill(actors[0])


def until_rank_0_serves(name: str) -> None:
    deadline = time.monotonic() + 20
    while not _internal_kv_list(rendezvous_key(name)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (("all_reduce", 7), ("broadcast", 7), ["all_reduce of 7 float32", "broadcast of 7"]),
        (("all_reduce", 7), ("all_reduce", 8), ["of 7 float32", "of 8 float32"]),
        (("all_reduce", 7), ("start_all_reduce", 10**6), ["of 7 float32", "of 1000000 float32"]),
        (("all_reduce", 7), ("all_reduce int64", 7), ["7 float32", "7 int64"]),
        (("all_reduce", 7), ("all_reduce max", 7), ["by SUM", "by MAX"]),
        (("barrier", 7), ("all_gather", 7), ["barrier", "all_gather"]),
        (("broadcast", 7, 0), ("broadcast", 7, 1), ["from rank 0", "from rank 1"]),
    ],
)
def test_ranks_in_different_operations_are_named(
    first: tuple[object, ...], second: tuple[object, ...], says: list[str], members: Take
) -> None:
    actors = members(3)
    join(actors, "mismatch")
    calls = [a.act.remote(*(second if rank == 1 else first)) for rank, a in enumerate(actors)]
    for call in calls:
        with pytest.raises(MismatchError) as caught:
            ray.get(call, timeout=60)
        assert caught.value.missing == (1,)
        ours, theirs = (re.escape(words) for words in says)
        assert re.search(f"ranks 0, 2 in .*{ours}.*; rank 1 in .*{theirs}", str(caught.value))
    everybody(actors, "act", "all_reduce")  # nothing was sent: the group is still good


def test_debug_compares_every_operation(members: Take) -> None:
    actors = members(2)
    join(actors, "debug", "gloo", True)
    everybody(actors, "repeat", "all_reduce", 30)
    assert ray.get([a.start_waits.remote() for a in actors], timeout=60) == [True, True]
    calls = [a.act.remote("all_reduce", 7 + rank) for rank, a in enumerate(actors)]
    for call in calls:
        with pytest.raises(MismatchError, match="7 float32"):
            ray.get(call, timeout=60)


def test_a_message_of_another_size_is_named(members: Take) -> None:
    actors = members(2)
    join(actors, "message")
    sending = actors[0].act.remote("send", 9, 1)
    with pytest.raises(MismatchError, match="rank 0 sends 9 float32; rank 1 expects 5 float32"):
        ray.get(actors[1].act.remote("recv", 5, 0), timeout=60)
    with pytest.raises(CollectiveError) as caught:
        ray.get(sending, timeout=60)
    assert caught.value.missing == (1,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_all_reduces_under_way(backend: str, members: Take) -> None:
    actors = members(3)
    join(actors, "under-way", backend)
    everybody(actors, "many_under_way", 30, 5000)  # the first ones are compared, the others not
    everybody(actors, "many_under_way", 30, 5000)


def test_traffic_is_that_of_a_ring(members: Take) -> None:
    actors = members(4)
    join(actors, "traffic")
    for sent, received, seconds in everybody(actors, "traffic_of", "all_reduce", 4000):
        assert sent == received == 2 * 3 * 1000 * 4
        assert 0 < seconds < 10


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_that_were_given_up_leave_nothing(backend: str, members: Take) -> None:
    actors = members(2)

    def go_through(name: str, times: int) -> None:
        calls = [
            a.groups_one_after_the_other.remote(name, rank, 2, backend, times)
            for rank, a in enumerate(actors)
        ]
        ray.get(calls, timeout=60)

    go_through("warm-up", 3)
    time.sleep(5)  # rank 0 serves the store of a broken group a little longer
    before = everybody(actors, "held")
    go_through("given-up", 20)
    more = (2, 2)  # Ray's own come and go
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and max(more) > 1:
        time.sleep(0.5)
        after = everybody(actors, "held")
        more = tuple(max(a[i] - b[i] for a, b in zip(after, before, strict=True)) for i in (0, 1))
    assert max(more) <= 2, f"threads and descriptors more than before: {more}"
