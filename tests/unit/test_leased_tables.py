"""`ps-async` with embedding tables: after any loss each task is applied exactly once."""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from call_faults import Call, add_rule, drain
from call_faults import Fault as LocalFault
from counting import BATCH, PARTS, SAMPLES, WIDTH, Counting, counting_fields
from dealing import make_task_scheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st
from local_run import Attempt, LocalRun
from rank_threads import UNSHRUNK, on_ranks
from safetensors.numpy import load_file

from distplat import Trainer
from distplat.actors.servers.leases import RemoteLeases
from distplat.actors.servers.tables import RemoteTables
from distplat.platform.errors import DistplatError
from distplat.platform.progress import StepReport
from distplat.strategies.catalog import make_job
from distplat.strategies.loop.loop import LeasedLoop
from distplat.strategies.loop.session import CheckpointPorts

RUNS = int(os.environ.get("DISTPLAT_DRAWN_RUNS", "3"))
"""`make test-all` runs many more."""
EPOCHS = 3
STEPS = EPOCHS * SAMPLES // BATCH

ONE_TABLE = "the push is at the first embedding server only"
TABLES = "the push is at all embedding servers and no shard"
ONE_SHARD = "the push is at all embedding servers and the first shard"
UNREPORTED = "the push is everywhere, the task scheduler is not notified"
LOSS_POINTS = (ONE_TABLE, TABLES, ONE_SHARD, UNREPORTED)


class WorkerLost(DistplatError):
    """Simulates the loss of a worker."""


@dataclass
class Fault:
    """The fault of a rank in one attempt."""

    task: int = -1
    """Number of the task in which the rank is lost; -1: none."""
    point: str = ""
    finished: int = 0
    """Number of finished tasks."""

    def occurs(self, point: str) -> bool:
        return self.finished == self.task and self.point == point


class LostPush:
    """A push that does not reach all servers."""

    def wait(self) -> None:
        raise WorkerLost("lost")


class CountingRun(LocalRun):
    """Runs `Counting` attempt by attempt."""

    def __init__(self, lease_size: int = 1) -> None:
        super().__init__(make_job(counting_fields(epochs=EPOCHS)), Counting, lease_size=lease_size)
        self.lease_size = lease_size
        self.ranks.append(self._new_rank())  # a joining rank
        self.reports.append([])
        self.faults: dict[str, Fault] = {}  #: by worker
        self.lost: set[int] = set()  #: ranks to replace in the next attempt
        for cluster in (self.servers.cluster, self.tables.cluster):
            add_rule(cluster, self._duplicate_or_lose)
        self.attempt = FaultyAttempt(self)

    def _duplicate_or_lose(self, call: Call) -> LocalFault | None:
        """Duplicate all pushes, and lose some according to the faults."""
        if call.method != "push":
            return None
        fault = self.faults[call.process]
        if fault.occurs(ONE_TABLE) and call.actor == "embedding-server-1":
            return LocalFault(lose="request")
        if call.actor == "server-0" and fault.occurs(TABLES):
            raise WorkerLost("lost")
        if call.actor == "server-1" and fault.occurs(ONE_SHARD):
            raise WorkerLost("lost")
        return LocalFault(twice=True)

    def loop(self, rank: int, fault: Fault | None = None) -> LeasedLoop:
        """Create the loop of a rank that joins the attempt."""
        self.faults[f"worker-{rank}"] = fault or Fault()
        loop = self.attempt.join(rank, CheckpointPorts())
        assert isinstance(loop, LeasedLoop)
        return loop

    def run(self, faults: dict[int, Fault]) -> None:
        """Run these ranks until each is lost or all tasks are finished."""
        order = sorted(faults)
        loops = [self.loop(rank, faults[rank]) for rank in order]

        def body(index: int) -> None:
            try:
                loops[index].run()
            except WorkerLost:
                self.task_scheduler.call("die", order[index])
                self.lost.add(order[index])

        on_ranks(len(order), body)
        assert drain(self.servers.cluster, 10.0) and drain(self.tables.cluster, 10.0)
        self.servers.end_attempt()

    def next_attempt(self, *, with_scheduler: bool) -> None:
        """Start the next attempt with new processes for the lost ones."""
        for rank in sorted(self.lost):
            self.renew(rank)
        self.lost.clear()
        if with_scheduler:
            self.task_scheduler.close()
            self.task_scheduler = make_task_scheduler(self.job, self.roles, self.lease_size)
        self.attempt = FaultyAttempt(self)

    def check(self) -> None:
        """Check that each sample counts once per epoch in its row and in the dense part."""
        for index, service in enumerate(self.tables.table_servers):
            assert (service.store.ledger.steps, service.store.ledger.updates) == (
                STEPS,
                STEPS * PARTS,
            ), index
        rows = np.zeros((SAMPLES, WIDTH), np.float32)
        for service in self.tables.table_servers:
            table = service.store.tables[0]
            table.read(table.ids(), shard_rows := np.empty((len(table), WIDTH), np.float32))
            rows[table.ids()] = shard_rows
        assert (-rows).tolist() == [[EPOCHS] * WIDTH] * SAMPLES
        for index in range(2):
            shard = self.servers.shard_server(index).store
            assert (shard.steps, shard.version) == (STEPS, STEPS * PARTS), index
        params = np.concatenate([self.servers.shard_server(index).params for index in range(2)])
        assert (-params[:SAMPLES]).tolist() == [EPOCHS] * SAMPLES
        self.close()

    def parts(self) -> list[tuple[int, int]]:
        """Return step and rank of each step report."""
        reports = [report for reports in self.reports for report in reports]
        return sorted((r.step, r.rank) for r in reports if isinstance(r, StepReport))


class FaultyAttempt(Attempt):
    """Ranks are lost according to their faults."""

    run: CountingRun

    def __init__(self, run: CountingRun) -> None:
        super().__init__(run, remote_servers=True)

    def leases(self, rank: int) -> RemoteLeases:
        """Return a client of the scheduler that fails instead of finishing a task."""
        client, fault = self.run.task_scheduler.leases(rank, attempt=self.number), self._fault(rank)
        finish = client.finish

        def finish_or_fail(
            tasks: Sequence[int], evaluations: Sequence[tuple[int, int]] = ()
        ) -> None:
            if fault.occurs(UNREPORTED):
                client.close()
                raise WorkerLost("lost")
            finish(tasks, evaluations)
            fault.finished += len(tasks)

        client.finish = finish_or_fail  # type: ignore[method-assign]
        return client

    def tables(self, rank: int) -> RemoteTables:
        """Return a client of the tables that waits for each push before the rank is lost."""
        client, fault = self.run.tables.tables(rank, attempt=self.number), self._fault(rank)
        push = client.push

        def push_and_wait(*args: Any) -> Any:
            sending = push(*args)
            if fault.occurs(ONE_TABLE):
                return LostPush()
            sending.wait()
            return sending

        client.push = push_and_wait  # type: ignore[assignment,method-assign]
        return client

    def _fault(self, rank: int) -> Fault:
        return self.run.faults[f"worker-{rank}"]


ALL_TASKS = [(step, part) for step in range(STEPS) for part in range(PARTS)]


@pytest.mark.parametrize("lease_size", [1, 5])
def test_ranks_apply_each_task_once(lease_size: int) -> None:
    run = CountingRun(lease_size)
    run.run({rank: Fault() for rank in range(3)})
    run.check()
    assert run.parts() == ALL_TASKS
    final = [rank.prepared.flat.params.tolist() for rank in run.ranks]
    assert final[0] == final[1] == final[2]
    assert final[0][:SAMPLES] == [-EPOCHS] * SAMPLES


@pytest.mark.parametrize("point", LOSS_POINTS)
def test_tasks_of_lost_ranks_are_reassigned(point: str) -> None:
    run = CountingRun(lease_size=3)
    run.run({0: Fault(), 1: Fault(1, point), 2: Fault(0, point)})
    run.check()


def test_late_pushes_of_a_rank_declared_lost_are_dropped() -> None:
    run = CountingRun()
    first, second = run.loop(0), run.loop(1)
    gradients, is_lost, others_finished = (
        second.compute.gradients,
        threading.Event(),
        threading.Event(),
    )

    def pause_first(step: int, clock: Any) -> Any:
        batch_gradients = gradients(step, clock)
        if not is_lost.is_set():
            run.task_scheduler.call("lose", 1)
            is_lost.set()
            assert others_finished.wait(60)
        return batch_gradients

    second.compute.gradients = pause_first  # type: ignore[method-assign]

    def body(rank: int) -> None:
        if rank == 1:
            second.run()
            return
        assert is_lost.wait(60)
        first.run()
        others_finished.set()

    on_ranks(2, body)
    run.check()
    dropped = [report.figures["dropped"] for report in run.reports[1]]  # type: ignore[union-attr]
    assert dropped and set(dropped) == {1.0}
    for service in run.tables.table_servers:
        assert service.store.ledger.dropped == {1: 1}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("with_scheduler", [False, True])
@pytest.mark.parametrize("point", LOSS_POINTS)
def test_all_ranks_are_lost(point: str, with_scheduler: bool) -> None:
    """With a single rank, shards may apply a step before the tables have all its tasks."""
    run = CountingRun()
    run.run({0: Fault(5, point)})
    assert run.servers.shard_server(0).store.steps == 3 - (point == TABLES)
    assert run.tables.table_servers[1].store.ledger.steps == 3 - (point == ONE_TABLE)
    run.next_attempt(with_scheduler=with_scheduler)
    run.run({0: Fault(), 1: Fault()})
    run.check()


def test_ranks_join_and_leave() -> None:
    run = CountingRun(lease_size=2)
    trained = [threading.Event() for _ in range(3)]
    dismissed, has_left = threading.Event(), threading.Event()

    def body(rank: int) -> None:
        if rank == 2:
            assert dismissed.wait(60)
        loop = run.loop(rank)
        finished, train_task = 0, loop._train_task

        def train_and_count(task: int) -> None:
            nonlocal finished
            train_task(task)
            finished += 1
            trained[rank].set()
            if rank == 1:
                assert dismissed.wait(60)
            if rank == 0 and finished == 4:
                assert trained[1].wait(60)
                run.task_scheduler.call("dismiss", (1,))
                dismissed.set()
            if rank == 0 and finished == 6:  # keep the run going until then
                assert trained[2].wait(60)
                assert has_left.wait(60)

        loop._train_task = train_and_count  # type: ignore[method-assign]
        loop.run()
        assert loop.progress.left == (rank == 1)
        if rank == 1:
            has_left.set()

    on_ranks(3, body)
    run.check()
    assert run.parts() == ALL_TASKS
    assert run.reports[2]


def test_run_in_the_calling_process(tmp_path: Path) -> None:
    spec = counting_fields(0, checkpoint={"every_steps": 5}, storage_path=str(tmp_path))
    result = Trainer(spec, Counting).fit()
    assert [summary.step for summary in result.history] == list(range(1, STEPS + 1))
    assert result.checkpoint is not None
    assert load_file(result.checkpoint)["dense"].tolist() == [-EPOCHS] * SAMPLES
    files = [load_file(path) for path in result.path.glob("embeddings.*-rows.*")]
    rows = {
        int(i): row.tolist()
        for file in files
        for i, row in zip(file["ids"], file["rows"], strict=True)
    }
    assert rows == {i: [-EPOCHS] * WIDTH for i in range(SAMPLES)}
    assert {path.name for path in (result.path / "checkpoints").iterdir()} >= {
        "step-000010",
        "step-000012",
    }


FAULT = st.builds(Fault, st.integers(0, 4), st.sampled_from(LOSS_POINTS))
ATTEMPT = st.tuples(st.lists(FAULT, min_size=1, max_size=3), st.booleans(), st.booleans())


@example([([Fault(3, ONE_TABLE), Fault(0, TABLES)], True, False)] * 2, 1)
@given(st.lists(ATTEMPT, max_size=3), st.integers(1, 4))
@pytest.mark.timeout(120 + 2 * RUNS)
@settings(max_examples=RUNS, phases=UNSHRUNK)
def test_random_sequences_of_attempts(
    attempts: list[tuple[list[Fault], bool, bool]], lease_size: int
) -> None:
    """Each attempt loses all ranks at random moments, and sometimes the scheduler."""
    run = CountingRun(lease_size)
    for faults, with_scheduler, first_survives in attempts:
        by_rank = {rank: Fault(fault.task, fault.point) for rank, fault in enumerate(faults)}
        first_rank = run.ranks[0]
        run.run(by_rank)
        run.next_attempt(with_scheduler=with_scheduler)
        if first_survives:
            run.ranks[0] = first_rank
    run.run({0: Fault(), 1: Fault()})
    run.check()
