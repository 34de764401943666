"""Which backend a group takes, as tables; and what is refused."""

import pytest

from distplat.platform.errors import SpecError
from distplat.platform.topology import RankLocation, by_node, choose, chosen_by_user


def at(nodes: str, **qualities: bool) -> list[RankLocation]:
    """Give one place per letter, which names the node."""
    return [RankLocation(node, **qualities) for node in nodes]


@pytest.mark.parametrize(
    ("places", "backend", "why"),
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
def test_choice(places: list[RankLocation], backend: str, why: str) -> None:
    choice = choose(places)
    assert (choice.backend, choice.why) == (backend, why)


def test_ranks_by_node_come_in_the_order_of_ranks() -> None:
    assert by_node(at("babcab")) == [[0, 2, 5], [1, 4], [3]]


@pytest.mark.parametrize(
    ("backend", "places"),
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
def test_what_a_job_names_is_taken(backend: str, places: list[RankLocation]) -> None:
    assert chosen_by_user(backend, places).backend == backend


@pytest.mark.parametrize(
    ("backend", "places", "says"),
    [
        ("shm", at("aba"), ["on 2 (a: worker 0, 2; b: worker 1)", "hierarchical"]),
        ("shm", at("a") + at("a", shm=False), ["where worker 1 is", "backend: gloo"]),
        ("hierarchical", at("aab", shm=False), ["where worker 0, 1, 2 is", "backend: gloo"]),
        ("nccl", at("a", gpu=True) + at("ab"), ["worker 1, 2 has not both", "backend: auto"]),
    ],
)
def test_what_cannot_work_is_refused(
    backend: str, places: list[RankLocation], says: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        chosen_by_user(backend, places)
    assert caught.value.problems[0].where == ("strategy", "backend")
    for words in says:
        assert words in str(caught.value)
