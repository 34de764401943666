"""
The promise, drawn at random: any model, optimizer and strategy gives what a plain loop gives.

`make test` makes a fixed sample of fifty runs, `make test-all` minutes of others. What is drawn is
in `tests/support/drawn_tasks.py`, the plain loop is that of `distplat verify`. That it finds faults
is tested in `test_planted_faults.py`.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from drawn_tasks import BLOCKS, Drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from in_memory_engine import make, trained
from in_memory_run import train as train_in_memory

from distplat.strategies.verification.compare import Comparison, compare
from distplat.strategies.verification.plan import parts, recipe_of
from distplat.strategies.verification.reference import train
from distplat.strategies.verification.switched import Switches

TOLERANCE = 1e-9
"""In float64, relative to a tensor's largest element; runs of six steps stay below 1e-13."""

RUNS = int(os.environ.get("DISTPLAT_DRAWN_RUNS", "50"))
"""`make test` draws the same ones each time, `make test-all` many others."""

NOT_YET: set[str] = set()
NOT_YET_CUT: set[str] = set()

OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "SGD", "lr": 0.1},
    {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.05},
    {"name": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    {"name": "SGD", "lr": 0.1, "momentum": 0.9, "dampening": 0.5},
    {"name": "Adam", "lr": 0.02},
    {"name": "Adam", "lr": 0.02, "amsgrad": True, "weight_decay": 0.05},
    {"name": "AdamW", "lr": 0.02, "weight_decay": 0.1},
    {"name": "AdamW", "lr": 0.02, "maximize": True},
    {"name": "RMSprop", "lr": 0.01, "momentum": 0.5, "centered": True},
    {"name": "Adagrad", "lr": 0.05, "lr_decay": 0.01, "initial_accumulator_value": 0.1},
    {"name": "Adadelta", "lr": 1.0},
    {"name": "Adamax", "lr": 0.02},
    {"name": "NAdam", "lr": 0.02},
    {"name": "RAdam", "lr": 0.02, "weight_decay": 0.05},
]

SCHEDULES: list[dict[str, Any]] = [
    {"name": "constant"},
    {"name": "cosine", "warmup_steps": 2, "final_factor": 0.1},
]

STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("ring", {}),
    ("ring", {"bucket_mb": 0.0001}),
    ("ring", {"shard_optimizer": True}),
    ("ps-sync", {}),
    ("ps-sync", {"num_servers": 2}),
    ("hybrid", {"pipeline": 2, "cut": "even"}),
    ("hybrid", {"pipeline": 3, "cut": "even", "schedule": "gpipe"}),
    ("hybrid", {"data": 2}),
]


@st.composite
def runs(draw: st.DrawFn) -> Drawn:
    """Draw a run that the job file allows."""
    strategy, options = draw(st.sampled_from(STRATEGIES))
    cuts = strategy == "hybrid"
    names = sorted(BLOCKS.keys() - NOT_YET - (NOT_YET_CUT if cuts else set()))
    blocks = tuple(draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)))
    workers = draw(st.integers(1, 3))
    accumulation = draw(st.integers(1, 3))
    if cuts:
        workers = options.get("pipeline", 1) * options.get("data", 1)
        blocks = ("plain", *blocks, "plain")  # as many layers as stages
        micro = draw(st.integers(1, 3))
        options = {**options, "micro_batches": micro}
        least = micro * options.get("data", 1)
    else:
        least = workers * accumulation
    batch = max(least, workers) + draw(st.integers(0, 4))
    rest = draw(st.integers(0, batch - 1))
    return Drawn(
        blocks=blocks,
        form="tensor" if cuts else draw(st.sampled_from(["tensor", "dict", "tuple"])),
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        lr_schedule=draw(st.sampled_from(SCHEDULES)),
        clip_norm=draw(st.sampled_from([None, 0.05, 100.0])),
        accumulation=accumulation,
        strategy=strategy,
        options=options,
        workers=workers,
        samples=2 * batch + rest,
        batch=batch,
    )


def met(drawn: Drawn) -> Comparison:
    """Train both ways and compare."""
    job, kind = drawn.job(), drawn.task()
    task = lambda: make(kind)(Switches())  # noqa: E731
    schedule, recipe = parts(job, drawn.samples), recipe_of(job)
    plain, backwards = (train(task, schedule, recipe, reverse=way) for way in (False, True))
    run = trained(job, train_in_memory(job, kind))
    names = sorted(set().union(*plain.used))
    return compare(run, plain, backwards, names, TOLERANCE)


@pytest.mark.timeout(120 + RUNS)
@settings(max_examples=RUNS, derandomize=RUNS <= 50, database=None)
@given(drawn=runs())
def test_a_run_gives_what_a_plain_loop_gives(drawn: Drawn) -> None:
    found = met(drawn)
    assert not found.parts, found
