"""`ReduceLROnPlateau`: the rates of a plain loop with torch's own, through failures and resumes."""

import math
from collections.abc import Iterator, Set
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from embedding_jobs import Local, table
from embedding_jobs import job as table_job
from hybrid_workers import UntilOneIsLost, same
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import job_of
from local_run import Attempt, LocalRun, evaluations, train
from resized_run import train_resized
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.lr_scheduler import ReduceLROnPlateau as OfTorch
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


class Steep(Task):
    """Its loss gets no better in the second half."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3))

    def train_data(self) -> TensorDataset:
        made = torch.Generator().manual_seed(1)
        inputs = torch.randn(SAMPLES, 4, generator=made)
        return TensorDataset(inputs, torch.randn(SAMPLES, 3, generator=made))

    def eval_data(self) -> Any:
        return self.train_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"score": -(outputs - targets).abs().mean()}


def job(strategy: Any = "ring", world: int = 1, **more: Any) -> Job:
    fields: dict[str, Any] = {
        "optimizer": {"name": "SGD", "lr": LR, "groups": [{"match": "3.*", "lr": HEAD_LR}]},
        "lr_schedule": RULE,
        "global_batch_size": BATCH,
        "steps": STEPS,
        "evaluation": {"every_steps": EVERY},
        **more,
    }
    return job_of(strategy, world, **fields)


def plain(
    rule: dict[str, Any], warmup_steps: int = 1
) -> tuple[dict[str, Tensor], list[list[float]]]:
    """A loop by torch's documents; gives the rates of each step, too."""
    torch.manual_seed(0)
    model, task = Steep().model(), Steep()
    data, evaluated = task.train_data(), task.eval_data()
    head: Any = model.get_submodule("3")
    rest = [p for name, p in model.named_parameters() if not name.startswith("3.")]
    groups: Any = [{"params": rest}, {"params": [*head.parameters()], "lr": HEAD_LR}]
    optimizer = torch.optim.SGD(groups, lr=LR)
    arguments = {k: v for k, v in rule.items() if k not in ("name", "metric")}
    grows = LambdaLR(optimizer, lambda step: min(step + 1, warmup_steps) / warmup_steps)
    scheduler, rates = OfTorch(optimizer, **arguments), []
    sampler = Sampler(SAMPLES, BATCH, 1, 0)
    for step in range(STEPS):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        ids = [int(i) for i in sampler.batch_ids(step)]
        optimizer.zero_grad()
        inputs, targets = (torch.stack(one) for one in zip(*(data[i] for i in ids), strict=True))
        torch.autograd.backward(task.loss(model(inputs), targets))
        optimizer.step()
        if step + 1 <= warmup_steps:
            grows.step()
        elif (step + 1) % EVERY == 0:
            with torch.no_grad():
                inputs, targets = evaluated.tensors
                outputs = model(inputs)
                found = {"loss": task.loss(outputs, targets), **task.metrics(outputs, targets)}
            scheduler.step(found[rule.get("metric", "loss")])
    return {name: one.detach() for name, one in model.state_dict().items()}, rates


def told(run: LocalRun, rank: int = 0) -> dict[int, list[float]]:
    """Give the rates that were shown, by step; what was told again replaces what was told."""
    steps = {one.step: one.figures for one in run.reports[rank] if isinstance(one, StepReport)}
    return {step: [one["lr"], one["lr_group_0"]] for step, one in sorted(steps.items())}


def rates(run: LocalRun, rank: int = 0) -> list[list[float]]:
    return [*told(run, rank).values()]


WAYS: list[tuple[Any, int]] = [
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
@pytest.mark.parametrize(("strategy", "world"), WAYS, ids=str)
def test_a_run_is_a_loop_with_torchs_scheduler(strategy: Any, world: int) -> None:
    expected, of_torch = plain(RULE)
    assert len({*map(tuple, of_torch)}) > 2, "or there is nothing to see"
    assert of_torch[-1] == [0.06, 0.06]
    run = train(job(strategy, world), Steep)
    for rank in range(world):
        assert rates(run, rank) == of_torch, "bit by bit"
    found = {name: one for part in run.trained for name, one in part.items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("warmup_steps", [7, 8])
@pytest.mark.parametrize(("strategy", "world"), [("ring", 2), ("ps-sync", 2)])
def test_it_begins_when_a_warm_up_is_over(strategy: str, world: int, warmup_steps: int) -> None:
    """Of evaluations after steps 8 and 10, the first counts if the warm-up is over by then."""
    rule = {**RULE, "patience": 0, "threshold": 0.3}
    expected, of_torch = plain(rule, warmup_steps)
    assert [one[0] for one in of_torch[:2]] == [LR * (1 / warmup_steps), LR * (2 / warmup_steps)]
    assert of_torch != plain(rule, 15 - warmup_steps)[1] and of_torch[-1] == [0.06, 0.06]
    run = train(job(strategy, world, lr_schedule={**rule, "warmup_steps": warmup_steps}), Steep)
    for rank in range(world):
        assert rates(run, rank) == of_torch, "bit by bit"
    for name, value in expected.items():
        torch.testing.assert_close(run.trained[0][name], value, rtol=1e-4, atol=1e-5)


def test_the_figure_and_which_way_it_gets_better_are_chosen() -> None:
    rule = {**RULE, "metric": "score", "mode": "max", "threshold_mode": "abs", "min_lr": 0.0}
    _, of_torch = plain(rule)
    assert len({*map(tuple, of_torch)}) > 2 and of_torch != plain(RULE)[1]
    assert rates(train(job("ps-sync", 2, lr_schedule=rule), Steep)) == of_torch


class Disturbed(UntilOneIsLost):
    """Ranks are lost before a step; the others come out when they wait for them."""

    def __init__(self, run: LocalRun, step: int, ranks: Set[int], **more: Any) -> None:
        super().__init__(run, **more)
        self.step, self.lost = step, ranks

    def before(self, rank: int, step: int) -> StopOrder:
        if step == self.step and rank in self.lost:
            raise Abandoned("lost")
        return StopOrder.NONE


@pytest.mark.sweep(2)
@pytest.mark.parametrize("step", [11, 12])
@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [("ring", {0}), ("ring", {1, 2}), ("ps-sync", {0}), ("ps-sync", {0, 1, 2})],
    ids=str,
)
def test_lost_workers_change_nothing(strategy: Any, ranks: Set[int], step: int) -> None:
    """After step 12 there is an evaluation: survivors have counted it, and make it once more."""
    run, expected = LocalRun(job(strategy, 3), Steep), dict(enumerate(plain(RULE)[1]))
    assert not Disturbed(run, step, ranks).make()
    for rank in ranks:
        run.renew(rank)
    again = UntilOneIsLost(run)
    assert again.make()
    assert {*again.starts} == {step}
    run.close()
    for rank in range(3):
        found = told(run, rank)  # who is lost may not have told of its last step
        assert found == {step: one for step, one in expected.items() if step in found}
        assert {*range(step, STEPS)} <= found.keys()
    whole = train(job(strategy, 3), Steep)
    assert same(run.parameters(), whole.parameters())


@pytest.mark.parametrize("step", [8, 9])
def test_another_number_of_workers(step: int) -> None:
    run = train_resized(job("ps-sync"), Steep, [(2, step), (4, 15), (1, 0)], lambda inputs: [])
    steps = {one.step: one.figures for one in run.summaries if isinstance(one, StepSummary)}
    found = [[one["lr"], one["lr_group_0"]] for _, one in sorted(steps.items())]
    assert found == plain(RULE)[1]


class LosesAServer(Attempt):
    """A shard's primary dies, and its backup has what evaluations came to."""

    def before(self, rank: int, step: int) -> StopOrder:
        if (rank, step) == (0, 13):
            self.run.servers.nodes["server-0"].die("lost")
        return StopOrder.NONE


def test_a_lost_server_that_was_kept_twice() -> None:
    run = LocalRun(job({"name": "ps-sync", "replication": 2}, 2), Steep)
    assert LosesAServer(run).make()
    run.close()
    assert rates(run) == plain(RULE)[1]
    whole = train(job("ps-sync", 2), Steep)
    assert same(run.parameters(), whole.parameters())


def test_lost_workers_of_a_grid_with_servers() -> None:
    of = job({**GRID, "data_strategy": "ps-sync"}, 4)
    run = LocalRun(of, Steep)
    assert not Disturbed(run, 12, {0, 1, 2, 3}).make()
    for rank in range(4):
        run.renew(rank)
    assert UntilOneIsLost(run).make()
    run.close()
    found = told(run)
    assert found == {step: plain(RULE)[1][step] for step in found} and STEPS - 1 in found


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_run_that_goes_on_from_a_checkpoint(strategy: Any) -> None:
    of = job(strategy, 2, checkpoint={"every_steps": 3})
    whole, (_, of_torch) = train(of, Steep), plain(RULE)
    assert rates(whole) == of_torch
    for version, saved in whole.checkpoints.items():  # some fall on an evaluation
        again = train(of, Steep, saved=saved)
        assert rates(again) == of_torch[version:]
        assert same(again.parameters(), whole.parameters())


def test_a_longer_run_from_the_last_checkpoint_of_a_shorter_one() -> None:
    """The shorter one was evaluated at its end, too: once on the way, once beside it."""
    for steps in (9, 10):
        first = train(job(steps=steps, checkpoint={"every_steps": 5}), Steep)
        assert [one.step for one in evaluations(first)][-1] == steps
        assert rates(train(job(), Steep, saved=first.checkpoints[steps])) == plain(RULE)[1][steps:]


def test_a_rollback_counts_no_evaluation_twice() -> None:
    """All go back to the checkpoint with the processes that have seen later evaluations."""
    of = job("ring", 2, checkpoint={"every_steps": 5})
    run = LocalRun(of, Steep)
    assert not Disturbed(run, 13, {0, 1}).make()
    assert UntilOneIsLost(run, saved=run.checkpoints[5], base=5).make()
    run.close()
    found = told(run)
    assert found == {step: plain(RULE)[1][step] for step in found} and STEPS - 1 in found


def test_what_a_checkpoint_has_of_another_schedule() -> None:
    constant = train(job(lr_schedule={}, checkpoint={"every_steps": 6}), Steep)
    begun = train(job(), Steep, saved=constant.checkpoints[6])
    assert rates(begun)[0] == [LR, HEAD_LR]
    reduced = train(job(checkpoint={"every_steps": 20}), Steep).checkpoints[20]
    other = {**RULE, "metric": "score", "mode": "max", "min_lr": 0.0}
    assert rates(train(job(lr_schedule=other), Steep, saved=reduced))[0][0] < LR / 10


def test_nobody_knows_the_rates() -> None:
    run = LocalRun(job("ps-sync", 2), Steep)
    assert not Disturbed(run, 8, {0, 1}).make()
    for rank in (0, 1):
        run.renew(rank)

    class Silent(UntilOneIsLost):
        def shards(self, rank: int) -> Any:
            way: Any = super().shards(rank)
            way.settings = lambda: ()
            return way

    with pytest.raises(StateLost, match="what evaluations made of the learning rate"):
        Silent(run).make()


def test_a_figure_that_is_not_there() -> None:
    rule = {**RULE, "metric": "scor"}
    with pytest.raises(
        SpecError, match=r"lr_schedule.metric: the evaluation gives no 'scor'\n .*'score'"
    ):
        train(job("ps-sync", 2, lr_schedule=rule), Steep)


def test_a_task_without_evaluation_data() -> None:
    class Blind(Steep):
        def eval_data(self) -> Any:
            return None

    with pytest.raises(
        SpecError, match=r"lr_schedule: needs evaluations, and the task's eval_data"
    ):
        train(job(), Blind)


@pytest.mark.parametrize(
    ("strategy", "more", "message"),
    [
        ("ps-async", {}, "ReduceLROnPlateau is not supported by 'ps-async'.*\n.*: ps-sync`"),
        ({"name": "ps-sync", "backup_workers": 1}, {}, ".* be combined with `backup_workers`"),
        ("ring", {"evaluation": {"every_epochs": 0}}, "needs evaluations .*\n.*every_epochs`"),
        ("ring", {"lr_schedule": {**RULE, "factor": 1}}, "must be"),
        ("ring", {"lr_schedule": {**RULE, "mode": "mean"}}, "must be"),
        ("ring", {"lr_schedule": {**RULE, "verbose": True}}, "unknown field"),
    ],
)  # fmt: skip
def test_what_is_refused(strategy: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=r"^lr_schedule(\.\w+)?: " + message):
        job(strategy, 2, **more)


def test_a_stream_without_a_length_is_not_evaluated_by_epochs() -> None:
    class Endless(Steep):
        def train_data(self) -> Any:
            return Stream()

        def eval_data(self) -> Any:
            return Steep.train_data(self)

    message = r"lr_schedule: needs evaluations during .*\n.*`evaluation.every_steps`"
    with pytest.raises(SpecError, match=message):
        train(job(evaluation={}), Endless)
    assert len(rates(train(job(steps=4), Endless))) == 4


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.ones(4), torch.ones(3)


def test_verify_reduces_no_rate_in_its_runs_without_evaluations() -> None:
    rule = {**RULE, "warmup_steps": 3}
    given = job(lr_schedule=rule, early_stop={"metric": "loss", "mode": "min"})
    for name in ("ring", "ps-sync"):
        short = job_for(VerifyRequest(given, Path()), name)
        assert isinstance(short, Job), "no SpecError"
        assert short.lr_schedule == Schedule(warmup_steps=3)
        [row] = not_compared(name, given)
        assert (row.check, row.verdict) == ("lr_schedule", NOT_COMPARED), "it says so"
        assert not_compared(name, short) == []


def test_a_job_with_it_reads_back(tmp_path: Any) -> None:
    (tmp_path / "job.yaml").write_text(render_job(job()))
    assert read_job(tmp_path / "job.yaml") == job()


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=True))
def test_the_same_state_and_rates_as_torchs(random: Random) -> None:
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
    scheduler = OfTorch(torch.optim.SGD(groups), **arguments)
    ours = Plateau(rule)
    assert ours.sync(0, [])
    for step in range(1, random.randint(2, 60)):
        figure = random.choice([random.gauss(0, 1), 1.0, -0.5, 0.0, math.nan, math.inf, -math.inf])
        ours.evaluated(step, {"loss": figure})
        ours.evaluated(step, {"loss": -figure})  # made again: it counts once
        scheduler.step(figure)
        theirs = [group["lr"] for group in scheduler.optimizer.param_groups]
        assert [ours.rate(base, step, 99) for base in bases] == theirs
        counts = scheduler.best, scheduler.num_bad_epochs, scheduler.cooldown_counter
        assert ours.state[2:] == counts
        again = Plateau(rule)
        again.load_state_dict(ours.state_dict())
        assert again.state == ours.state == PlateauState.of(map(float, ours.state))


def test_who_knows_a_version() -> None:
    rule = ReduceLROnPlateau.model_validate(RULE)
    first, plateau = first_state(rule), Plateau(rule)
    states = [first]
    for step in (2, 4, 6):
        states.append(after_evaluation(rule, states[-1], step, 1.0))
    assert plateau.sync(5, reversed(states)) and plateau.state.at == 4
    assert plateau.sync(6, states) and plateau.state.at == 6
    assert plateau.sync(0, states) and plateau.state == first, "all begin anew"
    assert not plateau.sync(3, states[2:]), "of a run that was taken back"


@pytest.mark.parametrize(
    ("world", "more"),
    [
        (2, {}),
        (2, {"strategy": "ps-sync"}),
        (1, {"embeddings": {**ROWS, "asynchronous": True}}),
        (2, {"embeddings": {**ROWS, "replication": 2}}),
    ],
    ids=str,
)  # fmt: skip
def test_tables_have_the_rates_too(world: int, more: dict[str, Any]) -> None:
    rule = {**RULE, "patience": 0, "threshold": 0.3, "cooldown": 0, "min_lr": 0.0}
    both: dict[str, Any] = {"lr_schedule": rule, "evaluation": {"every_steps": 2}}
    alone = train(table_job(Local, 1, **both), Local)
    assert [one.figures["lr"] for one in alone.reports[0] if isinstance(one, StepReport)][-1] < 0.1
    run = train(table_job(Words, world, **{**both, **more}), Words)
    mine, theirs = torch.from_numpy(table(run, 0)), alone.parameters()["words.weight"]
    there = ~mine[:, 0].isnan()
    torch.testing.assert_close(mine[there], theirs[there], rtol=1e-5, atol=1e-6)
