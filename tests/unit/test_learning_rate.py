"""The schedule against torch's own schedulers, and against a table written by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, StepLR

from distplat.platform.optimizers import Schedule, factor

LR, STEPS = 0.8, 30


def of_torch(make: Callable[[torch.optim.Optimizer], LRScheduler]) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler = make(optimizer)
    rates = []
    for _ in range(STEPS):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        ({"name": "constant"}, lambda o: ConstantLR(o, factor=1.0)),
        ({"name": "cosine"}, lambda o: CosineAnnealingLR(o, T_max=STEPS - 1)),
        (
            {"name": "cosine", "final_factor": 0.25},
            lambda o: CosineAnnealingLR(o, T_max=STEPS - 1, eta_min=0.25 * LR),
        ),
        (
            {"name": "linear", "final_factor": 0.1},
            lambda o: LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=STEPS - 1),
        ),
        (
            {"name": "step", "every_steps": 7, "gamma": 0.3},
            lambda o: StepLR(o, step_size=7, gamma=0.3),
        ),
    ],
    ids=["constant", "cosine", "cosine-final", "linear", "step"],
)
def test_the_same_as_torch(
    schedule: dict[str, Any], make: Callable[[torch.optim.Optimizer], LRScheduler]
) -> None:
    ours = [LR * factor(Schedule.model_validate(schedule), s, STEPS) for s in range(STEPS)]
    assert ours == pytest.approx(of_torch(make), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        ({"name": "linear", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0]),
        (
            {"name": "cosine", "warmup_steps": 4},
            [0.25, 0.5, 0.75, 1, 1, 0.853553, 0.5, 0.146447, 0],
        ),
        (
            {"name": "step", "warmup_steps": 4, "every_steps": 2, "gamma": 0.5},
            [0.25, 0.5, 0.75, 1, 1, 1, 0.5, 0.5, 0.25],
        ),
        ({"name": "linear", "final_factor": 1.0}, [1] * 9),
    ],
)
def test_by_hand(schedule: dict[str, Any], expected: list[float]) -> None:
    rates = [factor(Schedule.model_validate(schedule), step, 9) for step in range(9)]
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (1, 2), (2, 2), (5, 3)])
def test_a_short_run_has_no_division_by_zero(name: str, warmup: int, total: int) -> None:
    schedule = Schedule.model_validate({"name": name, "warmup_steps": warmup})
    rates = [factor(schedule, step, total) for step in range(total)]
    assert rates[0] == (1 / warmup if warmup else 1.0)
    assert all(0 <= rate <= 1 for rate in rates)
