"""The contract of `Collective` over Ray on one node; lost, late and mismatched ranks; aborts."""

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
from members import LONG_TIMEOUT_S, TIMEOUT_S, Pool, call_all, join
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_list

from distplat.actors.messages import rendezvous_key
from distplat.platform.errors import CollectiveError, MismatchError

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]

BACKENDS = ["gloo", "auto", "hierarchical"]


@pytest.fixture(autouse=True)
def delete_keys() -> Iterator[None]:
    """Delete keys as the driver does at the end of a run: a killed rank 0 leaves its address."""
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
        call_all(actors, "check", name)
    call_all(actors, "leave")
    assert not _internal_kv_list(rendezvous_key(""))
    join(actors, "contract", backend)  # the name can be reused once all ranks have left
    call_all(actors, "check", "place")


def test_auto_selects_shm_on_one_node_and_logs_the_reason(members: Take) -> None:
    actors = members(2)
    calls = [a.join_logged.remote("why", rank, 2, "auto") for rank, a in enumerate(actors)]
    assert ray.get(calls, timeout=60) == [
        ["collective why: shm (all 2 workers are on one node)"],
        [],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_rendezvous_waits_longer_than_operations(late: int, members: Take) -> None:
    actors = members(2)
    settings = "gloo", False, TIMEOUT_S
    first = actors[1 - late].join.remote("late", 1 - late, 2, *settings)
    time.sleep(TIMEOUT_S + 1)
    ray.get([first, actors[late].join.remote("late", late, 2, *settings)], timeout=60)
    call_all(actors, "check", "send_recv")


@pytest.mark.parametrize("failure", FAILURES)
def test_late_rank_is_named(failure: str, members: Take) -> None:
    actors = members(2)
    join(actors, failure, "gloo", False, TIMEOUT_S)
    call_all(actors, "fail", failure)


@pytest.mark.parametrize("mismatched", [0, 1])
def test_mismatch_after_comparisons_is_named_at_the_deadline(
    mismatched: int, members: Take
) -> None:
    """Train functions that return early cause such a mismatch."""
    actors = members(3)
    join(actors, f"mismatch-{mismatched}", "gloo", False, TIMEOUT_S)
    call_all(actors, "repeat", "all_reduce", 21)
    operations = ["barrier" if rank == mismatched else "all_reduce" for rank in range(3)]
    calls = [a.repeat.remote(name, 2) for a, name in zip(actors, operations, strict=True)]
    for call in calls:
        with pytest.raises(MismatchError, match=rf"rank {mismatched} in barrier") as caught:
            ray.get(call, timeout=60)
        assert caught.value.missing == (mismatched,)


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, slow(signal.SIGSTOP)])
def test_lost_rank_is_named(victim: int, number: int, members: Take) -> None:
    """By every survivor at about the same time, also by ranks that are not its ring neighbours."""
    actors = members(4)
    deadline = LONG_TIMEOUT_S if number == signal.SIGKILL else TIMEOUT_S
    join(actors, f"lost-{victim}-{number}", "gloo", False, deadline)
    pid = ray.get(actors[victim].pid.remote(), timeout=60)
    survivors = [rank for rank in range(4) if rank != victim]
    calls = [a.all_reduce_until_error.remote() for a in actors]
    time.sleep(0.5)
    os.kill(pid, number)
    start = time.monotonic()
    for rank in survivors:
        with pytest.raises(CollectiveError) as caught:
            ray.get(calls[rank], timeout=60)
        assert caught.value.missing == (victim,)
    assert time.monotonic() - start < LONG_TIMEOUT_S / 2
    ray.kill(actors[victim])


@pytest.mark.sweep(3)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", ["all_reduce", "start_all_reduce", "barrier", "recv"])
def test_abort_ends_a_blocked_operation(operation: str, backend: str, members: Take) -> None:
    actors = members(2)
    join(actors, f"abort-{operation}-{backend}", backend)
    call_all(actors, "repeat", "all_reduce", 21)  # operations are compared up to here
    waiting = actors[0].wait_for_abort.remote(operation, 2_000_000)
    time.sleep(0.5)
    ray.get(actors[0].abort.remote(), timeout=60)
    seconds, text = ray.get(waiting, timeout=60)
    assert seconds < LONG_TIMEOUT_S / 4
    assert "told to give up" in text


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_rendezvous_can_be_abandoned(rank: int, backend: str, members: Take) -> None:
    (actor,) = members(1)
    name = f"vain-{rank}-{backend}"
    waiting = actor.join_incomplete.remote(name, rank, 2, backend)
    ray.get(actor.give_up.remote(name), timeout=60)
    assert 0 < ray.get(waiting, timeout=60) < LONG_TIMEOUT_S / 4


def test_rendezvous_with_dead_rank_0_fails_at_once(members: Take) -> None:
    actors = members(2)
    pid = ray.get(actors[0].pid.remote(), timeout=60)
    actors[0].join.remote("dead", 0, 2)
    wait_for_rank_0("dead")
    os.kill(pid, signal.SIGKILL)
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(60)
    with pytest.raises(CollectiveError, match="no answer from rank 0") as caught:
        ray.get(actors[1].join.remote("dead", 1, 2), timeout=60)
    assert caught.value.missing == (0,)


def test_rendezvous_with_frozen_rank_0_can_be_abandoned(members: Take) -> None:
    actors = members(2)
    pid = ray.get(actors[0].pid.remote(), timeout=60)
    actors[0].join.remote("frozen", 0, 2)
    wait_for_rank_0("frozen")
    os.kill(pid, signal.SIGSTOP)
    waiting = actors[1].join_incomplete.remote("frozen", 1, 2, "gloo")
    ray.get(actors[1].give_up.remote("frozen"), timeout=60)
    assert 0 < ray.get(waiting, timeout=60) < LONG_TIMEOUT_S / 4
    ray.kill(actors[0])


def wait_for_rank_0(name: str) -> None:
    deadline = time.monotonic() + 20
    while not _internal_kv_list(rendezvous_key(name)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("first", "second", "phrases"),
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
    first: tuple[object, ...], second: tuple[object, ...], phrases: list[str], members: Take
) -> None:
    actors = members(3)
    join(actors, "mismatch")
    calls = [
        a.run_operation.remote(*(second if rank == 1 else first)) for rank, a in enumerate(actors)
    ]
    for call in calls:
        with pytest.raises(MismatchError) as caught:
            ray.get(call, timeout=60)
        assert caught.value.missing == (1,)
        majority, minority = (re.escape(phrase) for phrase in phrases)
        assert re.search(f"ranks 0, 2 in .*{majority}.*; rank 1 in .*{minority}", str(caught.value))
    call_all(actors, "run_operation", "all_reduce")  # nothing was sent: the group is still usable


def test_debug_compares_every_operation(members: Take) -> None:
    actors = members(2)
    join(actors, "debug", "gloo", True)
    call_all(actors, "repeat", "all_reduce", 30)
    assert ray.get([a.start_waits.remote() for a in actors], timeout=60) == [True, True]
    calls = [a.run_operation.remote("all_reduce", 7 + rank) for rank, a in enumerate(actors)]
    for call in calls:
        with pytest.raises(MismatchError, match="7 float32"):
            ray.get(call, timeout=60)


def test_message_of_another_size_is_named(members: Take) -> None:
    actors = members(2)
    join(actors, "message")
    sending = actors[0].run_operation.remote("send", 9, 1)
    with pytest.raises(MismatchError, match="rank 0 sends 9 float32; rank 1 expects 5 float32"):
        ray.get(actors[1].run_operation.remote("recv", 5, 0), timeout=60)
    with pytest.raises(CollectiveError) as caught:
        ray.get(sending, timeout=60)
    assert caught.value.missing == (1,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_pending_all_reduces(backend: str, members: Take) -> None:
    actors = members(3)
    join(actors, "under-way", backend)
    call_all(actors, "start_many", 30, 5000)  # only the first operations are compared
    call_all(actors, "start_many", 30, 5000)


def test_traffic_matches_ring_all_reduce(members: Take) -> None:
    actors = members(4)
    join(actors, "traffic")
    for sent, received, seconds in call_all(actors, "traffic_of", "all_reduce", 4000):
        assert sent == received == 2 * 3 * 1000 * 4
        assert 0 < seconds < 10


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_aborted_groups_leave_no_threads_or_descriptors(backend: str, members: Take) -> None:
    actors = members(2)

    def form_groups(name: str, times: int) -> None:
        calls = [
            a.form_groups_in_sequence.remote(name, rank, 2, backend, times)
            for rank, a in enumerate(actors)
        ]
        ray.get(calls, timeout=60)

    form_groups("warm-up", 3)
    time.sleep(5)  # rank 0 closes the store of a broken group later
    before = call_all(actors, "count_resources")
    form_groups("given-up", 20)
    extra = (2, 2)  # the numbers of Ray's threads and descriptors vary
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and max(extra) > 1:
        time.sleep(0.5)
        after = call_all(actors, "count_resources")
        extra = tuple(max(a[i] - b[i] for a, b in zip(after, before, strict=True)) for i in (0, 1))
    assert max(extra) <= 2, f"additional threads and descriptors: {extra}"
