"""
Property-based test: any model, optimizer and strategy matches a plain loop.

`make test` runs a fixed sample, `make test-all` minutes of new examples. The tasks are in
`tests/support/drawn_tasks.py`; the plain loop is that of `distplat verify`. The tests in
`test_planted_faults.py` show that the comparison detects faults.
"""

from __future__ import annotations

import os
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from drawn_runs import train_and_compare
from drawn_tasks import BLOCKS, DrawnRun, build
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_threads import UNSHRUNK

from distplat.platform.errors import SpecError

RUNS = int(os.environ.get("DISTPLAT_DRAWN_RUNS", "6"))
"""Up to 50 runs are the same in each call."""

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
    {"name": "CosineAnnealingLR", "T_max": 4, "eta_min": 0.01},
    {"name": "OneCycleLR", "cycle_momentum": False},
]

STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("ring", {}),
    ("ring", {"bucket_mb": 0.0001}),
    ("ring", {"shard_optimizer": True}),
    ("ps-sync", {}),
    ("ps-sync", {"num_servers": 2}),
    ("hybrid", {"pipeline": 2, "cut": "even"}),
    ("hybrid", {"pipeline": 3, "cut": "even", "schedule": "gpipe"}),
    ("hybrid", {"pipeline": 2, "cut": "even", "schedule": "zb-h1"}),
    ("hybrid", {"data": 2}),
    ("hybrid", {"data": 2, "data_strategy": "ps-sync"}),
]


def draw_run(random: Random) -> DrawnRun:
    """Draw a run that the job file allows, with uniform choices, not the simplest first."""
    strategy, options = random.choice(STRATEGIES)
    is_cut = strategy == "hybrid"
    blocks = tuple(random.choices(sorted(BLOCKS), k=random.randint(1, 3)))
    workers, accumulation = random.randint(1, 3), random.randint(1, 3)
    least = workers * accumulation
    if is_cut:
        workers = options.get("pipeline", 1) * options.get("data", 1)
        # The forward of a teacher writes tensors that backward needs.
        micro_batches = 1 if "teacher" in blocks else accumulation
        options = {**options, "micro_batches": micro_batches}
        least = max(workers, micro_batches * options.get("data", 1))
        blocks = (*(name for block in blocks for name in ("plain", block)), "plain")
    batch = least + random.randint(0, 4)
    drawn = DrawnRun(
        blocks=blocks,
        form="tensor" if is_cut else random.choice(["tensor", "dict", "tuple"]),
        weighted=random.random() < 0.5,
        optimizer=random.choice(OPTIMIZERS),
        lr_schedule=random.choice(SCHEDULES),
        clip_norm=random.choice([None, 0.05, 100.0]),
        accumulation=accumulation,
        strategy=strategy,
        options=options,
        workers=workers,
        samples=2 * batch + random.randint(0, batch - 1),
        batch=batch,
    )
    return with_groups(drawn, random) if random.random() < 0.5 else drawn


def with_groups(drawn: DrawnRun, random: Random) -> DrawnRun:
    """Add two parameter groups with other optimizer arguments."""
    names = [name for name, _ in build(drawn).named_parameters()]
    grouped = random.sample(names, random.randint(2, len(names)))
    cut = random.randint(1, len(grouped) - 1)
    first = {"match": ",".join(grouped[:cut]), "lr": random.choice([0.03, 0.2])}
    second = {"match": ", ".join(grouped[cut:]), "weight_decay": random.choice([0.0, 0.3])}
    return replace(drawn, optimizer={**drawn.optimizer, "groups": [first, second]})


def is_rejected(drawn: DrawnRun) -> bool:
    """Return whether the engine must reject the run."""
    has_servers = "ps-sync" in (drawn.strategy, drawn.options.get("data_strategy"))
    if "bounded" in drawn.blocks and has_servers:
        return True  # forward writes a parameter that is on the servers
    is_fixed = drawn.strategy == "hybrid" or drawn.options.get("shard_optimizer", False)
    return "unfrozen" in drawn.blocks and is_fixed


@pytest.mark.timeout(120 + RUNS)
@settings(max_examples=RUNS, derandomize=RUNS <= 50, database=None, phases=UNSHRUNK)
@given(drawn=st.randoms(use_true_random=True).map(draw_run))
def test_matches_plain_loop(drawn: DrawnRun) -> None:
    if is_rejected(drawn):
        with pytest.raises(SpecError):
            train_and_compare(drawn)
        return
    found = train_and_compare(drawn)
    assert not found.diverges, found
