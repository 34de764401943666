"""`ps-async` beside embedding tables: whatever fails, each task is in once, and everywhere."""

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
from counting import BATCH, PARTS, SAMPLES, WIDTH, Counting, counting
from dealing import desk_of
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

RUNS = int(os.environ.get("DISTPLAT_DRAWN_RUNS", "6"))
"""`make test-all` draws many more."""
EPOCHS = 3
STEPS = EPOCHS * SAMPLES // BATCH

ONE_TABLE = "only the first server of the tables has it"
TABLES = "all servers of the tables have it, and no shard"
ONE_SHARD = "and the first shard"
SILENT = "everything has it, and the task scheduler is not told"
MOMENTS = (ONE_TABLE, TABLES, ONE_SHARD, SILENT)


class Gone(DistplatError):
    """As if a worker were lost at this moment."""


@dataclass
class Fault:
    """What happens to a rank in one attempt."""

    at: int = -1
    """It breaks off in its task of this number; -1: in none."""
    moment: str = ""
    made: int = 0
    """Tasks that it has made."""

    def here(self, moment: str) -> bool:
        return self.made == self.at and self.moment == moment


class Unsent:
    """A push that will not come to all servers."""

    def wait(self) -> None:
        raise Gone("lost")


class Counted(LocalRun):
    """A run of `Counting`, attempt by attempt."""

    def __init__(self, most: int = 1) -> None:
        super().__init__(make_job(counting(epochs=EPOCHS)), Counting, most=most)
        self.most = most
        self.ranks.append(self._new_rank())  # one that joins the others
        self.reports.append([])
        self.faults: dict[str, Fault] = {}  #: by worker
        self.lost: set[int] = set()  #: ranks that are made anew in the next attempt
        for cluster in (self.servers.cluster, self.tables.cluster):
            add_rule(cluster, self._twice_or_never)
        self.attempt = BrokenOff(self)

    def _twice_or_never(self, call: Call) -> LocalFault | None:
        """Have all pushes come twice, and some not at all."""
        if call.method != "push":
            return None
        fault = self.faults[call.process]
        if fault.here(ONE_TABLE) and call.actor == "embedding-server-1":
            return LocalFault(lose="request")
        if call.actor == "server-0" and fault.here(TABLES):
            raise Gone("lost")
        if call.actor == "server-1" and fault.here(ONE_SHARD):
            raise Gone("lost")
        return LocalFault(twice=True)

    def loop(self, rank: int, fault: Fault | None = None) -> LeasedLoop:
        """Have a rank join the attempt."""
        self.faults[f"worker-{rank}"] = fault or Fault()
        loop = self.attempt.join(rank, CheckpointPorts())
        assert isinstance(loop, LeasedLoop)
        return loop

    def run(self, faults: dict[int, Fault]) -> None:
        """Have these ranks work until each of them is lost, or nothing is left to do."""
        order = sorted(faults)
        loops = [self.loop(rank, faults[rank]) for rank in order]

        def body(place: int) -> None:
            try:
                loops[place].run()
            except Gone:
                self.desk.call("die", order[place])
                self.lost.add(order[place])

        on_ranks(len(order), body)
        assert drain(self.servers.cluster, 10.0) and drain(self.tables.cluster, 10.0)
        self.servers.end_attempt()

    def next_attempt(self, *, with_scheduler: bool) -> None:
        """Begin a later attempt, with new processes in the place of those that were lost."""
        for rank in sorted(self.lost):
            self.renew(rank)
        self.lost.clear()
        if with_scheduler:
            self.desk.close()
            self.desk = desk_of(self.job, self.roles, self.most)
        self.attempt = BrokenOff(self)

    def check(self) -> None:
        """Each gradient of a sample is in once for each epoch, in its row and in the dense part."""
        for index, service in enumerate(self.tables.table_servers):
            assert (service.store.ledger.steps, service.store.ledger.updates) == (
                STEPS,
                STEPS * PARTS,
            ), index
        rows = np.zeros((SAMPLES, WIDTH), np.float32)
        for service in self.tables.table_servers:
            table = service.store.tables[0]
            table.read(table.ids(), mine := np.empty((len(table), WIDTH), np.float32))
            rows[table.ids()] = mine
        assert (-rows).tolist() == [[EPOCHS] * WIDTH] * SAMPLES
        for index in range(2):
            shard = self.servers.shard_server(index).store
            assert (shard.steps, shard.version) == (STEPS, STEPS * PARTS), index
        params = np.concatenate([self.servers.shard_server(index).params for index in range(2)])
        assert (-params[:SAMPLES]).tolist() == [EPOCHS] * SAMPLES
        self.close()

    def parts(self) -> list[tuple[int, int]]:
        """Give what was reported."""
        reports = [one for reports in self.reports for one in reports]
        return sorted((one.step, one.rank) for one in reports if isinstance(one, StepReport))


class BrokenOff(Attempt):
    """Ranks break off where their faults say."""

    run: Counted

    def __init__(self, run: Counted) -> None:
        super().__init__(run, apart=True)

    def leases(self, rank: int) -> RemoteLeases:
        """Give a way to the scheduler, which is told of nothing that comes after the end."""
        way, fault = self.run.desk.leases(rank, attempt=self.number), self._fault(rank)
        finish = way.finish

        def told(tasks: Sequence[int], evaluations: Sequence[tuple[int, int]] = ()) -> None:
            if fault.here(SILENT):
                way.close()
                raise Gone("lost")
            finish(tasks, evaluations)
            fault.made += len(tasks)

        way.finish = told  # type: ignore[method-assign]
        return way

    def tables(self, rank: int) -> RemoteTables:
        """Give a way to the tables; they have the rows before a rank breaks off."""
        way, fault = self.run.tables.tables(rank, attempt=self.number), self._fault(rank)
        push = way.push

        def sent(*given: Any) -> Any:
            sending = push(*given)
            if fault.here(ONE_TABLE):
                return Unsent()
            sending.wait()
            return sending

        way.push = sent  # type: ignore[assignment,method-assign]
        return way

    def _fault(self, rank: int) -> Fault:
        return self.run.faults[f"worker-{rank}"]


EVERYTHING = [(step, part) for step in range(STEPS) for part in range(PARTS)]


@pytest.mark.parametrize("most", [1, 5])
def test_some_ranks_make_everything_once(most: int) -> None:
    run = Counted(most)
    run.run({rank: Fault() for rank in range(3)})
    run.check()
    assert run.parts() == EVERYTHING
    final = [rank.prepared.flat.params.tolist() for rank in run.ranks]
    assert final[0] == final[1] == final[2]
    assert final[0][:SAMPLES] == [-EPOCHS] * SAMPLES


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_a_lost_rank_was_making_others_make(moment: str) -> None:
    run = Counted(most=3)
    run.run({0: Fault(), 1: Fault(1, moment), 2: Fault(0, moment)})
    run.check()


def test_a_rank_that_was_not_heard_of_and_comes_back_counts_for_nothing() -> None:
    run = Counted()
    first, second = run.loop(0), run.loop(1)
    gradients, silent, came = second.compute.gradients, threading.Event(), threading.Event()

    def make(step: int, clock: Any) -> Any:
        found = gradients(step, clock)
        if not silent.is_set():
            run.desk.call("lose", 1)
            silent.set()
            assert came.wait(60)
        return found

    second.compute.gradients = make  # type: ignore[method-assign]

    def body(rank: int) -> None:
        if rank == 1:
            second.run()
            return
        assert silent.wait(60)
        first.run()
        came.set()

    on_ranks(2, body)
    run.check()
    dropped = [report.figures["dropped"] for report in run.reports[1]]  # type: ignore[union-attr]
    assert dropped and set(dropped) == {1.0}
    for service in run.tables.table_servers:
        assert service.store.ledger.dropped == {1: 1}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("with_scheduler", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
def test_all_are_lost(moment: str, with_scheduler: bool) -> None:
    """Its only rank was alone, so the shards have a step of which the tables lack a task."""
    run = Counted()
    run.run({0: Fault(5, moment)})
    assert run.servers.shard_server(0).store.steps == 3 - (moment == TABLES)
    assert run.tables.table_servers[1].store.ledger.steps == 3 - (moment == ONE_TABLE)
    run.next_attempt(with_scheduler=with_scheduler)
    run.run({0: Fault(), 1: Fault()})
    run.check()


def test_ranks_join_and_leave() -> None:
    run = Counted(most=2)
    begun = [threading.Event() for _ in range(3)]
    dismissed, gone = threading.Event(), threading.Event()

    def body(rank: int) -> None:
        if rank == 2:
            assert dismissed.wait(60)
        loop = run.loop(rank)
        made, make = 0, loop._train_task

        def counted(task: int) -> None:
            nonlocal made
            make(task)
            made += 1
            begun[rank].set()
            if rank == 1:
                assert dismissed.wait(60)
            if rank == 0 and made == 4:
                assert begun[1].wait(60)
                run.desk.call("dismiss", (1,))
                dismissed.set()
            if rank == 0 and made == 6:  # the run is not over before
                assert begun[2].wait(60)
                assert gone.wait(60)

        loop._train_task = counted  # type: ignore[method-assign]
        loop.run()
        assert loop.progress.left == (rank == 1)
        if rank == 1:
            gone.set()

    on_ranks(3, body)
    run.check()
    assert run.parts() == EVERYTHING
    assert run.reports[2]


def test_a_run_in_the_calling_process(tmp_path: Path) -> None:
    spec = counting(0, checkpoint={"every_steps": 5}, storage_path=str(tmp_path))
    result = Trainer(spec, Counting).fit()
    assert [summary.step for summary in result.history] == list(range(1, STEPS + 1))
    assert result.checkpoint is not None
    assert load_file(result.checkpoint)["dense"].tolist() == [-EPOCHS] * SAMPLES
    files = [load_file(path) for path in result.path.glob("embeddings.*-rows.*")]
    found = {
        int(i): row.tolist()
        for one in files
        for i, row in zip(one["ids"], one["rows"], strict=True)
    }
    assert found == {i: [-EPOCHS] * WIDTH for i in range(SAMPLES)}
    assert {path.name for path in (result.path / "checkpoints").iterdir()} >= {
        "step-000010",
        "step-000012",
    }


FAULT = st.builds(Fault, st.integers(0, 4), st.sampled_from(MOMENTS))
ATTEMPT = st.tuples(st.lists(FAULT, min_size=1, max_size=3), st.booleans(), st.booleans())


@example([([Fault(3, ONE_TABLE), Fault(0, TABLES)], True, False)] * 2, 1)
@given(st.lists(ATTEMPT, max_size=3), st.integers(1, 4))
@pytest.mark.timeout(120 + 2 * RUNS)
@settings(max_examples=RUNS, phases=UNSHRUNK)
def test_one_attempt_after_the_other(
    attempts: list[tuple[list[Fault], bool, bool]], most: int
) -> None:
    """In each all ranks are lost, at moments of their own, and perhaps the scheduler with them."""
    run = Counted(most)
    for faults, with_scheduler, one_stays in attempts:
        mine = {rank: Fault(one.at, one.moment) for rank, one in enumerate(faults)}
        kept = run.ranks[0]
        run.run(mine)
        run.next_attempt(with_scheduler=with_scheduler)
        if one_stays:
            run.ranks[0] = kept
    run.run({0: Fault(), 1: Fault()})
    run.check()
