"""`ps-sync` with backup workers: the first gradients make the step, late ones are dropped."""

import threading
from typing import Any

import pytest
import torch
from classifiers import Mlp, job
from comparison import same_bits
from delayed import async_plan, noise
from local_run import Attempt, LocalRun, train

from distplat.platform.errors import (
    DeadlineExceeded,
    GapError,
    ProtocolError,
    SpecError,
    StaleError,
)
from distplat.platform.ledger import PushId, StepLedger, Verdict
from distplat.platform.progress import EvalReport, StepReport
from distplat.platform.spec import Consistency
from distplat.platform.stop_order import StopOrder
from distplat.strategies.server.dense_store import DenseStore

WORLD, SIZE = 4, 11
NEW, COUNTED, LATE = Verdict.NEW, Verdict.REPEAT_COMMITTED, Verdict.LATE


def push(rank: int, seq: int) -> PushId:
    return PushId("run", 1, rank, seq)


def at_version_one(backup: int = 1) -> StepLedger:
    """All but rank 3 have made step 0."""
    book = StepLedger("run", 1, WORLD, backup)
    book.restore(0)
    for rank in range(3):
        assert not book.complete
        assert book.offer(push(rank, 0)) is NEW
    assert book.complete and book.commit(0)
    return book


def test_a_late_push_is_dropped_and_counted_once() -> None:
    book = at_version_one()
    assert [book.offer(push(3, 0)) for _ in range(3)] == [LATE] * 3
    assert book.dropped == {3: 1}
    assert book.offer(push(1, 0)) is COUNTED  # of one that counted it says so
    assert book.dropped == {3: 1}


def test_who_was_late_may_leave_steps_out_but_not_go_ahead() -> None:
    book = at_version_one()
    for seq in (1, 2):
        for rank in range(3):
            book.offer(push(rank, seq))
        book.commit(seq)
    assert book.offer(push(3, 3)) is NEW
    with pytest.raises(GapError):
        book.offer(push(3, 4))
    with pytest.raises(StaleError):
        book.offer(push(3, 2))
    assert book.offer(push(3, 3)) is Verdict.REPEAT_STAGED
    assert book.dropped == {}


def test_without_backup_workers_nothing_is_late() -> None:
    book = StepLedger("run", 1, 2)
    book.restore(5)
    with pytest.raises(ProtocolError):
        book.offer(push(0, 3))
    assert book.offer(push(0, 4)) is COUNTED


def test_the_sum_is_still_a_mean_over_the_samples_that_are_there() -> None:
    plan = async_plan(WORLD, 3, Consistency(backup_workers=1), strategy="ps-sync")
    shard = DenseStore(plan, torch.zeros(SIZE))
    shard.restore(0)
    for rank in (2, 0, 3):
        shard.push(push(rank, 0), noise(SIZE, rank) / WORLD)  # as the loop weights them
    shard.commit(0, None)
    assert shard.push(push(1, 0), torch.full((SIZE,), 1e9)) is LATE
    mean = (noise(SIZE, 0) + noise(SIZE, 2) + noise(SIZE, 3)) / 3
    torch.testing.assert_close(shard.params, -0.1 * mean)


class Evaluated(Mlp):
    def eval_data(self) -> Any:
        return self.train_data()


class OneIsLate(Attempt):
    """
    Rank 2 makes its first step once both others are at a later one.

    Args:
        run: of three ranks.
        step: the later one.
    """

    def __init__(self, run: LocalRun, step: int) -> None:
        super().__init__(run)
        self.step, self.there = step, [threading.Event() for _ in range(2)]

    def before(self, rank: int, step: int) -> StopOrder:
        if rank == 2:
            assert all(there.wait(self.run.timeout_s) for there in self.there)
        elif step == self.step:
            self.there[rank].set()
        return StopOrder.NONE


def test_a_slow_worker_holds_nobody_up() -> None:
    run = LocalRun(job({"name": "ps-sync", "backup_workers": 1}, 3, epochs=16), Evaluated)
    assert OneIsLate(run, 70).make()
    run.close()
    reports = [[r for r in part if isinstance(r, StepReport)] for part in run.reports]
    assert [len(part) for part in reports] == [80] * 3
    figures = reports[2][-1].figures
    assert figures["dropped"] > 0 and figures["skipped"] >= 69
    assert reports[0][-1].figures["skipped"] <= 10


def test_all_ranks_end_with_the_servers_parameters() -> None:
    run = LocalRun(job({"name": "ps-sync", "backup_workers": 1}, 3), Evaluated)
    assert OneIsLate(run, 4).make()
    run.close()
    final = run.servers.shard_server(0).params
    for rank in run.ranks:
        assert torch.equal(rank.prepared.flat.params, final)
    for part in run.reports:
        assert [r.step for r in part if isinstance(r, EvalReport)] == [5, 10, 15]


class OneJoinsLate(Attempt):
    """Rank 2 joins when both others are waited for in vain, or have begun without it."""

    def __init__(self, run: LocalRun) -> None:
        super().__init__(run)
        self.begun = threading.Event()

    def shards(self, rank: int) -> Any:
        if rank == 2:
            self.began_without = self.begun.wait(0.3)
        return super().shards(rank)

    def before(self, rank: int, step: int) -> StopOrder:
        self.begun.set()
        return StopOrder.NONE


def test_a_run_begins_with_all_workers() -> None:
    """One that joins later would begin with the others' step, and lack evaluations before."""
    run = LocalRun(job({"name": "ps-sync", "backup_workers": 1}, 3), Evaluated)
    attempt = OneJoinsLate(run)
    assert attempt.make() and not attempt.began_without
    run.close()
    assert attempt.starts == [0, 0, 0]


def test_a_worker_that_never_joins_is_named() -> None:
    class NeverJoins(Attempt):
        ends = (DeadlineExceeded,)

        def join(self, rank: int, checkpoints: Any) -> Any:
            if rank == 2:
                raise DeadlineExceeded("the test", ("worker-2",), 0.0, "nothing")
            return super().join(rank, checkpoints)

    run = LocalRun(job({"name": "ps-sync", "backup_workers": 1}, 3), Evaluated, timeout_s=0.5)
    attempt = NeverJoins(run)
    assert not attempt.make()
    run.close()
    assert "worker-2" in str(attempt.errors[0]) and "start_timeout_s" in str(attempt.errors[0])


def test_none_is_the_default_and_changes_nothing() -> None:
    assert same_bits(
        train(job({"name": "ps-sync", "backup_workers": 0}, 3), Mlp), train(job("ps-sync", 3), Mlp)
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backup_workers": 3}, "less than the 3 workers"),
        ({"backup_workers": 1, "num_servers": 2}, "needs `num_servers: 1`"),
        ({"backup_workers": 1, "replication": 2}, "cannot be combined with `replication: 2`"),
        ({"replication": 3}, "must be <= 2"),
        ({"backup_workers": -1}, "backup_workers"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        job({"name": "ps-sync", **options}, 3)
