"""The strategy `ps-async` on servers in memory, and its runs made again."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import STEPS, Classify, Conv, Dropout, Mlp, job, plain
from comparison import distance, same_bits
from dealing import desk_of
from jobs import fields_of
from leads import largest_lead
from local_run import Attempt, LocalRun, train
from local_servers import Servers
from rank_threads import on_ranks

from distplat import Trainer
from distplat.actors.verifying import replay_run
from distplat.platform.apply_log import Applied, ApplyLog, log_flaws, staleness_counts
from distplat.platform.errors import SpecError, StorageError
from distplat.platform.progress import AnyReport, EvalReport, StepReport
from distplat.platform.shard_map import ShardPlan
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_strategy
from distplat.strategies.loop.loop import Progress
from distplat.strategies.loop.replay import replay
from distplat.strategies.loop.session import Ports, join, prepare
from distplat.strategies.worker_strategy import make_worker_strategy


def logs_of(run: LocalRun) -> list[ApplyLog]:
    return [ApplyLog(numbers) for numbers in run.servers.logs()]


class Uneven(Mlp):
    """Its second instance, which is rank 1's, takes longer over each batch."""

    made = 0

    def __init__(self) -> None:
        self.pause_s = 0.02 * (Uneven.made % 2)
        Uneven.made += 1

    def loss(self, outputs: Any, targets: Any) -> torch.Tensor:
        time.sleep(self.pause_s)
        return super().loss(outputs, targets)


class OneRests(Attempt):
    """
    Rank 1 rests after its first task until rank 0, which waits for that, has made many.

    Args:
        run: of two ranks.
        many: tasks.
    """

    def __init__(self, run: LocalRun, many: int) -> None:
        super().__init__(run)
        self.many, self.rests, self.goes_on = many, threading.Event(), threading.Event()

    def report(self, rank: int, report: AnyReport) -> None:
        super().report(rank, report)
        if rank == 1:
            self.rests.set()
            assert self.goes_on.wait(60)
        else:
            assert self.rests.wait(60)
            if len(self.run.reports[0]) >= self.many:
                self.goes_on.set()


def log_where_one_rests(many: int, most: int = 1) -> ApplyLog:
    run = LocalRun(job("ps-async", 2, epochs=8), Mlp, most=most)
    assert OneRests(run, many).make()
    run.close()
    return logs_of(run)[0]


@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_one_worker_is_ps_sync_and_one_process_to_the_bit(clip_norm: float | None) -> None:
    more = {"clip_norm": clip_norm, "optimizer": {"name": "Adam", "lr": 0.01}}
    asynchronous = train(job("ps-async", 1, **more), Conv)
    assert same_bits(asynchronous, train(job("ps-sync", 1, **more), Conv))
    assert same_bits(asynchronous, train(job("ring", 1, **more), Conv))


def test_one_worker_is_a_plain_loop() -> None:
    run = train(job("ps-async", 1), Mlp)
    assert distance(run.parameters(), plain("mlp-sgd")[0]) < 1e-5
    two = train(job({"name": "ps-async", "num_servers": 2}, 1), Mlp)
    assert same_bits(run, two)


@pytest.mark.parametrize("servers", [1, 3])
def test_every_gradient_is_applied_once_on_every_shard(servers: int) -> None:
    run = train(job({"name": "ps-async", "num_servers": servers}, 3), Mlp)
    logs = logs_of(run)
    assert len(logs) == servers
    for log in logs:
        assert log_flaws(log, 3, STEPS) == []
        assert len(log) == 3 * STEPS


def test_all_ranks_end_with_the_servers_parameters() -> None:
    run = train(job({"name": "ps-async", "num_servers": 2}, 2, epochs=8), Uneven)
    final = torch.cat([run.servers.shard_server(index).params for index in range(2)])
    for rank in range(2):
        assert torch.equal(run.ranks[rank].prepared.flat.params, final)


def test_a_worker_computes_on_a_vector_of_its_own() -> None:
    run = train(job("ps-async", 2), Mlp)
    vectors = [
        run.servers.shard_server(0).params,
        *(rank.prepared.flat.params for rank in run.ranks),
    ]
    for number, vector in enumerate(vectors):
        vector.fill_(number)
    assert [float(vector[0]) for vector in vectors] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_the_bound_is_never_exceeded(bound: int) -> None:
    run = train(job({"name": "ps-async", "staleness": bound}, 2, epochs=8), Uneven)
    assert largest_lead(logs_of(run)[0], 2) <= bound


def test_without_a_bound_the_fast_run_away() -> None:
    """Or the test above would show nothing: the slow one sits on its lease of six tasks."""
    assert largest_lead(log_where_one_rests(30, most=6), 2) > 3


def test_a_slow_worker_makes_fewer_tasks() -> None:
    made = Counter(applied.rank for applied in log_where_one_rests(60))
    assert made.total() == 2 * 8 * 5
    assert made[0] >= 60 and made[1] >= 1


def test_a_worker_that_leaves_and_one_that_joins() -> None:
    """Every task is made once, whoever is there; the model has the bits of its log."""
    of = job({"name": "ps-async", "num_servers": 2, "delay_compensation": 0.5}, 2, epochs=6)
    strategies = [make_worker_strategy(of) for _ in range(4)]
    ranks = [prepare(of, Mlp(), strategy=one) for one in strategies]
    roles, steps = ranks[0].roles, ranks[0].total_steps
    servers, desk = Servers(of, roles), desk_of(of, roles, most=2)
    reports: list[list[AnyReport]] = [[] for _ in ranks]
    progress = [Progress() for _ in ranks]
    begun, dismissed = [threading.Event() for _ in ranks], threading.Event()

    def body(rank: int) -> None:
        def report(part: AnyReport) -> None:
            reports[rank].append(part)
            begun[rank].set()
            if rank == 1:
                assert dismissed.wait(60)
            if rank == 0 and len(reports[0]) == 5:  # rank 3 takes the place of rank 1
                assert begun[1].wait(60)
                desk.call("dismiss", (1,))
                dismissed.set()
            if rank == 0 and len(reports[0]) > 5:
                assert begun[3].wait(60)

        if rank == 3:
            assert dismissed.wait(60)
        shards, leases = servers.shards(rank, steps), desk.leases(rank)
        ports = Ports(shards=shards, leases=leases)
        where = ranks[rank], strategies[rank], rank, ports
        join(*where, report=report, progress=progress[rank]).run()

    on_ranks(4, lambda rank: body(rank) if rank != 2 else None)
    assert [one.left for one in progress] == [False, True, False, False]
    servers.close()
    desk.close()
    logs = [ApplyLog(numbers) for numbers in servers.logs()]
    assert [log_flaws(log, 2, 2 * STEPS) for log in logs] == [[], []]
    assert {applied.rank for applied in logs[0]} == {0, 1, 3}
    found = Counter((r.step, r.rank) for rank in reports for r in rank if isinstance(r, StepReport))
    assert found == Counter((step, part) for step in range(2 * STEPS) for part in range(2))
    plan = ShardPlan(of, "replay", 0, 2, steps, 2, roles.consistency)
    model = replay(plan, logs, lambda: prepare(of, Mlp()), 1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, ranks[0].flat.model.state_dict()[name]), name


def test_figures_are_those_of_the_log() -> None:
    run = train(job("ps-async", 3, epochs=6), Mlp)
    counts = staleness_counts(logs_of(run), 3)
    made = [[one for one in reports if isinstance(one, StepReport)] for reports in run.reports]
    assert sum(len(steps) for steps in made) == 3 * 2 * STEPS
    for rank, steps in enumerate(made):
        if not steps:  # the others were quicker
            continue
        told = [int(report.figures["staleness"]) for report in steps]
        assert sorted(told) == sorted(counts[rank].elements())
        assert steps[-1].figures["staleness_mean"] == pytest.approx(sum(told) / len(told))
        assert all(report.figures["waiting_s"] >= 0 for report in steps)


class Evaluated(Uneven):
    def eval_data(self) -> Any:
        return self.train_data()


def test_evaluations_stop_nobody_and_the_last_is_of_the_final_parameters() -> None:
    run = train(job("ps-async", 2), Evaluated)
    found = [r for reports in run.reports for r in reports if isinstance(r, EvalReport)]
    parts = sorted((report.step, report.rank) for report in found)
    assert parts == [(step, part) for step in (5, 10, 15) for part in range(2)]
    data = Mlp().train_data()
    model = run.ranks[0].prepared.flat.model.eval()
    with torch.no_grad():
        inputs, targets = data.tensors
        expected = float(Mlp().loss(model(inputs), targets))
    total = sum(report.sums["loss"] for report in found if report.step == 15)
    assert total / len(data) == pytest.approx(expected, rel=1e-4)


def test_it_learns() -> None:
    """About as well as `ps-sync`; how well exactly is a matter of who came first."""
    more = {"epochs": 30, "lr_schedule": {}, "optimizer": {"name": "SGD", "lr": 0.05}}

    def losses(strategy: str) -> tuple[float, float]:
        run = train(job(strategy, 2, **more), Mlp)
        parts = [r for reports in run.reports for r in reports if isinstance(r, StepReport)]
        ends = [[r for r in parts if r.step < 5], [r for r in parts if r.step >= 145]]
        first, last = (
            sum(r.loss * r.samples for r in end) / sum(r.samples for r in end) for end in ends
        )
        return first, last

    (first, found), (_, expected) = losses("ps-async"), losses("ps-sync")
    assert found < 0.95 * first
    assert found < 1.25 * expected


def test_a_gradient_is_of_the_mean_over_the_ranks_own_samples() -> None:
    """Two such gradients of half a batch move as far as one of the whole, at twice the rate."""

    def moved(strategy: str, rate: float) -> torch.Tensor:
        small = {"optimizer": {"name": "SGD", "lr": rate}, "lr_schedule": {}, "steps": 1}
        of = job(strategy, 2, global_batch_size=8, epochs=None, **small)
        return train(of, Mlp).ranks[0].prepared.flat.params - prepare(of, Mlp()).flat.params

    found, expected = moved("ps-async", 1e-3), moved("ps-sync", 2e-3)
    assert float((found - expected).norm()) < 0.01 * float(expected.norm())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"staleness": -1}, r"^strategy.staleness: must be 'unbounded' or >= 0 \(got -1\)$"),
        ({"staleness": "none"}, "staleness: must be 'unbounded' or a whole number"),
        ({"staleness": 1.5}, "staleness: must be 'unbounded' or a whole number"),
        ({"delay_compensation": -0.1}, "delay_compensation"),
        ({"staleness_lr": "perhaps"}, "staleness_lr"),
        ({"num_servers": 0}, "num_servers"),
        ({"backup_workers": 1}, "unknown field .*\n  hint: ps-sync has it: remove it, or change"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        job({"name": "ps-async", **options}, 2)


def again(run: LocalRun, of: Job, task: type[Classify]) -> torch.nn.Module:
    """Make a run again from its logs."""
    roles = make_strategy(of).roles(of)
    steps, world = run.ranks[0].prepared.total_steps, of.scaling.world
    plan = ShardPlan(of, "replay", 0, world, steps, roles.servers, roles.consistency)
    return replay(plan, logs_of(run), lambda: prepare(of, task()), 1)


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({}, {}),
        ({"num_servers": 3}, {"optimizer": {"name": "AdamW", "lr": 0.01}, "clip_norm": 0.3}),
        ({"staleness": 1, "num_servers": 2}, {"gradient_accumulation": 2}),
        ({"staleness_lr": True, "delay_compensation": 0.5, "num_servers": 2}, {}),
        ({"num_servers": 2}, {"precision": "fp16", "ema": {"decay": 0.9}}),
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_replay_gives_the_same_bits(
    workers: int, options: dict[str, Any], more: dict[str, Any]
) -> None:
    of = job({"name": "ps-async", **options}, workers, **more)
    run = train(of, Evaluated)
    model = again(run, of, Evaluated)
    for name, value in model.state_dict().items():
        assert torch.equal(value, run.parameters()[name]), name


def test_a_replay_does_not_depend_on_how_threads_take_turns() -> None:
    of = job({"name": "ps-async", "num_servers": 2}, 3)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(5):
            run = train(of, Mlp)
            model = again(run, of, Mlp)
            for name, value in model.state_dict().items():
                assert torch.equal(value, run.parameters()[name]), name
    finally:
        sys.setswitchinterval(usual)


def test_a_replay_with_dropout_repeats() -> None:
    """Threads share a generator, so only the replays can be compared; see tests/cluster."""
    of = job("ps-async", 2)
    run = train(of, Dropout)
    first, second = (again(run, of, Dropout).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_log_in_another_order_gives_another_model() -> None:
    of = job("ps-async", 2)
    run = train(of, Mlp)
    other = ApplyLog()
    for place, task in enumerate(t for step in range(STEPS) for t in (2 * step + 1, 2 * step)):
        other.add(Applied(task % 2, task, max(0, place - 1)))
    run.servers.logs = lambda: [other.numbers()]  # type: ignore[method-assign]
    found = again(run, of, Mlp).state_dict()
    assert any(not torch.equal(found[name], value) for name, value in run.parameters().items())


def test_logs_that_no_run_can_have_are_refused() -> None:
    """Each shard's is possible, but together they ask rank 0 for a gradient before its time."""
    of = job({"name": "ps-async", "num_servers": 2}, 2, steps=2, epochs=None)
    run = train(of, Mlp)
    first, second = ApplyLog(), ApplyLog()
    for row in [(0, 0, 0), (0, 2, 1), (1, 1, 2), (1, 3, 3)]:
        first.add(Applied(*row))
    for row in [(1, 1, 0), (1, 3, 1), (0, 0, 2), (0, 2, 3)]:
        second.add(Applied(*row))
    run.servers.logs = lambda: [first.numbers(), second.numbers()]  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="cannot be replayed"):
        again(run, of, Mlp)


def test_shards_that_have_other_tasks_of_a_rank_are_refused() -> None:
    """It was lost between two of them, and somebody else has made its task for the second."""
    of = job({"name": "ps-async", "num_servers": 2}, 2, steps=1, epochs=None)
    run = train(of, Mlp)
    first, second = ApplyLog(), ApplyLog()
    for log, ranks in ((first, (0, 1)), (second, (1, 1))):
        for task, rank in enumerate(ranks):
            log.add(Applied(rank, task, task))
    run.servers.logs = lambda: [first.numbers(), second.numbers()]  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="lost between two shards"):
        again(run, of, Mlp)


@pytest.mark.timeout(60)
def test_a_replay_of_a_run_in_which_rank_0_made_nothing() -> None:
    """It came when the others had made all; it is there all the same, and must wait for them."""
    of = job({"name": "ps-async", "num_servers": 2}, 1, steps=3, epochs=None)
    run = train(of, Mlp)
    log = ApplyLog()
    for task in range(3):
        log.add(Applied(1, task, task))
    run.servers.logs = lambda: [log.numbers()] * 2  # type: ignore[method-assign]
    for name, value in again(run, of, Mlp).state_dict().items():
        assert torch.equal(value, run.parameters()[name]), name


def test_what_a_task_raises_ends_a_replay() -> None:
    of = job("ps-async", 2)
    run = train(of, Mlp)

    class Broken(Mlp):
        calls = 0

        def loss(self, outputs: Any, targets: Any) -> torch.Tensor:
            Broken.calls += 1
            if Broken.calls >= 9:
                raise KeyError("no such token: 17")
            return super().loss(outputs, targets)

    with pytest.raises(KeyError, match="17"):
        again(run, of, Broken)


NOTES_THREADS = """
import torch
from pathlib import Path
from torch import nn
from torch.utils.data import TensorDataset
from distplat import Task

class NotesThreads(Task):
    def __init__(self, path):
        self.path = Path(path)
    def model(self):
        return nn.Linear(4, 1)
    def train_data(self):
        return TensorDataset(torch.ones(8, 4), torch.ones(8, 1))
    def loss(self, outputs, targets):
        with self.path.open("a") as file:
            file.write(f"{torch.get_num_threads()} ")
        return nn.functional.mse_loss(outputs, targets)
"""


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_run_in_this_process_is_replayed_with_as_many_threads(tmp_path: Path) -> None:
    """Sums of matrix products differ in their last bits with another number."""
    (tmp_path / "notes_threads.py").write_text(NOTES_THREADS)
    notes = tmp_path / "threads"
    fields = fields_of("ps-async", 0, epochs=None, steps=3, global_batch_size=4)
    fields |= {"task": "notes_threads:NotesThreads", "task_args": {"path": str(notes)}}
    fields["storage_path"] = str(tmp_path / "runs")
    run = Trainer(fields, working_dir=tmp_path, progress=False).fit()
    assert {*notes.read_text().split()} == {"2"}
    notes.unlink()
    assert replay_run(run.path, tmp_path).differing is None
    assert {*notes.read_text().split()} == {"2"}


def test_a_run_that_its_time_cut_short_is_replayed(tmp_path: Path) -> None:
    """Its rates are those of all its steps: by the few that were made the last ones would fall."""
    (tmp_path / "cut_short.py").write_text(NOTES_THREADS)
    fields = fields_of("ps-async", 0, epochs=None, steps=10**5, global_batch_size=4)
    fields |= {"task": "cut_short:NotesThreads", "task_args": {"path": str(tmp_path / "notes")}}
    fields |= {"lr_schedule": {"name": "wsd", "decay_steps": 1}, "max_time_s": 1e-9}
    fields["storage_path"] = str(tmp_path / "runs")
    run = Trainer(fields, working_dir=tmp_path, progress=False).fit()
    assert run.stopped is not None
    made = replay_run(run.path, tmp_path)
    assert (made.updates, made.differing) == (run.totals.steps, None)
