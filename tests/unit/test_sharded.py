"""The sharded optimizer matches the plain one, with a part of the state on each rank."""

from functools import cache
from typing import Any, get_args

import pytest
import torch
from classifiers import Classify, Conv, Mlp, recipe_job, train_plain
from comparison import distance
from control_records import record_of
from local_run import LocalRun, train
from marks import slow
from torch import nn

from distplat.platform.optimizers import AnyOptimizer
from distplat.platform.progress import StepReport
from distplat.platform.spec import Job
from distplat.strategies.fakes import Fabric
from distplat.strategies.model.optim import LocalOptimizer
from distplat.strategies.reduction.sharded import ShardedUpdate

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.01, "momentum": 0.5, "centered": True},
    "Adagrad": {"lr": 0.1, "initial_accumulator_value": 0.1},
    "Adadelta": {"lr": 1.0},
    "Adamax": {"lr": 0.01},
    "NAdam": {"lr": 0.01},
    "RAdam": {"lr": 0.01},
}


class Tiny(Classify):
    """Three parameters: fewer than one block per rank."""

    shape = (1,)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 3, bias=False))


def job(optimizer: str, workers: int, clip_norm: float | None, **options: Any) -> Job:
    fields = recipe_job("mlp-sgd", "ring", workers, 0).model_dump()
    fields["strategy"] = {"name": "ring", **options}
    fields["optimizer"] = {"name": optimizer, **OPTIMIZERS[optimizer]}
    return Job.model_validate(fields | {"clip_norm": clip_norm, "gradient_accumulation": 2})


@cache
def unsharded(optimizer: str, workers: int, clip_norm: float | None) -> LocalRun:
    return train(job(optimizer, workers, clip_norm), Conv)


def sharded(optimizer: str, workers: int, clip_norm: float | None) -> LocalRun:
    return train(job(optimizer, workers, clip_norm, shard_optimizer=True), Conv)


def test_all_optimizers_are_tested() -> None:
    types = get_args(get_args(AnyOptimizer)[0])
    assert {type_.__name__ for type_ in types} == OPTIMIZERS.keys()


@pytest.mark.sweep(3)
@pytest.mark.parametrize("workers", [slow(1), slow(2), 3, slow(4)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_matches_unsharded_optimizer(optimizer: str, workers: int) -> None:
    run = sharded(optimizer, workers, 0.3)
    expected = unsharded(optimizer, workers, 0.3).parameters()
    for rank in range(workers):
        assert distance(run.parameters(rank), run.parameters()) == 0
    assert distance(run.parameters(), expected) < 1e-6


@pytest.mark.sweep(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bit_identical_without_clipping(optimizer: str) -> None:
    """Only the norm is summed in another order."""
    run = sharded(optimizer, 3, None)
    assert distance(run.parameters(), unsharded(optimizer, 3, None).parameters()) == 0


def test_clips_by_norm_over_all_ranks() -> None:
    options = {"shard_optimizer": True}
    recipe = recipe_job("mlp-sgd-accumulated-clipped", "ring", 3, 0)
    strategy = recipe.strategy.model_copy(update={"options": options})
    run = train(recipe.model_copy(update={"strategy": strategy}), Mlp)
    assert distance(run.parameters(), train_plain("mlp-sgd-accumulated-clipped")[0]) < 1e-5


@pytest.mark.sweep(3)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ranks_without_a_part_participate(optimizer: str) -> None:
    run = train(job(optimizer, 3, 0.3, shard_optimizer=True), Tiny)
    expected = train(job(optimizer, 3, 0.3), Tiny).parameters()
    for rank in range(3):
        assert distance(run.parameters(rank), expected) < 1e-6
    memory = [figures(run, rank)["optimizer_state_bytes"] for rank in range(3)]
    assert max(memory[1:]) == 0


def figures(run: LocalRun, rank: int) -> dict[str, float]:
    report = run.reports[rank][-1]
    assert isinstance(report, StepReport)
    return report.figures


def test_each_rank_has_its_part_of_the_state() -> None:
    unsharded_bytes = figures(unsharded("Adam", 3, 0.3), 0)["optimizer_state_bytes"]
    run = sharded("Adam", 3, 0.3)
    parts = [figures(run, rank)["optimizer_state_bytes"] for rank in range(3)]
    counters = 4 * 6  # bytes of step counters of parameters that are split over two ranks
    assert unsharded_bytes <= sum(parts) <= unsharded_bytes + counters
    assert max(parts) - min(parts) <= 3 * 2 * 16 * 4  # three moments, parts in blocks of 16 floats


def test_sends_as_many_bytes_as_all_reduce() -> None:
    sent = [
        sum(figures(run, rank)["sent_bytes"] for rank in range(3))
        for run in (sharded("SGD", 3, None), unsharded("SGD", 3, None))
    ]
    assert sent[0] == sent[1] > 0
    assert figures(sharded("SGD", 3, None), 0)["exposed_s"] > 0


def test_state_of_sharded_update_is_empty() -> None:
    run = sharded("Adam", 1, None)
    flat = run.ranks[0].prepared.flat
    update = ShardedUpdate(flat, Fabric(1).collective(0), job("Adam", 1, None), 15)
    flat.grads.copy_(torch.ones_like(flat.grads))
    update.finish(record_of(flat))
    update.step(0)
    assert update.state() == {}
    assert update.state_bytes == 3 * flat.params.nbytes + 4 * len(flat.slots)
    assert isinstance(update, LocalOptimizer)
