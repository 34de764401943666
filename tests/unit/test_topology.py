"""Which backend a group takes, as tables; and what is refused."""

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


def at(nodes: str, **qualities: Any) -> list[RankLocation]:
    """Give one location per letter, which names the node."""
    return [RankLocation(node, **qualities) for node in nodes]


@pytest.mark.parametrize(
    ("locations", "backend", "why"),
    [
        (at("a"), "shm", "the only worker is on one node"),
        (at("aaa"), "shm", "all 3 workers are on one node"),
        (at("ab"), "gloo", "all 2 workers are on nodes of their own"),
        (at("abcd"), "gloo", "all 4 workers are on nodes of their own"),
        (at("aab"), "hierarchical", "3 workers are on 2 nodes, some on the same"),
        (at("abab"), "hierarchical", "4 workers are on 2 nodes, some on the same"),
        (at("aa", shm=False), "gloo", "shared memory does not work on every node"),
        (at("aab", shm=False), "gloo", "shared memory does not work on every node"),
        (at("a") + at("a", shm=False), "gloo", "shared memory does not work on every node"),
        (at("a", shm=False), "gloo", "shared memory does not work on every node"),
        (at("aab", gpu=True), "nccl", "all 3 workers have a GPU of their own"),
        (at("aa", gpu=True, shm=False), "nccl", "all 2 workers have a GPU of their own"),
        (at("a", gpu=True), "shm", "the only worker is on one node"),
        (at("a", gpu=True) + at("a"), "shm", "all 2 workers are on one node"),
    ],
)
def test_choice(locations: list[RankLocation], backend: str, why: str) -> None:
    choice = choose_backend(locations)
    assert (choice.backend, choice.why) == (backend, why)


def test_ranks_by_node_come_in_the_order_of_ranks() -> None:
    assert by_node(at("babcab")) == [[0, 2, 5], [1, 4], [3]]


@pytest.mark.parametrize(
    ("backend", "locations"),
    [
        ("gloo", ()),
        ("gloo", at("aab", shm=False)),
        ("shm", at("aa")),
        ("hierarchical", at("aa")),
        ("hierarchical", at("aab")),
        ("hierarchical", at("ab", shm=False)),
        ("nccl", at("ab", gpu=True)),
    ],
)
def test_what_a_job_names_is_taken(backend: str, locations: list[RankLocation]) -> None:
    assert validate_backend(backend, locations).backend == backend


@pytest.mark.parametrize(
    ("backend", "locations", "says"),
    [
        ("shm", at("aba"), ["on 2 (a: worker 0, 2; b: worker 1)", "hierarchical"]),
        ("shm", at("a") + at("a", shm=False), ["where worker 1 is", "backend: gloo"]),
        ("hierarchical", at("aab", shm=False), ["where worker 0, 1, 2 is", "backend: gloo"]),
        ("nccl", at("a", gpu=True) + at("ab"), ["worker 1, 2 lacks one of them", "backend: auto"]),
    ],
)
def test_what_cannot_work_is_refused(
    backend: str, locations: list[RankLocation], says: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        validate_backend(backend, locations)
    assert caught.value.problems[0].where == ("strategy", "backend")
    for words in says:
        assert words in str(caught.value)


def with_cards(*locations: str) -> list[RankLocation]:
    """Give locations such as `a35`: node a, GPUs 3 and 5."""
    return [RankLocation(text[0], gpus=tuple(text[1:])) for text in locations]


@pytest.mark.parametrize(
    ("locations", "rank", "gpus"),
    [
        (with_cards("a3", "a5"), 1, ["3", "5"]),
        (with_cards("a5", "a3"), 0, ["5", "3"]),
        (with_cards("a0", "b0", "a2", "b1", "a1"), 2, ["0", "2", "1"]),
        (with_cards("a0", "b0", "a2", "b1", "a1"), 3, ["0", "1"]),
        (with_cards("a01", "a23", "b45"), 1, ["0", "2", "1", "3"]),
        (with_cards("a0", "b0"), 0, []),
        (with_cards("a0", "a0", "b0"), 0, []),
        (with_cards("a", "a0"), 0, []),
        (with_cards("a", "a"), 0, []),
    ],
)
def test_the_card_of_a_rank_has_the_number_of_its_local_rank(
    locations: list[RankLocation], rank: int, gpus: list[str]
) -> None:
    found = gpus_of_node(locations, rank)
    assert found == gpus
    local = [
        n for n, location in enumerate(locations) if location.node == locations[rank].node
    ].index(rank)
    assert not found or found[local] == locations[rank].gpus[0]
