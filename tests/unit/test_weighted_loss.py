"""
A loss that is a sum with a weight: one process on the whole batch is what every strategy gives.

Sequences are of uneven lengths, so the mean over tokens is no mean over samples: dividing each
micro-batch by its own tokens gives something else, and a test below sees that it would.
"""

from functools import cache
from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import LocalRun, train
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from distplat.platform.progress import EvalReport, StepReport
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.task import Task

SAMPLES, BATCH, STEPS, WORDS, LONGEST = 23, 7, 9, 11, 6


class Tokens(Task):
    """Next-token loss over what is not padding, summed."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(WORDS, 5), nn.Tanh(), nn.Linear(5, WORDS)).double()

    def train_data(self) -> Dataset[Any]:
        draw = torch.Generator().manual_seed(3)
        ids = torch.randint(1, WORDS, (SAMPLES, LONGEST), generator=draw)
        lengths = torch.randint(1, LONGEST + 1, (SAMPLES, 1), generator=draw)
        targets = ids.roll(-1, 1).masked_fill(torch.arange(LONGEST) >= lengths, 0)
        return TensorDataset(ids, targets)

    def eval_data(self) -> Dataset[Any]:
        return self.train_data()

    def loss(self, outputs: Any, targets: Any) -> Any:
        flat = outputs.transpose(1, 2)
        summed = nn.functional.cross_entropy(flat, targets, ignore_index=0, reduction="sum")
        return summed, (targets > 0).sum()


class OwnMean(Tokens):
    """The same, each micro-batch divided by its own tokens: what most scripts do."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        summed, weight = super().loss(outputs, targets)
        mean: Tensor = summed / weight
        return mean


def weighted_job(
    strategy: dict[str, Any], workers: int, parts: int, clip: float | None = None
) -> Job:
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
def plain(clip: float | None) -> tuple[dict[str, Tensor], list[float], float]:
    """Train in one process; give the model, the losses and the last evaluation."""
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
        summed, weight = task.loss(*map_model(model, data))
    state = {name: value.detach() for name, value in model.state_dict().items()}
    return state, losses, float(summed / weight)


def map_model(model: nn.Module, data: Dataset[Any]) -> tuple[Tensor, Tensor]:
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
def test_every_world_gives_what_one_process_gives(
    strategy: dict[str, Any], workers: int, parts: int, clip: float | None
) -> None:
    run = train(weighted_job(strategy, workers, parts, clip), Tokens)
    state, losses, _ = plain(clip)
    found = {name: value for part in run.trained for name, value in part.items()}
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-10), name
    assert losses_of(run) == pytest.approx(losses, abs=1e-10)


def losses_of(run: LocalRun) -> list[float]:
    """Give each step's loss, put together from the ranks' reports."""
    found = []
    for step in range(STEPS):
        parts = [
            report
            for reports in run.reports
            for report in reports
            if isinstance(report, StepReport) and report.step == step
        ]
        weights = [part.weight or 0.0 for part in parts]
        means = zip(parts, weights, strict=True)
        found.append(sum(part.loss * weight for part, weight in means) / sum(weights))
    return found


@pytest.mark.parametrize("task", [OwnMean, Tokens])
@pytest.mark.parametrize(
    "strategy",
    [{"name": "ring"}, {"name": "hybrid", "pipeline": 2, "micro_batches": 2, "cut": "even"}],
    ids=name_of,
)
def test_a_loss_that_is_no_mean_over_samples_is_told_of(
    strategy: dict[str, Any], task: type[Tokens], caplog: pytest.LogCaptureFixture
) -> None:
    train(weighted_job(strategy, 2, 1), task)
    told = "(sum, weight)" in caplog.text
    assert told == (task is OwnMean), caplog.text


@pytest.mark.parametrize("name", ["ring", "ps-sync"])
def test_an_evaluation_is_a_mean_over_the_weights(name: str) -> None:
    run = train(weighted_job({"name": name}, 2, 1), Tokens)
    found = {r.rank: r for reports in run.reports for r in reports if isinstance(r, EvalReport)}
    whole = sum(r.sums["loss"] for r in found.values())
    assert whole / sum(r.counts["loss"] for r in found.values()) == pytest.approx(
        plain(None)[2], abs=1e-10
    )


def test_a_mean_of_means_is_another_model() -> None:
    """What this guards would be seen: dividing by a micro-batch's own tokens moves elsewhere."""
    run = train(weighted_job({"name": "ring"}, 2, 1), OwnMean)
    state, _, _ = plain(None)
    assert any((run.trained[0][name] - value).abs().max() > 1e-4 for name, value in state.items())


def test_an_asynchronous_push_is_divided_by_its_own_weight() -> None:
    """One worker: each push is a step, so the run is the plain one."""
    run = train(weighted_job({"name": "ps-async"}, 1, 2), Tokens)
    state, _, _ = plain(None)
    for name, value in state.items():
        assert torch.allclose(run.trained[0][name], value, rtol=0, atol=1e-10), name
