"""Choice and validation of a group's backend."""

from typing import Any

import pytest

from distplat.platform.errors import SpecError
from distplat.platform.topology import (
    RankLocation,
    by_node,
    choose_backend,
    gpus_of_node,
    validate_backend,
)


def locations_on(nodes: str, **features: Any) -> list[RankLocation]:
    """Return one location for each letter of `nodes`, the name of its node."""
    return [RankLocation(node, **features) for node in nodes]


@pytest.mark.parametrize(
    ("locations", "backend", "reason"),
    [
        (locations_on("a"), "shm", "the only worker is on one node"),
        (locations_on("aaa"), "shm", "all 3 workers are on one node"),
        (locations_on("ab"), "gloo", "all 2 workers are on nodes of their own"),
        (locations_on("abcd"), "gloo", "all 4 workers are on nodes of their own"),
        (locations_on("aab"), "hierarchical", "3 workers are on 2 nodes, some on the same"),
        (locations_on("abab"), "hierarchical", "4 workers are on 2 nodes, some on the same"),
        (locations_on("aa", shm=False), "gloo", "shared memory does not work on every node"),
        (locations_on("aab", shm=False), "gloo", "shared memory does not work on every node"),
        (
            locations_on("a") + locations_on("a", shm=False),
            "gloo",
            "shared memory does not work on every node",
        ),
        (locations_on("a", shm=False), "gloo", "shared memory does not work on every node"),
        (locations_on("aab", gpu=True), "nccl", "all 3 workers have a GPU of their own"),
        (locations_on("aa", gpu=True, shm=False), "nccl", "all 2 workers have a GPU of their own"),
        (locations_on("a", gpu=True), "shm", "the only worker is on one node"),
        (locations_on("a", gpu=True) + locations_on("a"), "shm", "all 2 workers are on one node"),
    ],
)
def test_choose_backend(locations: list[RankLocation], backend: str, reason: str) -> None:
    choice = choose_backend(locations)
    assert (choice.backend, choice.why) == (backend, reason)


def test_by_node_keeps_the_order_of_ranks() -> None:
    assert by_node(locations_on("babcab")) == [[0, 2, 5], [1, 4], [3]]


@pytest.mark.parametrize(
    ("backend", "locations"),
    [
        ("gloo", ()),
        ("gloo", locations_on("aab", shm=False)),
        ("shm", locations_on("aa")),
        ("hierarchical", locations_on("aa")),
        ("hierarchical", locations_on("aab")),
        ("hierarchical", locations_on("ab", shm=False)),
        ("nccl", locations_on("ab", gpu=True)),
    ],
)
def test_supported_backend_of_the_job_is_used(backend: str, locations: list[RankLocation]) -> None:
    assert validate_backend(backend, locations).backend == backend


@pytest.mark.parametrize(
    ("backend", "locations", "fragments"),
    [
        ("shm", locations_on("aba"), ["on 2 (a: worker 0, 2; b: worker 1)", "hierarchical"]),
        (
            "shm",
            locations_on("a") + locations_on("a", shm=False),
            ["where worker 1 is", "backend: gloo"],
        ),
        (
            "hierarchical",
            locations_on("aab", shm=False),
            ["where worker 0, 1, 2 is", "backend: gloo"],
        ),
        (
            "nccl",
            locations_on("a", gpu=True) + locations_on("ab"),
            ["worker 1, 2 lacks one of them", "backend: auto"],
        ),
    ],
)
def test_unsupported_backend_is_rejected(
    backend: str, locations: list[RankLocation], fragments: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        validate_backend(backend, locations)
    assert caught.value.problems[0].where == ("strategy", "backend")
    for fragment in fragments:
        assert fragment in str(caught.value)


def gpu_locations(*locations: str) -> list[RankLocation]:
    """Parse locations such as `a35`: node a, GPUs 3 and 5."""
    return [RankLocation(text[0], gpus=tuple(text[1:])) for text in locations]


@pytest.mark.parametrize(
    ("locations", "rank", "gpus"),
    [
        (gpu_locations("a3", "a5"), 1, ["3", "5"]),
        (gpu_locations("a5", "a3"), 0, ["5", "3"]),
        (gpu_locations("a0", "b0", "a2", "b1", "a1"), 2, ["0", "2", "1"]),
        (gpu_locations("a0", "b0", "a2", "b1", "a1"), 3, ["0", "1"]),
        (gpu_locations("a01", "a23", "b45"), 1, ["0", "2", "1", "3"]),
        (gpu_locations("a0", "b0"), 0, []),
        (gpu_locations("a0", "a0", "b0"), 0, []),
        (gpu_locations("a", "a0"), 0, []),
        (gpu_locations("a", "a"), 0, []),
    ],
)
def test_gpus_of_node_are_in_the_order_of_local_ranks(
    locations: list[RankLocation], rank: int, gpus: list[str]
) -> None:
    actual = gpus_of_node(locations, rank)
    assert actual == gpus
    local_rank = [
        n for n, location in enumerate(locations) if location.node == locations[rank].node
    ].index(rank)
    assert not actual or actual[local_rank] == locations[rank].gpus[0]
