"""`ps-sync` with backup workers: a step takes the first gradients and drops late ones."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from classifiers import Mlp, job
from comparison import same_bits
from control_records import full_record
from delayed import async_plan, noise
from jobs import job_of
from local_run import Attempt, LocalRun, train
from torch import nn
from torch.utils.data import TensorDataset

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
from distplat.strategies.server.server import ShardServer
from distplat.strategies.task import Task

WORLD, SIZE = 4, 11
NEW, REPEATED, LATE = Verdict.NEW, Verdict.REPEAT_COMMITTED, Verdict.LATE


def push(rank: int, seq: int) -> PushId:
    return PushId("run", 1, rank, seq)


def ledger_after_step_0(backup: int = 1) -> StepLedger:
    """Return a ledger in which all ranks but rank 3 have pushed step 0."""
    ledger = StepLedger("run", 1, WORLD, backup)
    ledger.restore(0)
    for rank in range(3):
        assert not ledger.complete
        assert ledger.offer(push(rank, 0)) is NEW
    assert ledger.complete and ledger.commit(0)
    return ledger


def test_late_push_is_dropped_and_counted_once() -> None:
    ledger = ledger_after_step_0()
    assert [ledger.offer(push(3, 0)) for _ in range(3)] == [LATE] * 3
    assert ledger.dropped == {3: 1}
    assert ledger.offer(push(1, 0)) is REPEATED  # its push was applied
    assert ledger.dropped == {3: 1}


def test_late_rank_may_skip_steps_but_not_run_ahead() -> None:
    ledger = ledger_after_step_0()
    for seq in (1, 2):
        for rank in range(3):
            ledger.offer(push(rank, seq))
        ledger.commit(seq)
    assert ledger.offer(push(3, 3)) is NEW
    with pytest.raises(GapError):
        ledger.offer(push(3, 4))
    with pytest.raises(StaleError):
        ledger.offer(push(3, 2))
    assert ledger.offer(push(3, 3)) is Verdict.REPEAT_STAGED
    assert ledger.dropped == {}


def test_no_push_is_late_without_backup_workers() -> None:
    ledger = StepLedger("run", 1, 2)
    ledger.restore(5)
    with pytest.raises(ProtocolError):
        ledger.offer(push(0, 3))
    assert ledger.offer(push(0, 4)) is REPEATED


def test_update_is_the_mean_of_the_received_gradients() -> None:
    plan = async_plan(WORLD, 3, Consistency(backup_workers=1), strategy="ps-sync")
    shard = DenseStore(plan, torch.zeros(SIZE))
    shard.restore(0)
    record = replace(full_record(), samples=float(WORLD))  # a batch of one sample for each rank
    for rank in (2, 0, 3):
        shard.push(push(rank, 0), noise(SIZE, rank) / WORLD, record)
    shard.commit(0, None)
    assert shard.push(push(1, 0), torch.full((SIZE,), 1e9)) is LATE
    mean = (noise(SIZE, 0) + noise(SIZE, 2) + noise(SIZE, 3)) / 3
    torch.testing.assert_close(shard.params, -0.1 * mean)


class Slope(Task):
    """The gradient is the mean of the inputs, or of their weighted values; 0 after five samples."""

    def model(self) -> nn.Module:
        return nn.Linear(1, 1, bias=False)

    def train_data(self) -> TensorDataset:
        inputs = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        return TensorDataset(inputs[:, None], torch.arange(10.0) + 1)

    def loss(self, outputs: Any, targets: Any) -> Any:
        return outputs.mean()


class WeightedSlope(Slope):
    def loss(self, outputs: Any, targets: Any) -> Any:
        return (outputs[:, 0] * targets).sum(), targets.sum()


@pytest.mark.parametrize(
    ("task", "mean"), [(Slope, (1 + 2 + 3 + 4) / 4), (WeightedSlope, (1 + 4 + 9 + 16) / 10)]
)
def test_update_is_the_mean_over_the_samples_of_uneven_parts(
    task: type[Slope], mean: float
) -> None:
    """Rank 2, which is late, has one of five samples; the second step's samples are zeros."""
    fields = {"optimizer": {"name": "SGD", "lr": 1.0}, "data": {"shuffle": False}}
    sizes = {"steps": 2, "global_batch_size": 5}
    run = LocalRun(job_of({"name": "ps-sync", "backup_workers": 1}, 3, **fields, **sizes), task)
    before = run.parameters()["weight"]
    assert SlowRank2(run, 1).make()
    run.close()
    torch.testing.assert_close(run.parameters()["weight"], before - mean)


class MlpWithEvaluation(Mlp):
    def eval_data(self) -> Any:
        return self.train_data()


class SlowRank2(Attempt):
    """
    Rank 2 starts its first step after the other ranks reach a later step.

    Args:
        run: a run of three ranks.
        step: the later step.
    """

    def __init__(self, run: LocalRun, step: int) -> None:
        super().__init__(run)
        self.step, self.reached = step, [threading.Event() for _ in range(2)]

    def before(self, rank: int, step: int) -> StopOrder:
        if rank == 2:
            assert all(event.wait(self.run.timeout_s) for event in self.reached)
        elif step == self.step:
            self.reached[rank].set()
        return StopOrder.NONE


def test_slow_worker_does_not_delay_the_others() -> None:
    run = LocalRun(job({"name": "ps-sync", "backup_workers": 1}, 3, epochs=16), MlpWithEvaluation)
    assert SlowRank2(run, 70).make()
    run.close()
    reports = [[r for r in of_rank if isinstance(r, StepReport)] for of_rank in run.reports]
    assert [len(of_rank) for of_rank in reports] == [80] * 3
    figures = reports[2][-1].figures
    assert figures["dropped"] > 0 and figures["skipped"] >= 69
    assert reports[0][-1].figures["skipped"] <= 10


def test_all_ranks_end_with_the_server_parameters() -> None:
    run = LocalRun(job({"name": "ps-sync", "backup_workers": 1}, 3), MlpWithEvaluation)
    assert SlowRank2(run, 4).make()
    run.close()
    final = run.servers.shard_server(0).params
    for rank in run.ranks:
        assert torch.equal(rank.prepared.flat.params, final)
    for reports in run.reports:
        assert [r.step for r in reports if isinstance(r, EvalReport)] == [5, 10, 15]


class Rank2JoinsLate(Attempt):
    """
    Rank 2 joins once the other ranks' pulls wait for it, or as soon as another rank starts a step.

    Args:
        run: a run of three ranks.
        waiting: set once the other ranks' pulls wait for rank 2.
    """

    def __init__(self, run: LocalRun, waiting: threading.Event) -> None:
        super().__init__(run)
        self.waiting_or_started, self.started = waiting, False

    def shards(self, rank: int) -> Any:
        if rank == 2:
            assert self.waiting_or_started.wait(self.run.timeout_s)
            self.started_without = self.started
        return super().shards(rank)

    def before(self, rank: int, step: int) -> StopOrder:
        self.started = True
        self.waiting_or_started.set()
        return StopOrder.NONE


def test_first_step_waits_for_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that joined later would start at the others' step and miss earlier evaluations."""
    waiting, wait = threading.Event(), ShardServer._wait

    def signal_and_wait(
        server: ShardServer,
        arrived: Callable[[], bool],
        what: str,
        missing: Callable[[], list[int]],
        *limit: Any,
    ) -> float:
        if missing() == [2] and not arrived():
            waiting.set()
        return wait(server, arrived, what, missing, *limit)

    monkeypatch.setattr(ShardServer, "_wait", signal_and_wait)
    run = LocalRun(job({"name": "ps-sync", "backup_workers": 1}, 3), MlpWithEvaluation)
    attempt = Rank2JoinsLate(run, waiting)
    assert attempt.make() and not attempt.started_without
    run.close()
    assert attempt.starts == [0, 0, 0]


def test_deadline_names_worker_that_never_joins() -> None:
    class NeverJoins(Attempt):
        ends = (DeadlineExceeded,)

        def join(self, rank: int, checkpoints: Any) -> Any:
            if rank == 2:
                raise DeadlineExceeded("the test", ("worker-2",), 0.0, "nothing")
            return super().join(rank, checkpoints)

    run = LocalRun(
        job({"name": "ps-sync", "backup_workers": 1}, 3), MlpWithEvaluation, timeout_s=0.5
    )
    attempt = NeverJoins(run)
    assert not attempt.make()
    run.close()
    assert "worker-2" in str(attempt.errors[0]) and "start_timeout_s" in str(attempt.errors[0])


def test_zero_backup_workers_is_the_default() -> None:
    assert same_bits(
        train(job({"name": "ps-sync", "backup_workers": 0}, 3), Mlp), train(job("ps-sync", 3), Mlp)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backup_workers": 3}, "less than the 3 workers"),
        ({"backup_workers": 1, "num_servers": 2}, "needs `num_servers: 1`"),
        ({"backup_workers": 1, "replication": 2}, "cannot be combined with `replication: 2`"),
        ({"replication": 3}, "must be <= 2"),
        ({"backup_workers": -1}, "backup_workers"),
    ],
)
def test_rejects_invalid_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        job({"name": "ps-sync", **options}, 3)
