"""How fast workers are, who is silent, and who is marked as a straggler."""

import pytest

from distplat.platform.worker_stats import WINDOW_S, WorkerHeartbeat, WorkerTable


def workers_table(*step_s: float, steps: int = 8) -> WorkerTable:
    """Have each worker make steps of so many seconds, told of one by one."""
    made = WorkerTable()
    for rank, seconds in enumerate(step_s):
        made.begin(rank, 0.0)
        for step in range(1, steps + 1):
            made.add_heartbeat(rank, WorkerHeartbeat(step, step, step * seconds), step * 0.5)
    return made


@pytest.mark.parametrize(
    ("step_s", "marked"),
    [
        ((0.1, 0.1, 0.1), []),
        ((0.1, 0.1, 0.5), [2]),
        ((0.1, 0.19, 0.1), []),
        ((0.1, 0.21, 0.1), [1]),
        ((0.5, 0.1, 0.1, 0.5, 0.1), [0, 3]),
        ((0.1,), []),
        ((0.1, 0.15), []),
        ((0.1, 0.5), [1]),  # of two the faster is the usual
        ((0.0, 0.0, 0.0), []),
    ],
)
def test_who_is_marked(step_s: tuple[float, ...], marked: list[int]) -> None:
    found = workers_table(*step_s).stats(4.0)
    assert [one.rank for one in found if one.straggler] == marked


def test_speed_and_work_of_a_step() -> None:
    (one,) = workers_table(0.1).stats(5.0)
    assert (workers_table(0.1).wall_s(0), workers_table(0.1).wall_s(1)) == (0.5, None)
    assert (one.step, one.made, one.per_s, one.silent_s) == (8, 8, 2.0, 1.0)
    assert one.step_s == pytest.approx(0.1)


def test_of_too_few_steps_nothing_is_concluded() -> None:
    found = workers_table(0.1, 5.0, 0.1, steps=2).stats(4.0)
    assert [(one.per_s, one.straggler) for one in found] == [(None, False)] * 3


def test_who_was_slow_long_ago_is_not_marked() -> None:
    made = workers_table(0.1, 1.0, 0.1)
    for rank in range(3):
        for step in range(9, 9 + 4 * int(WINDOW_S)):
            beat = WorkerHeartbeat(step, step, 8.0 + step * 0.1)
            made.add_heartbeat(rank, beat, step * 0.5)
    assert not any(one.straggler for one in made.stats(30.0))


def test_news_that_come_out_of_order_are_passed_over() -> None:
    made = workers_table(0.1)
    made.add_heartbeat(0, WorkerHeartbeat(3, 3, 0.3), 9.0)
    assert made.stats(9.0)[0].silent_s == 5.0


def test_who_is_silent() -> None:
    made = workers_table(0.1, 0.1)
    made.add_heartbeat(1, WorkerHeartbeat(9, 9, 0.9), 10.0)
    assert made.silent(10.0, 5.0) == [0]
    made.forget(0)
    assert made.silent(10.0, 5.0) == []


def test_a_new_attempt_counts_on() -> None:
    made = workers_table(0.1)
    made.begin(0, 10.0)
    made.add_heartbeat(0, WorkerHeartbeat(9, 1, 0.1), 11.0)
    (one,) = made.stats(11.0)
    assert (one.step, one.made) == (9, 9)


def test_who_is_no_more_is_forgotten_with_all_that_he_made() -> None:
    made = workers_table(0.1, 0.1, 0.1)
    made.begin(2, 5.0)  # the next attempt: what was made before counts
    assert [one.made for one in made.stats(5.0)] == [8, 8, 8]
    made.keep_only(range(2))
    assert made.ranks == {0, 1}
    made.begin(2, 6.0)  # another process has the rank now
    assert [one.made for one in made.stats(6.0)] == [8, 8, 0]
