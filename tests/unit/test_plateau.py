"""`ReduceLROnPlateau` has the learning rates of torch's scheduler, with failures and resumes."""

import math
from collections.abc import Iterator, Set
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from embedding_jobs import LocalWords, table
from embedding_jobs import job as table_job
from hybrid_workers import StopOnLostRank, same_tensors
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import job_of
from local_run import Attempt, LocalRun, evaluations, train
from resized_run import train_resized
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.lr_scheduler import ReduceLROnPlateau as TorchScheduler
from torch.utils.data import IterableDataset, TensorDataset
from words import Words

from distplat import Task
from distplat.actors.verifying import VerifyRequest, job_for, not_compared
from distplat.platform.errors import Abandoned, SpecError, StateLost
from distplat.platform.job_file import read_job, render_job
from distplat.platform.lr_schedules import ReduceLROnPlateau, Schedule
from distplat.platform.plateau import Plateau, PlateauState, after_evaluation, first_state
from distplat.platform.progress import StepReport, StepSummary
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.platform.stop_order import StopOrder
from distplat.strategies.verification.verdicts import NOT_COMPARED

SAMPLES, BATCH, STEPS, EVERY = 40, 12, 24, 2
LR, HEAD_LR = 0.5, 0.2
RULE: dict[str, Any] = {
    "name": "ReduceLROnPlateau",
    "factor": 0.3,
    "patience": 1,
    "threshold": 0.03,
    "cooldown": 1,
    "min_lr": 0.06,
}
ROWS = {"servers": 2, "optimizer": {"name": "SGD", "lr": 0.5}}
GRID = {"name": "hybrid", "pipeline": 2, "data": 2, "cut": "even", "micro_batches": 2}


class Plateauing(Task):
    """The loss stops improving in the second half."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(SAMPLES, 4, generator=generator)
        return TensorDataset(inputs, torch.randn(SAMPLES, 3, generator=generator))

    def eval_data(self) -> Any:
        return self.train_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"score": -(outputs - targets).abs().mean()}


def job(strategy: Any = "ring", world: int = 1, **overrides: Any) -> Job:
    fields: dict[str, Any] = {
        "optimizer": {"name": "SGD", "lr": LR, "groups": [{"match": "3.*", "lr": HEAD_LR}]},
        "lr_schedule": RULE,
        "global_batch_size": BATCH,
        "steps": STEPS,
        "evaluation": {"every_steps": EVERY},
        **overrides,
    }
    return job_of(strategy, world, **fields)


def plain_loop(
    rule: dict[str, Any], warmup_steps: int = 1
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """Train as torch documents it; return the parameters and each step's learning rates."""
    torch.manual_seed(0)
    model, task = Plateauing().model(), Plateauing()
    data, eval_data = task.train_data(), task.eval_data()
    head: Any = model.get_submodule("3")
    rest = [p for name, p in model.named_parameters() if not name.startswith("3.")]
    groups: Any = [{"params": rest}, {"params": [*head.parameters()], "lr": HEAD_LR}]
    optimizer = torch.optim.SGD(groups, lr=LR)
    arguments = {k: v for k, v in rule.items() if k not in ("name", "metric")}
    warmup = LambdaLR(optimizer, lambda step: min(step + 1, warmup_steps) / warmup_steps)
    scheduler, rates = TorchScheduler(optimizer, **arguments), []
    sampler = Sampler(SAMPLES, BATCH, 1, 0)
    for step in range(STEPS):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        ids = [int(i) for i in sampler.batch_ids(step)]
        optimizer.zero_grad()
        inputs, targets = (
            torch.stack(values) for values in zip(*(data[i] for i in ids), strict=True)
        )
        torch.autograd.backward(task.loss(model(inputs), targets))
        optimizer.step()
        if step + 1 <= warmup_steps:
            warmup.step()
        elif (step + 1) % EVERY == 0:
            with torch.no_grad():
                inputs, targets = eval_data.tensors
                outputs = model(inputs)
                metrics = {"loss": task.loss(outputs, targets), **task.metrics(outputs, targets)}
            scheduler.step(metrics[rule.get("metric", "loss")])
    return {name: value.detach() for name, value in model.state_dict().items()}, rates


def rates_by_step(run: LocalRun, rank: int = 0) -> dict[int, list[float]]:
    """Return the reported rates by step; a repeated report replaces the earlier one."""
    steps = {r.step: r.figures for r in run.reports[rank] if isinstance(r, StepReport)}
    return {step: [f["lr"], f["lr_group_0"]] for step, f in sorted(steps.items())}


def rates(run: LocalRun, rank: int = 0) -> list[list[float]]:
    return [*rates_by_step(run, rank).values()]


RUNS: list[tuple[Any, int]] = [
    ("ring", 1),
    ("ring", 3),
    ({"name": "ring", "shard_optimizer": True}, 2),
    ("ps-sync", 1),
    ({"name": "ps-sync", "num_servers": 2}, 3),
    ({"name": "ps-sync", "replication": 2}, 2),
    (GRID, 4),
    ({**GRID, "data_strategy": "ps-sync"}, 4),
]


@pytest.mark.sweep(2)
@pytest.mark.parametrize(("strategy", "world"), RUNS, ids=str)
def test_matches_plain_loop_with_torchs_scheduler(strategy: Any, world: int) -> None:
    expected, torch_rates = plain_loop(RULE)
    assert len({*map(tuple, torch_rates)}) > 2, "the rate changes at least twice"
    assert torch_rates[-1] == [0.06, 0.06]
    run = train(job(strategy, world), Plateauing)
    for rank in range(world):
        assert rates(run, rank) == torch_rates, "bit-identical"
    found = {name: value for part in run.trained for name, value in part.items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("warmup_steps", [7, 8])
@pytest.mark.parametrize(("strategy", "world"), [("ring", 2), ("ps-sync", 2)])
def test_scheduler_starts_after_the_warm_up(strategy: str, world: int, warmup_steps: int) -> None:
    """The evaluation after step 8 counts only if the warm-up has ended."""
    rule = {**RULE, "patience": 0, "threshold": 0.3}
    expected, torch_rates = plain_loop(rule, warmup_steps)
    assert [step_rates[0] for step_rates in torch_rates[:2]] == [
        LR * (1 / warmup_steps),
        LR * (2 / warmup_steps),
    ]
    assert torch_rates != plain_loop(rule, 15 - warmup_steps)[1] and torch_rates[-1] == [0.06, 0.06]
    run = train(
        job(strategy, world, lr_schedule={**rule, "warmup_steps": warmup_steps}), Plateauing
    )
    for rank in range(world):
        assert rates(run, rank) == torch_rates, "bit-identical"
    for name, value in expected.items():
        torch.testing.assert_close(run.trained[0][name], value, rtol=1e-4, atol=1e-5)


def test_metric_and_mode_are_options() -> None:
    rule = {**RULE, "metric": "score", "mode": "max", "threshold_mode": "abs", "min_lr": 0.0}
    _, torch_rates = plain_loop(rule)
    assert len({*map(tuple, torch_rates)}) > 2 and torch_rates != plain_loop(RULE)[1]
    assert rates(train(job("ps-sync", 2, lr_schedule=rule), Plateauing)) == torch_rates


class Disturbed(StopOnLostRank):
    """Ranks are lost before a step; the other ranks stop when they wait for them."""

    def __init__(self, run: LocalRun, step: int, ranks: Set[int], **overrides: Any) -> None:
        super().__init__(run, **overrides)
        self.step, self.lost = step, ranks

    def before(self, rank: int, step: int) -> StopOrder:
        if step == self.step and rank in self.lost:
            raise Abandoned("lost")
        return StopOrder.NONE


@pytest.mark.sweep(4)
@pytest.mark.parametrize("step", [11, 12])
@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [("ring", {0}), ("ring", {1, 2}), ("ps-sync", {0}), ("ps-sync", {0, 1, 2})],
    ids=str,
)
def test_recovery_from_lost_workers_is_bit_identical(
    strategy: Any, ranks: Set[int], step: int
) -> None:
    """An evaluation follows step 12; survivors repeat it although they have counted it."""
    run, expected = LocalRun(job(strategy, 3), Plateauing), dict(enumerate(plain_loop(RULE)[1]))
    assert not Disturbed(run, step, ranks).make()
    for rank in ranks:
        run.renew(rank)
    recovered = StopOnLostRank(run)
    assert recovered.make()
    assert {*recovered.starts} == {step}
    run.close()
    for rank in range(3):
        found = rates_by_step(run, rank)  # a lost rank may not have reported its last step
        assert found == {s: step_rates for s, step_rates in expected.items() if s in found}
        assert {*range(step, STEPS)} <= found.keys()
    unfailed = train(job(strategy, 3), Plateauing)
    assert same_tensors(run.parameters(), unfailed.parameters())


@pytest.mark.parametrize("step", [8, 9])
def test_resized_run_keeps_the_rates(step: int) -> None:
    run = train_resized(job("ps-sync"), Plateauing, [(2, step), (4, 15), (1, 0)], lambda inputs: [])
    steps = {s.step: s.figures for s in run.summaries if isinstance(s, StepSummary)}
    found = [[figures["lr"], figures["lr_group_0"]] for _, figures in sorted(steps.items())]
    assert found == plain_loop(RULE)[1]


class LosesAServer(Attempt):
    """A shard's primary dies; its backup has the state of the scheduler."""

    def before(self, rank: int, step: int) -> StopOrder:
        if (rank, step) == (0, 13):
            self.run.servers.nodes["server-0"].die("lost")
        return StopOrder.NONE


def test_recovery_from_a_lost_server_with_a_backup() -> None:
    run = LocalRun(job({"name": "ps-sync", "replication": 2}, 2), Plateauing)
    assert LosesAServer(run).make()
    run.close()
    assert rates(run) == plain_loop(RULE)[1]
    unfailed = train(job("ps-sync", 2), Plateauing)
    assert same_tensors(run.parameters(), unfailed.parameters())


def test_recovery_of_a_grid_with_servers() -> None:
    run = LocalRun(job({**GRID, "data_strategy": "ps-sync"}, 4), Plateauing)
    assert not Disturbed(run, 12, {0, 1, 2, 3}).make()
    for rank in range(4):
        run.renew(rank)
    assert StopOnLostRank(run).make()
    run.close()
    found = rates_by_step(run)
    assert found == {step: plain_loop(RULE)[1][step] for step in found} and STEPS - 1 in found


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_resume_keeps_the_rates(strategy: Any) -> None:
    config = job(strategy, 2, checkpoint={"every_steps": 3})
    unfailed, (_, torch_rates) = train(config, Plateauing), plain_loop(RULE)
    assert rates(unfailed) == torch_rates
    for version, saved in unfailed.checkpoints.items():  # some versions have an evaluation
        resumed = train(config, Plateauing, saved=saved)
        assert rates(resumed) == torch_rates[version:]
        assert same_tensors(resumed.parameters(), unfailed.parameters())


def test_resume_of_a_finished_run_with_more_steps() -> None:
    """The final evaluation of the first run is one of the schedule, or an extra one."""
    for steps in (9, 10):
        first = train(job(steps=steps, checkpoint={"every_steps": 5}), Plateauing)
        assert [evaluation.step for evaluation in evaluations(first)][-1] == steps
        assert (
            rates(train(job(), Plateauing, saved=first.checkpoints[steps]))
            == plain_loop(RULE)[1][steps:]
        )


def test_rollback_counts_each_evaluation_once() -> None:
    """All ranks load the checkpoint in processes that have counted later evaluations."""
    run = LocalRun(job("ring", 2, checkpoint={"every_steps": 5}), Plateauing)
    assert not Disturbed(run, 13, {0, 1}).make()
    assert StopOnLostRank(run, saved=run.checkpoints[5], base=5).make()
    run.close()
    found = rates_by_step(run)
    assert found == {step: plain_loop(RULE)[1][step] for step in found} and STEPS - 1 in found


def test_resume_from_a_checkpoint_of_another_schedule() -> None:
    constant = train(job(lr_schedule={}, checkpoint={"every_steps": 6}), Plateauing)
    started = train(job(), Plateauing, saved=constant.checkpoints[6])
    assert rates(started)[0] == [LR, HEAD_LR]
    reduced = train(job(checkpoint={"every_steps": 20}), Plateauing).checkpoints[20]
    other = {**RULE, "metric": "score", "mode": "max", "min_lr": 0.0}
    assert rates(train(job(lr_schedule=other), Plateauing, saved=reduced))[0][0] < LR / 10


def test_state_lost_if_no_process_has_the_rates() -> None:
    run = LocalRun(job("ps-sync", 2), Plateauing)
    assert not Disturbed(run, 8, {0, 1}).make()
    for rank in (0, 1):
        run.renew(rank)

    class Silent(StopOnLostRank):
        def shards(self, rank: int) -> Any:
            shards: Any = super().shards(rank)
            shards.settings = lambda: ()
            return shards

    with pytest.raises(StateLost, match="what evaluations made of the learning rate"):
        Silent(run).make()


def test_unknown_metric_is_rejected() -> None:
    rule = {**RULE, "metric": "scor"}
    with pytest.raises(
        SpecError, match=r"lr_schedule.metric: the evaluation gives no 'scor'\n .*'score'"
    ):
        train(job("ps-sync", 2, lr_schedule=rule), Plateauing)


def test_task_without_evaluation_data_is_rejected() -> None:
    class WithoutEvalData(Plateauing):
        def eval_data(self) -> Any:
            return None

    with pytest.raises(
        SpecError, match=r"lr_schedule: needs evaluations, and the task's eval_data"
    ):
        train(job(), WithoutEvalData)


@pytest.mark.parametrize(
    ("strategy", "overrides", "message"),
    [
        ("ps-async", {}, "ReduceLROnPlateau is not supported by 'ps-async'.*\n.*: ps-sync`"),
        ({"name": "ps-sync", "backup_workers": 1}, {}, ".* be combined with `backup_workers`"),
        ("ring", {"evaluation": {"every_epochs": 0}}, "needs evaluations .*\n.*every_epochs`"),
        ("ring", {"lr_schedule": {**RULE, "factor": 1}}, "must be"),
        ("ring", {"lr_schedule": {**RULE, "mode": "mean"}}, "must be"),
        ("ring", {"lr_schedule": {**RULE, "verbose": True}}, "unknown field"),
    ],
)  # fmt: skip
def test_incompatible_options_are_rejected(
    strategy: Any, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=r"^lr_schedule(\.\w+)?: " + message):
        job(strategy, 2, **overrides)


def test_stream_without_a_length_requires_every_steps() -> None:
    class Endless(Plateauing):
        def train_data(self) -> Any:
            return Stream()

        def eval_data(self) -> Any:
            return Plateauing.train_data(self)

    message = r"lr_schedule: needs evaluations during .*\n.*`evaluation.every_steps`"
    with pytest.raises(SpecError, match=message):
        train(job(evaluation={}), Endless)
    assert len(rates(train(job(steps=4), Endless))) == 4


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.ones(4), torch.ones(3)


def test_verify_runs_without_evaluations_keep_the_rate() -> None:
    rule = {**RULE, "warmup_steps": 3}
    original = job(lr_schedule=rule, early_stop={"metric": "loss", "mode": "min"})
    for name in ("ring", "ps-sync"):
        short = job_for(VerifyRequest(original, Path()), name)
        assert isinstance(short, Job), "no SpecError"
        assert short.lr_schedule == Schedule(warmup_steps=3)
        [row] = not_compared(name, original)
        assert (row.check, row.verdict) == ("lr_schedule", NOT_COMPARED)
        assert not_compared(name, short) == []


def test_job_file_round_trip(tmp_path: Any) -> None:
    (tmp_path / "job.yaml").write_text(render_job(job()))
    assert read_job(tmp_path / "job.yaml") == job()


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=True))
def test_state_and_rates_match_torch(random: Random) -> None:
    arguments: dict[str, Any] = {
        "mode": random.choice(["min", "max"]),
        "factor": random.choice([0.0, 0.1, 0.5, 0.97]),
        "patience": random.choice([0, 1, 3]),
        "threshold": random.choice([0.0, 1e-4, 0.2, 1.0]),
        "threshold_mode": random.choice(["rel", "abs"]),
        "cooldown": random.choice([0, 1, 4]),
        "min_lr": random.choice([0.0, 0.01, 5.0]),
        "eps": random.choice([0.0, 1e-8, 0.05]),
    }
    rule = ReduceLROnPlateau.model_validate({"name": "ReduceLROnPlateau", **arguments})
    bases = [0.8, 3e-4]
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": base} for base in bases]
    scheduler = TorchScheduler(torch.optim.SGD(groups), **arguments)
    ours = Plateau(rule)
    assert ours.sync(0, [])
    for step in range(1, random.randint(2, 60)):
        figure = random.choice([random.gauss(0, 1), 1.0, -0.5, 0.0, math.nan, math.inf, -math.inf])
        ours.evaluated(step, {"loss": figure})
        ours.evaluated(step, {"loss": -figure})  # a repeated evaluation counts once
        scheduler.step(figure)
        theirs = [group["lr"] for group in scheduler.optimizer.param_groups]
        assert [ours.rate(base, step, 99) for base in bases] == theirs
        counts = scheduler.best, scheduler.num_bad_epochs, scheduler.cooldown_counter
        assert ours.state[2:] == counts
        loaded = Plateau(rule)
        loaded.load_state_dict(ours.state_dict())
        assert loaded.state == ours.state == PlateauState.of(map(float, ours.state))


def test_sync_selects_the_state_of_a_version() -> None:
    rule = ReduceLROnPlateau.model_validate(RULE)
    first, plateau = first_state(rule), Plateau(rule)
    states = [first]
    for step in (2, 4, 6):
        states.append(after_evaluation(rule, states[-1], step, 1.0))
    assert plateau.sync(5, reversed(states)) and plateau.state.at == 4
    assert plateau.sync(6, states) and plateau.state.at == 6
    assert plateau.sync(0, states) and plateau.state == first, (
        "all ranks start from the first state"
    )
    assert not plateau.sync(3, states[2:]), "all states are newer than the version"


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (2, {}),
        (2, {"strategy": "ps-sync"}),
        (1, {"embeddings": {**ROWS, "asynchronous": True}}),
        (2, {"embeddings": {**ROWS, "replication": 2}}),
    ],
    ids=str,
)  # fmt: skip
def test_embedding_tables_use_the_rates(world: int, overrides: dict[str, Any]) -> None:
    rule = {**RULE, "patience": 0, "threshold": 0.3, "cooldown": 0, "min_lr": 0.0}
    fields: dict[str, Any] = {"lr_schedule": rule, "evaluation": {"every_steps": 2}}
    local = train(table_job(LocalWords, 1, **fields), LocalWords)
    assert [r.figures["lr"] for r in local.reports[0] if isinstance(r, StepReport)][-1] < 0.1
    run = train(table_job(Words, world, **{**fields, **overrides}), Words)
    found, expected = torch.from_numpy(table(run, 0)), local.parameters()["words.weight"]
    present = ~found[:, 0].isnan()
    torch.testing.assert_close(found[present], expected[present], rtol=1e-5, atol=1e-6)
