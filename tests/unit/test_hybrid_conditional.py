"""Layers that some micro-batches skip: no gradient is lost."""

from functools import cache
from typing import Any

import pytest
import torch
from hybrid_models import grid_of, hybrid_job, merge_parts
from local_run import train
from routed_task import STEPS, Routed
from torch import Tensor


@cache
def plain_loop() -> dict[str, Tensor]:
    task = Routed()
    torch.manual_seed(5)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inputs, targets = task.train_data().tensors
    for _ in range(STEPS):
        optimizer.zero_grad()
        task.loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def assert_matches_plain_loop(options: dict[str, Any], workers: int, **overrides: Any) -> None:
    job = hybrid_job(options, workers, steps=STEPS, data={"shuffle": False}, **overrides)
    found, expected = merge_parts(train(job, Routed)), plain_loop()
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name


@pytest.mark.sweep(2)
@pytest.mark.parametrize("micro_batches", [2, 4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "1f1b"},
        {"schedule": "gpipe"},
        {"schedule": "interleaved"},
        {"schedule": "zb-h1"},
        {"recompute": True},
    ],
    ids=lambda options: str(*options.values()),
)
def test_skipped_layers_match_plain_loop(options: dict[str, Any], micro_batches: int) -> None:
    assert_matches_plain_loop(*grid_of(2, 1, 1, micro_batches=micro_batches, **options))


@pytest.mark.sweep(4)
@pytest.mark.parametrize("data_strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved", "zb-h1"])
def test_skipped_layers_match_plain_loop_with_replicas(schedule: str, data_strategy: str) -> None:
    extra = {"bucket_mb": 0.0001} if data_strategy == "ring" else {}
    assert_matches_plain_loop(
        *grid_of(2, 1, 2, schedule=schedule, data_strategy=data_strategy, **extra)
    )


@pytest.mark.parametrize("data_strategy", ["ring", "ps-sync"])
def test_skipped_layers_match_plain_loop_with_replicas_of_one_stage(data_strategy: str) -> None:
    assert_matches_plain_loop(*grid_of(1, 1, 2, data_strategy=data_strategy, micro_batches=4))
