"""The strategy `ps-async` on servers in memory, and replays of its runs."""

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from classifiers import STEPS, Classify, Conv, Dropout, Mlp, job, train_plain
from comparison import distance, same_bits
from dealing import make_task_scheduler
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
    """The second instance (rank 1's) is slower in each batch."""

    instances = 0

    def __init__(self) -> None:
        self.pause_s = 0.02 * (Uneven.instances % 2)
        Uneven.instances += 1

    def loss(self, outputs: Any, targets: Any) -> torch.Tensor:
        time.sleep(self.pause_s)
        return super().loss(outputs, targets)


class RankOnePauses(Attempt):
    """
    Rank 1 pauses after its first task until rank 0, which waits for the pause, has done some.

    Args:
        run: a run of two ranks.
        tasks: number of tasks of rank 0.
    """

    def __init__(self, run: LocalRun, tasks: int) -> None:
        super().__init__(run)
        self.tasks, self.paused, self.resume = tasks, threading.Event(), threading.Event()

    def report(self, rank: int, report: AnyReport) -> None:
        super().report(rank, report)
        if rank == 1:
            self.paused.set()
            assert self.resume.wait(60)
        else:
            assert self.paused.wait(60)
            if len(self.run.reports[0]) >= self.tasks:
                self.resume.set()


def log_with_a_pause(tasks: int, lease_size: int = 1) -> ApplyLog:
    run = LocalRun(job("ps-async", 2, epochs=8), Mlp, lease_size=lease_size)
    assert RankOnePauses(run, tasks).make()
    run.close()
    return logs_of(run)[0]


@pytest.mark.parametrize("clip_norm", [None, 0.3])
def test_one_worker_is_bit_identical_to_ps_sync_and_ring(clip_norm: float | None) -> None:
    fields = {"clip_norm": clip_norm, "optimizer": {"name": "Adam", "lr": 0.01}}
    asynchronous = train(job("ps-async", 1, **fields), Conv)
    assert same_bits(asynchronous, train(job("ps-sync", 1, **fields), Conv))
    assert same_bits(asynchronous, train(job("ring", 1, **fields), Conv))


def test_one_worker_matches_plain_loop() -> None:
    run = train(job("ps-async", 1), Mlp)
    assert distance(run.parameters(), train_plain("mlp-sgd")[0]) < 1e-5
    two_servers = train(job({"name": "ps-async", "num_servers": 2}, 1), Mlp)
    assert same_bits(run, two_servers)


@pytest.mark.parametrize("servers", [1, 3])
def test_each_gradient_is_applied_once_on_each_shard(servers: int) -> None:
    run = train(job({"name": "ps-async", "num_servers": servers}, 3), Mlp)
    logs = logs_of(run)
    assert len(logs) == servers
    for log in logs:
        assert log_flaws(log, 3, STEPS) == []
        assert len(log) == 3 * STEPS


def test_ranks_end_with_the_servers_parameters() -> None:
    run = train(job({"name": "ps-async", "num_servers": 2}, 2, epochs=8), Uneven)
    final = torch.cat([run.servers.shard_server(index).params for index in range(2)])
    for rank in range(2):
        assert torch.equal(run.ranks[rank].prepared.flat.params, final)


def test_workers_have_their_own_vectors() -> None:
    run = train(job("ps-async", 2), Mlp)
    vectors = [
        run.servers.shard_server(0).params,
        *(rank.prepared.flat.params for rank in run.ranks),
    ]
    for number, vector in enumerate(vectors):
        vector.fill_(number)
    assert [float(vector[0]) for vector in vectors] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_staleness_bound_is_kept(bound: int) -> None:
    run = train(job({"name": "ps-async", "staleness": bound}, 2, epochs=8), Uneven)
    assert largest_lead(logs_of(run)[0], 2) <= bound


def test_lead_is_large_without_a_bound() -> None:
    """Control of the test above: the slow rank keeps a lease of six tasks."""
    assert largest_lead(log_with_a_pause(30, lease_size=6), 2) > 3


def test_slow_worker_does_fewer_tasks() -> None:
    tasks = Counter(applied.rank for applied in log_with_a_pause(60))
    assert tasks.total() == 2 * 8 * 5
    assert tasks[0] >= 60 and tasks[1] >= 1


def test_one_worker_leaves_and_another_joins() -> None:
    """Each task is done once, and a replay of the logs is bit-identical to the model."""
    config = job({"name": "ps-async", "num_servers": 2, "delay_compensation": 0.5}, 2, epochs=6)
    strategies = [make_worker_strategy(config) for _ in range(4)]
    ranks = [prepare(config, Mlp(), strategy=strategy) for strategy in strategies]
    roles, steps = ranks[0].roles, ranks[0].total_steps
    servers, desk = Servers(config, roles), make_task_scheduler(config, roles, lease_size=2)
    reports: list[list[AnyReport]] = [[] for _ in ranks]
    progress = [Progress() for _ in ranks]
    started, dismissed = [threading.Event() for _ in ranks], threading.Event()

    def body(rank: int) -> None:
        def report(part: AnyReport) -> None:
            reports[rank].append(part)
            started[rank].set()
            if rank == 1:
                assert dismissed.wait(60)
            if rank == 0 and len(reports[0]) == 5:  # rank 3 replaces rank 1
                assert started[1].wait(60)
                desk.call("dismiss", (1,))
                dismissed.set()
            if rank == 0 and len(reports[0]) > 5:
                assert started[3].wait(60)

        if rank == 3:
            assert dismissed.wait(60)
        shards, leases = servers.shards(rank, steps), desk.leases(rank)
        ports = Ports(shards=shards, leases=leases)
        arguments = ranks[rank], strategies[rank], rank, ports
        join(*arguments, report=report, progress=progress[rank]).run()

    on_ranks(4, lambda rank: body(rank) if rank != 2 else None)
    assert [rank_progress.left for rank_progress in progress] == [False, True, False, False]
    servers.close()
    desk.close()
    logs = [ApplyLog(numbers) for numbers in servers.logs()]
    assert [log_flaws(log, 2, 2 * STEPS) for log in logs] == [[], []]
    assert {applied.rank for applied in logs[0]} == {0, 1, 3}
    found = Counter((r.step, r.rank) for rank in reports for r in rank if isinstance(r, StepReport))
    assert found == Counter((step, part) for step in range(2 * STEPS) for part in range(2))
    plan = ShardPlan(config, "replay", 0, 2, steps, 2, roles.consistency)
    model = replay(plan, logs, lambda: prepare(config, Mlp()), 1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, ranks[0].flat.model.state_dict()[name]), name


def test_figures_match_the_log() -> None:
    run = train(job("ps-async", 3, epochs=6), Mlp)
    counts = staleness_counts(logs_of(run), 3)
    steps_of = [[r for r in reports if isinstance(r, StepReport)] for reports in run.reports]
    assert sum(len(steps) for steps in steps_of) == 3 * 2 * STEPS
    for rank, steps in enumerate(steps_of):
        if not steps:  # faster ranks have done all tasks
            continue
        staleness = [int(report.figures["staleness"]) for report in steps]
        assert sorted(staleness) == sorted(counts[rank].elements())
        assert steps[-1].figures["staleness_mean"] == pytest.approx(sum(staleness) / len(staleness))
        assert all(report.figures["waiting_s"] >= 0 for report in steps)


class Evaluated(Uneven):
    def eval_data(self) -> Any:
        return self.train_data()


def test_last_evaluation_is_of_the_final_parameters() -> None:
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


def test_loss_decreases_as_with_ps_sync() -> None:
    """The bound is loose, because the result depends on the order of pushes."""
    fields = {"epochs": 30, "lr_schedule": {}, "optimizer": {"name": "SGD", "lr": 0.05}}

    def losses(strategy: str) -> tuple[float, float]:
        run = train(job(strategy, 2, **fields), Mlp)
        parts = [r for reports in run.reports for r in reports if isinstance(r, StepReport)]
        ends = [[r for r in parts if r.step < 5], [r for r in parts if r.step >= 145]]
        first, last = (
            sum(r.loss * r.samples for r in end) / sum(r.samples for r in end) for end in ends
        )
        return first, last

    (first, found), (_, expected) = losses("ps-async"), losses("ps-sync")
    assert found < 0.95 * first
    assert found < 1.25 * expected


def test_gradient_is_of_the_mean_over_the_ranks_samples() -> None:
    """Two gradients of half a batch equal one gradient of the batch at twice the learning rate."""

    def update_of(strategy: str, lr: float) -> torch.Tensor:
        one_step = {"optimizer": {"name": "SGD", "lr": lr}, "lr_schedule": {}, "steps": 1}
        config = job(strategy, 2, global_batch_size=8, epochs=None, **one_step)
        return train(config, Mlp).ranks[0].prepared.flat.params - prepare(config, Mlp()).flat.params

    found, expected = update_of("ps-async", 1e-3), update_of("ps-sync", 2e-3)
    assert float((found - expected).norm()) < 0.01 * float(expected.norm())


@pytest.mark.parametrize(
    ("options", "message"),
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
def test_invalid_options_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        job({"name": "ps-async", **options}, 2)


def replay_of(run: LocalRun, config: Job, task: type[Classify]) -> torch.nn.Module:
    """Replay a run from its logs."""
    roles = make_strategy(config).roles(config)
    steps, world = run.ranks[0].prepared.total_steps, config.scaling.world
    plan = ShardPlan(config, "replay", 0, world, steps, roles.servers, roles.consistency)
    return replay(plan, logs_of(run), lambda: prepare(config, task()), 1)


@pytest.mark.sweep(3)
@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({}, {}),
        ({"num_servers": 3}, {"optimizer": {"name": "AdamW", "lr": 0.01}, "clip_norm": 0.3}),
        ({"staleness": 1, "num_servers": 2}, {"gradient_accumulation": 2}),
        ({"staleness_lr": True, "delay_compensation": 0.5, "num_servers": 2}, {}),
        ({"num_servers": 2}, {"precision": "fp16", "ema": {"decay": 0.9}}),
    ],
)
@pytest.mark.parametrize("workers", [1, 3])
def test_replay_is_bit_identical(
    workers: int, options: dict[str, Any], fields: dict[str, Any]
) -> None:
    config = job({"name": "ps-async", **options}, workers, **fields)
    run = train(config, Evaluated)
    model = replay_of(run, config, Evaluated)
    for name, value in model.state_dict().items():
        assert torch.equal(value, run.parameters()[name]), name


def test_replay_does_not_depend_on_thread_switches() -> None:
    config = job({"name": "ps-async", "num_servers": 2}, 3)
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(5):
            run = train(config, Mlp)
            model = replay_of(run, config, Mlp)
            for name, value in model.state_dict().items():
                assert torch.equal(value, run.parameters()[name]), name
    finally:
        sys.setswitchinterval(usual)


def test_replays_with_dropout_are_equal() -> None:
    """Ranks are threads with one generator, so only replays are compared; see tests/cluster."""
    config = job("ps-async", 2)
    run = train(config, Dropout)
    first, second = (replay_of(run, config, Dropout).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_replay_depends_on_the_order_of_the_log() -> None:
    config = job("ps-async", 2)
    run = train(config, Mlp)
    other = ApplyLog()
    for place, task in enumerate(t for step in range(STEPS) for t in (2 * step + 1, 2 * step)):
        other.add(Applied(task % 2, task, max(0, place - 1)))
    run.servers.logs = lambda: [other.numbers()]  # type: ignore[method-assign]
    found = replay_of(run, config, Mlp).state_dict()
    assert any(not torch.equal(found[name], value) for name, value in run.parameters().items())


def test_replay_rejects_contradictory_logs() -> None:
    """Each log is possible alone, but together they need a gradient of rank 0 too early."""
    config = job({"name": "ps-async", "num_servers": 2}, 2, steps=2, epochs=None)
    run = train(config, Mlp)
    first, second = ApplyLog(), ApplyLog()
    for row in [(0, 0, 0), (0, 2, 1), (1, 1, 2), (1, 3, 3)]:
        first.add(Applied(*row))
    for row in [(1, 1, 0), (1, 3, 1), (0, 0, 2), (0, 2, 3)]:
        second.add(Applied(*row))
    run.servers.logs = lambda: [first.numbers(), second.numbers()]  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="cannot be replayed"):
        replay_of(run, config, Mlp)


def test_replay_rejects_shards_with_other_tasks_of_a_rank() -> None:
    """The rank was lost between two shards, and another rank has done its task for the second."""
    config = job({"name": "ps-async", "num_servers": 2}, 2, steps=1, epochs=None)
    run = train(config, Mlp)
    first, second = ApplyLog(), ApplyLog()
    for log, ranks in ((first, (0, 1)), (second, (1, 1))):
        for task, rank in enumerate(ranks):
            log.add(Applied(rank, task, task))
    run.servers.logs = lambda: [first.numbers(), second.numbers()]  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="lost between two shards"):
        replay_of(run, config, Mlp)


@pytest.mark.timeout(60)
def test_replay_of_a_run_without_tasks_of_rank_0() -> None:
    """Rank 0 joined after all tasks were done; in the replay it waits for the other rank."""
    config = job({"name": "ps-async", "num_servers": 2}, 1, steps=3, epochs=None)
    run = train(config, Mlp)
    log = ApplyLog()
    for task in range(3):
        log.add(Applied(1, task, task))
    run.servers.logs = lambda: [log.numbers()] * 2  # type: ignore[method-assign]
    for name, value in replay_of(run, config, Mlp).state_dict().items():
        assert torch.equal(value, run.parameters()[name]), name


def test_error_of_the_task_ends_the_replay() -> None:
    config = job("ps-async", 2)
    run = train(config, Mlp)

    class Broken(Mlp):
        calls = 0

        def loss(self, outputs: Any, targets: Any) -> torch.Tensor:
            Broken.calls += 1
            if Broken.calls >= 9:
                raise KeyError("no such token: 17")
            return super().loss(outputs, targets)

    with pytest.raises(KeyError, match="17"):
        replay_of(run, config, Broken)


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
def test_replay_has_the_number_of_threads_of_the_run(tmp_path: Path) -> None:
    """Matrix products differ in their last bits with another number of threads."""
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


def test_run_stopped_by_max_time_is_replayed(tmp_path: Path) -> None:
    """The schedule is that of all steps of the job; with the steps done, the rate would decay."""
    (tmp_path / "cut_short.py").write_text(NOTES_THREADS)
    fields = fields_of("ps-async", 0, epochs=None, steps=10**5, global_batch_size=4)
    fields |= {"task": "cut_short:NotesThreads", "task_args": {"path": str(tmp_path / "notes")}}
    fields |= {"lr_schedule": {"name": "wsd", "decay_steps": 1}, "max_time_s": 1e-9}
    fields["storage_path"] = str(tmp_path / "runs")
    run = Trainer(fields, working_dir=tmp_path, progress=False).fit()
    assert run.stopped is not None
    replayed = replay_run(run.path, tmp_path)
    assert (replayed.updates, replayed.differing) == (run.totals.steps, None)
