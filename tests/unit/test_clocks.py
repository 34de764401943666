"""Who waits for whom under a staleness bound."""

import pytest

from distplat.platform.clocks import SYNCHRONOUS, Clocks, Consistency


def clocks(bound: int | None, *done: int) -> Clocks:
    made = Clocks(len(done), bound)
    for rank, count in enumerate(done):
        for _ in range(count):
            made.tick(rank)
    return made


@pytest.mark.parametrize(
    ("bound", "done", "rank", "held_up_by"),
    [
        (None, (0, 100), 1, []),
        (2, (1, 3, 4), 0, []),
        (2, (1, 3, 4), 1, []),
        (2, (1, 3, 4), 2, [0]),
        (2, (1, 1, 4), 2, [0, 1]),
        (0, (3, 3, 3), 1, []),
        (0, (3, 4, 3), 1, [0, 2]),
        (0, (3, 4, 3), 0, []),
    ],
)
def test_who_waits(
    bound: int | None, done: tuple[int, ...], rank: int, held_up_by: list[int]
) -> None:
    assert clocks(bound, *done).waits_for(rank) == held_up_by


@pytest.mark.parametrize("bound", [0, 1, 5])
def test_the_slowest_never_waits(bound: int) -> None:
    made = clocks(bound, 7, 2, 9, 2)
    assert made.waits_for(1) == made.waits_for(3) == []


def test_who_is_not_done() -> None:
    made = clocks(None, 3, 2, 3)
    assert made.unfinished(3) == [1]
    made.tick(1)
    assert made.unfinished(3) == []


def test_workers_compute_on_copies_where_servers_do_not_wait() -> None:
    assert not SYNCHRONOUS.private
    assert Consistency(asynchronous=True).private
