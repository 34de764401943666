"""Groups on two Ray nodes of one host: contract, backend choice, lost and mismatched ranks."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from collective_contract import CHECKS, FAILURES
from marks import slow
from members import LONG_TIMEOUT_S, TIMEOUT_S, Pool, call_all, join
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import _internal_kv_del

from distplat.actors.messages import rendezvous_key
from distplat.platform.errors import CollectiveError, MismatchError, SpecError

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module", autouse=True)
def two_nodes() -> Iterator[None]:
    """Start two nodes with resources for four members each."""
    node: dict[str, Any] = {"num_cpus": 4, "object_store_memory": 100 * 2**20}
    head = {**node, "resources": {"left": 4}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**node, resources={"right": 4})
    ray.init(address=cluster.address, logging_level="warning")
    yield
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def pools(two_nodes: None) -> dict[str, Pool]:
    return {"l": Pool(resources={"left": 1}), "r": Pool(resources={"right": 1})}


@pytest.fixture
def members(pools: dict[str, Pool]) -> Iterator[Callable[[str], list[Any]]]:
    """Return a function of the members' nodes: `lrl` is ranks 0 and 2 left, rank 1 right."""

    def take(nodes: str) -> list[Any]:
        available = {side: iter(pools[side].take(nodes.count(side))) for side in pools}
        return [next(available[side]) for side in nodes]

    yield take
    for pool in pools.values():
        pool.give_back()
    _internal_kv_del(
        rendezvous_key(""), del_by_prefix=True
    )  # as the driver does at the end of a run


Take = Callable[[str], list[Any]]


@pytest.mark.parametrize(
    ("nodes", "choice"),
    [
        ("lr", "gloo: all 2 workers are on nodes of their own"),
        ("rr", "shm: all 2 workers are on one node"),
        ("lrl", "hierarchical: 3 workers are on 2 nodes, some on the same"),
    ],
)
def test_auto_selects_backend_by_placement(nodes: str, choice: str, members: Take) -> None:
    actors = members(nodes)
    assert join(actors, f"auto-{nodes}", "auto") == [choice] * len(nodes)
    call_all(actors, "check", "all_reduce-sum")


@pytest.mark.parametrize(
    ("backend", "nodes"), [("auto", "lrl"), ("hierarchical", "llrr"), slow("hierarchical", "lrrr")]
)
def test_contract(backend: str, nodes: str, members: Take) -> None:
    actors = members(nodes)
    join(actors, f"contract-{nodes}", backend)
    for name in CHECKS:
        call_all(actors, "check", name)
    call_all(actors, "start_many", 5, 50_000)
    call_all(actors, "check", "place")


def test_sum_of_large_vectors_is_reproducible(members: Take) -> None:
    actors = members("llrr")
    digests = set()
    for number in range(2):
        join(actors, f"bits-{number}", "hierarchical")
        digests.update(call_all(actors, "digest_of_sum", 5_000_000))
        call_all(actors, "leave")
    assert len(digests) == 1


def test_shm_refuses_ranks_on_several_nodes(members: Take) -> None:
    actors = members("lrl")
    nodes = ray.get([a.node.remote() for a in actors], timeout=20)
    calls = [a.join.remote("far", rank, 3, "shm") for rank, a in enumerate(actors)]
    for call in calls:
        with pytest.raises(SpecError, match="choose `backend: hierarchical`") as caught:
            ray.get(call, timeout=60)
        text = str(caught.value)
        assert f"{nodes[0][:12]}: worker 0, 2; {nodes[1][:12]}: worker 1" in text


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_late_rank_is_named(failure: str, members: Take) -> None:
    actors = members("lrr")
    join(actors, failure, "hierarchical", False, TIMEOUT_S)
    call_all(actors, "fail", failure)


@pytest.mark.parametrize(  # ranks 0 and 1 lead their nodes, rank 0 has the store
    ("victim", "number"),
    [
        (0, signal.SIGKILL),
        slow(3, signal.SIGKILL),
        slow(1, signal.SIGSTOP),
        slow(2, signal.SIGSTOP),
    ],
)
def test_lost_rank_is_named(victim: int, number: int, members: Take) -> None:
    actors = members("lrlr")
    deadline = LONG_TIMEOUT_S if number == signal.SIGKILL else TIMEOUT_S
    join(actors, f"lost-{victim}-{number}", "hierarchical", False, deadline)
    call_all(actors, "repeat", "all_reduce", 21)  # operations are compared up to here
    pid = ray.get(actors[victim].pid.remote(), timeout=60)
    calls = [a.all_reduce_until_error.remote() for a in actors]
    time.sleep(0.5)
    os.kill(pid, number)
    start = time.monotonic()
    for rank in set(range(4)) - {victim}:
        with pytest.raises(CollectiveError) as caught:
            ray.get(calls[rank], timeout=60)
        assert caught.value.missing == (victim,)
    assert time.monotonic() - start < LONG_TIMEOUT_S / 2
    ray.kill(actors[victim])


@pytest.mark.parametrize("mismatched", [1, 2])
def test_ranks_in_different_operations_are_named(mismatched: int, members: Take) -> None:
    actors = members("lrl")
    join(actors, f"confused-{mismatched}", "hierarchical", True)
    call_all(actors, "repeat", "all_reduce", 21)
    calls = [
        a.run_operation.remote("all_reduce", 8 if r == mismatched else 7)
        for r, a in enumerate(actors)
    ]
    for call in calls:
        with pytest.raises(MismatchError, match=f"rank {mismatched} in all_reduce of 8") as caught:
            ray.get(call, timeout=60)
        assert caught.value.missing == (mismatched,)


def test_shm_mismatch_names_ranks_of_the_whole_group(members: Take) -> None:
    actors = members("lrl")
    join(actors, "confused", "hierarchical", False, LONG_TIMEOUT_S)
    call_all(actors, "repeat", "all_reduce", 21)  # the whole group no longer compares operations
    calls = [a.run_operation.remote("all_reduce", 8 if r == 2 else 7) for r, a in enumerate(actors)]
    for rank in (0, 2):
        with pytest.raises(MismatchError, match=r"ranks \[0, 2\]") as caught:
            ray.get(calls[rank], timeout=10)
        assert set(caught.value.missing) <= {0, 2}
    with pytest.raises(CollectiveError):  # waits for its leader, which does not arrive
        ray.get(calls[1], timeout=10)


def test_traffic_of_all_reduce_counts_memory_and_network(members: Take) -> None:
    """Rank 0 reduces with rank 1 through memory, and with rank 2 over the network."""
    actors = members("llr")
    join(actors, "traffic", "hierarchical")
    size = 4 * 10_000
    traffic = [t[:2] for t in call_all(actors, "traffic_of", "all_reduce", 10_000)]
    assert traffic == [(2 * size, 2 * size), (size, size), (size, size)]
