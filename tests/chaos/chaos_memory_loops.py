"""Random jobs of a train function for the soak in memory."""

from __future__ import annotations

from random import Random
from typing import Any

from chaos_memory_plan import COLLECTIVE_S, EVERY, HEARTBEAT_S, STEP_S, STEPS, Setting, draw_setting

from distplat.strategies.catalog import make_job

BATCH = 12
"""Samples of a step over all ranks."""
OPTIMIZERS = (("SGD", 0.1), ("AdamW", 0.01), ("Adagrad", 0.05))


def setting_of(number: int) -> Setting:
    """Draw the job of this number; every third job has a train function."""
    if number % 3 == 2:
        return draw_loop(Random(f"loop {number}"))
    return draw_setting(Random(f"job {number}"))


def draw_loop(draw: Random) -> Setting:
    """Draw the job of a train function."""
    name = draw.choice(("ring", "ps-sync", "ps-async"))
    synchronous = name != "ps-async"
    workers = draw.choice((2, 2, 3)) if synchronous else draw.choice((1, 1, 2))
    optimizer, lr = draw.choice(OPTIMIZERS)
    fields: dict[str, Any] = {
        "name": "soak",
        "strategy": _some_strategy(name, draw),
        "scaling": {"num_workers": workers},
        "checkpoint": {"num_to_keep": draw.choice((2, 3))},
        "failure": {
            "max_failures": 50,
            "heartbeat_timeout_s": HEARTBEAT_S,
            "step_timeout_s": STEP_S,
            "start_timeout_s": 15.0,
        },
        "task_args": {
            "steps": STEPS,
            "every": EVERY,
            "batch": BATCH // workers,
            "stateful": synchronous and draw.random() < 0.5,
            "models": draw.choice((1, 1, 2)),
            "optimizer": optimizer,
            "lr": lr,
            "accumulate": draw.choice((1, 1, 2)),
            "clip": draw.random() < 0.4,
            "talks": synchronous and draw.random() < 0.5,
            "files": draw.random() < 0.3,
        },
    }
    make_job({**fields, "task": "m:loop"})
    return Setting(fields, draw.choice((1, 1, 2, 3)), "loop")


def _some_strategy(name: str, draw: Random) -> dict[str, Any]:
    if name == "ring":
        more = draw.choice(({}, {"overlap": False}, {"bucket_mb": 0.0005}))
        return {"name": name, "timeout_s": COLLECTIVE_S, **more}
    options: dict[str, Any] = {"name": name, "num_servers": draw.choice((1, 2, 3))}
    if name == "ps-async" and draw.random() < 0.5:
        options["staleness"] = draw.choice((0, 2))
    return options
