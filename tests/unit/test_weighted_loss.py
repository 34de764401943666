"""
A loss as (sum, weight): every strategy matches one process on the whole batch.

Sequences have different lengths, so the mean over tokens is no mean over samples, and a division
of each micro-batch by its own tokens gives another model (see the test of `OwnMean`).
"""

import math
from functools import cache
from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import LocalRun, evaluations, train
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from distplat.platform.progress import EvalReport, StepReport
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.task import Task

SAMPLES, BATCH, STEPS, WORDS, LONGEST = 23, 7, 9, 11, 6


class Tokens(Task):
    """The loss is the sum over tokens that are no padding."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(WORDS, 5), nn.Tanh(), nn.Linear(5, WORDS)).double()

    def train_data(self) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(1, WORDS, (SAMPLES, LONGEST), generator=generator)
        lengths = torch.randint(1, LONGEST + 1, (SAMPLES, 1), generator=generator)
        targets = ids.roll(-1, 1).masked_fill(torch.arange(LONGEST) >= lengths, 0)
        return TensorDataset(ids, targets)

    def eval_data(self) -> Dataset[Any]:
        return self.train_data()

    def loss(self, outputs: Any, targets: Any) -> Any:
        flat = outputs.transpose(1, 2)
        summed = nn.functional.cross_entropy(flat, targets, ignore_index=0, reduction="sum")
        return summed, (targets > 0).sum()


class OwnMean(Tokens):
    """The loss is the mean over the micro-batch's tokens, as in many scripts."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        summed, weight = super().loss(outputs, targets)
        mean: Tensor = summed / weight
        return mean


def make_job(strategy: dict[str, Any], workers: int, parts: int, clip: float | None = None) -> Job:
    return job_of(
        strategy,
        workers,
        optimizer={"name": "Adam", "lr": 0.05},
        steps=STEPS,
        global_batch_size=BATCH,
        gradient_accumulation=parts,
        clip_norm=clip,
        evaluation={"every_epochs": 0},
    )


@cache
def train_plain(clip: float | None) -> tuple[dict[str, Tensor], list[float], float]:
    """Train in a plain loop; return the model, the losses and the last evaluation loss."""
    task = Tokens()
    torch.manual_seed(0)
    model, data = task.model(), task.train_data()
    sampler = Sampler(SAMPLES, BATCH, 1, 0, True, False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for step in range(STEPS):
        ids, targets = default_collate([data[int(i)] for i in sampler.batch_ids(step)])
        optimizer.zero_grad()
        summed, weight = task.loss(model(ids), targets)
        loss = summed / weight
        torch.autograd.backward(loss)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        summed, weight = task.loss(*predict_all(model, data))
    state = {name: value.detach() for name, value in model.state_dict().items()}
    return state, losses, float(summed / weight)


def predict_all(model: nn.Module, data: Dataset[Any]) -> tuple[Tensor, Tensor]:
    ids, targets = default_collate([data[i] for i in range(SAMPLES)])
    return model(ids), targets


WORLDS: list[tuple[dict[str, Any], int, int]] = [
    ({"name": "ring"}, 1, 1),
    ({"name": "ring"}, 2, 1),
    ({"name": "ring"}, 1, 4),
    ({"name": "ring"}, 3, 2),
    ({"name": "ring", "shard_optimizer": True}, 2, 1),
    ({"name": "ps-sync"}, 1, 4),
    ({"name": "ps-sync"}, 3, 1),
    ({"name": "ps-sync", "num_servers": 2}, 2, 2),
    ({"name": "hybrid", "pipeline": 2, "micro_batches": 3, "cut": "even"}, 2, 1),
    ({"name": "hybrid", "pipeline": 2, "data": 2, "micro_batches": 2, "cut": "even"}, 4, 1),
    (
        {
            "name": "hybrid",
            "pipeline": 2,
            "data": 2,
            "micro_batches": 2,
            "cut": "even",
            "data_strategy": "ps-sync",
        },
        4,
        1,
    ),
]


def name_of(world: Any) -> str:
    if isinstance(world, dict):
        return "-".join(str(value) for value in world.values())
    return str(world)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize(("strategy", "workers", "parts"), WORLDS, ids=name_of)
def test_every_world_matches_plain_loop(
    strategy: dict[str, Any], workers: int, parts: int, clip: float | None
) -> None:
    run = train(make_job(strategy, workers, parts, clip), Tokens)
    state, losses, _ = train_plain(clip)
    actual = {name: value for part in run.trained for name, value in part.items()}
    assert actual.keys() == state.keys()
    for name, value in state.items():
        assert torch.allclose(actual[name], value, rtol=0, atol=1e-10), name
    assert losses_of(run) == pytest.approx(losses, abs=1e-10)


def losses_of(run: LocalRun) -> list[float]:
    """Return each step's loss, the weighted mean of the ranks' reports."""
    losses = []
    for step in range(STEPS):
        parts = [
            report
            for reports in run.reports
            for report in reports
            if isinstance(report, StepReport) and report.step == step
        ]
        weights = [part.weight or 0.0 for part in parts]
        means = zip(parts, weights, strict=True)
        losses.append(sum(part.loss * weight for part, weight in means) / sum(weights))
    return losses


@pytest.mark.parametrize("task", [OwnMean, Tokens])
@pytest.mark.parametrize(
    "strategy",
    [{"name": "ring"}, {"name": "hybrid", "pipeline": 2, "micro_batches": 2, "cut": "even"}],
    ids=name_of,
)
def test_mean_over_tokens_has_a_warning(
    strategy: dict[str, Any], task: type[Tokens], caplog: pytest.LogCaptureFixture
) -> None:
    train(make_job(strategy, 2, 1), task)
    has_warning = "(sum, weight)" in caplog.text
    assert has_warning == (task is OwnMean), caplog.text


@pytest.mark.parametrize("name", ["ring", "ps-sync"])
def test_evaluation_is_the_weighted_mean(name: str) -> None:
    run = train(make_job({"name": name}, 2, 1), Tokens)
    by_rank = {r.rank: r for reports in run.reports for r in reports if isinstance(r, EvalReport)}
    loss_sum = sum(r.sums["loss"] for r in by_rank.values())
    assert loss_sum / sum(r.counts["loss"] for r in by_rank.values()) == pytest.approx(
        train_plain(None)[2], abs=1e-10
    )


class NothingToEvaluate(Tokens):
    """Evaluation data of padding only."""

    def eval_data(self) -> Dataset[Any]:
        return TensorDataset(*(torch.zeros(5, LONGEST).long() for _ in range(2)))


@pytest.mark.parametrize("strategy", ["ring", "ps-async"])
def test_evaluation_without_weight_is_nan(strategy: str) -> None:
    """It is not 0, which would be the best loss."""
    run = train(make_job({"name": strategy}, 2, 1), NothingToEvaluate)
    (last,) = evaluations(run)
    assert math.isnan(last.metrics["loss"])


def test_mean_of_means_trains_another_model() -> None:
    """The other tests can fail: division by a micro-batch's own tokens gives another model."""
    run = train(make_job({"name": "ring"}, 2, 1), OwnMean)
    state, _, _ = train_plain(None)
    assert any((run.trained[0][name] - value).abs().max() > 1e-4 for name, value in state.items())


def test_asynchronous_push_is_divided_by_its_own_weight() -> None:
    """With one worker each push is a step, so the run matches the plain loop."""
    run = train(make_job({"name": "ps-async"}, 1, 2), Tokens)
    state, _, _ = train_plain(None)
    for name, value in state.items():
        assert torch.allclose(run.trained[0][name], value, rtol=0, atol=1e-10), name
