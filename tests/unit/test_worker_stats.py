"""WorkerTable: speed, silence and stragglers."""

import pytest

from distplat.platform.worker_stats import WINDOW_S, WorkerHeartbeat, WorkerTable


def table_of(*step_s: float, steps: int = 8) -> WorkerTable:
    """Return a table with one heartbeat per step of each worker."""
    table = WorkerTable()
    for rank, seconds in enumerate(step_s):
        table.begin(rank, 0.0)
        for step in range(1, steps + 1):
            table.add_heartbeat(rank, WorkerHeartbeat(step, step, step * seconds), step * 0.5)
    return table


@pytest.mark.parametrize(
    ("step_s", "stragglers"),
    [
        ((0.1, 0.1, 0.1), []),
        ((0.1, 0.1, 0.5), [2]),
        ((0.1, 0.19, 0.1), []),
        ((0.1, 0.21, 0.1), [1]),
        ((0.5, 0.1, 0.1, 0.5, 0.1), [0, 3]),
        ((0.1,), []),
        ((0.1, 0.15), []),
        ((0.1, 0.5), [1]),  # with two workers the faster one is the reference
        ((0.0, 0.0, 0.0), []),
    ],
)
def test_stragglers_are_marked(step_s: tuple[float, ...], stragglers: list[int]) -> None:
    stats = table_of(*step_s).stats(4.0)
    assert [worker.rank for worker in stats if worker.straggler] == stragglers


def test_stats_of_one_worker() -> None:
    (worker,) = table_of(0.1).stats(5.0)
    assert (table_of(0.1).wall_s(0), table_of(0.1).wall_s(1)) == (0.5, None)
    assert (worker.step, worker.made, worker.per_s, worker.silent_s) == (8, 8, 2.0, 1.0)
    assert worker.step_s == pytest.approx(0.1)


def test_too_few_steps_give_no_speed() -> None:
    stats = table_of(0.1, 5.0, 0.1, steps=2).stats(4.0)
    assert [(worker.per_s, worker.straggler) for worker in stats] == [(None, False)] * 3


def test_slow_steps_before_the_window_are_ignored() -> None:
    table = table_of(0.1, 1.0, 0.1)
    for rank in range(3):
        for step in range(9, 9 + 4 * int(WINDOW_S)):
            beat = WorkerHeartbeat(step, step, 8.0 + step * 0.1)
            table.add_heartbeat(rank, beat, step * 0.5)
    assert not any(worker.straggler for worker in table.stats(30.0))


def test_out_of_order_heartbeat_is_ignored() -> None:
    table = table_of(0.1)
    table.add_heartbeat(0, WorkerHeartbeat(3, 3, 0.3), 9.0)
    assert table.stats(9.0)[0].silent_s == 5.0


def test_silent_workers_are_listed() -> None:
    table = table_of(0.1, 0.1)
    table.add_heartbeat(1, WorkerHeartbeat(9, 9, 0.9), 10.0)
    assert table.silent(10.0, 5.0) == [0]
    table.forget(0)
    assert table.silent(10.0, 5.0) == []


def test_new_attempt_continues_the_step_count() -> None:
    table = table_of(0.1)
    table.begin(0, 10.0)
    table.add_heartbeat(0, WorkerHeartbeat(9, 1, 0.1), 11.0)
    (worker,) = table.stats(11.0)
    assert (worker.step, worker.made) == (9, 9)


def test_removed_worker_loses_its_step_count() -> None:
    table = table_of(0.1, 0.1, 0.1)
    table.begin(2, 5.0)  # the next attempt keeps the count
    assert [worker.made for worker in table.stats(5.0)] == [8, 8, 8]
    table.keep_only(range(2))
    assert table.ranks == {0, 1}
    table.begin(2, 6.0)  # a new process of the rank
    assert [worker.made for worker in table.stats(6.0)] == [8, 8, 0]
