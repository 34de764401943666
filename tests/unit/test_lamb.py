"""LAMB matches Algorithm 2 of the paper; training with `optimizer.name: LAMB`."""

import math
from typing import Any

import pytest
import torch
from grouped_task import STRATEGIES, Small, assert_close
from grouped_task import job as grouped_job
from local_run import train
from torch import Tensor, nn

from distplat.strategies.model.lamb import LAMB
from distplat.strategies.task import Task

RATES = [0.1, 0.1, 0.05]
BETA1, BETA2, EPS, DECAY = 0.9, 0.99, 1e-6, 0.3


def reference_lamb(x: list[float], gradients: list[list[float]]) -> list[float]:
    """Update one parameter by Algorithm 2 with scalar arithmetic; phi is the identity."""
    m, v = [0.0] * len(x), [0.0] * len(x)
    for t, (rate, g) in enumerate(zip(RATES, gradients, strict=True), 1):
        m = [BETA1 * a + (1 - BETA1) * b for a, b in zip(m, g, strict=True)]
        v = [BETA2 * a + (1 - BETA2) * b * b for a, b in zip(v, g, strict=True)]
        r = [
            (a / (1 - BETA1**t)) / (math.sqrt(b / (1 - BETA2**t)) + EPS)
            for a, b in zip(m, v, strict=True)
        ]
        update = [a + DECAY * b for a, b in zip(r, x, strict=True)]
        norm, update_norm = math.hypot(*x), math.hypot(*update)
        trust = norm / update_norm if norm and update_norm else 1.0
        x = [a - rate * trust * b for a, b in zip(x, update, strict=True)]
    return x


@pytest.mark.parametrize("x", [[0.5, -2.0, 3.0], [1e-3, 1e-3, 0.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_matches_the_papers_algorithm(x: list[float], scale: float) -> None:
    gradients = [[scale, -2.0 * scale, 0.5], [0.1, 0.0, -3.0], [0.0, -1.0, 2.0]]
    first = nn.Parameter(torch.tensor(x, dtype=torch.float64))
    second = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))  # has its own norm
    optimizer = LAMB([first, second], 1.0, DECAY, (BETA1, BETA2), EPS)
    for rate, gradient in zip(RATES, gradients, strict=True):
        first.grad, second.grad = (
            torch.tensor(gradient, dtype=torch.float64),
            torch.ones_like(second),
        )
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    torch.testing.assert_close(first.detach().tolist(), reference_lamb(x, gradients))
    zero_optimizer = LAMB([nn.Parameter(torch.zeros(3))], 1.0)
    zero_optimizer.param_groups[0]["params"][0].grad = torch.zeros(3)
    zero_optimizer.step()
    assert not zero_optimizer.param_groups[0]["params"][0].any()  # no 0 / 0


class TaskOptimizer(Small):
    """Creates the same optimizer in the task."""

    def optimizer(self, named_parameters: list[tuple[str, nn.Parameter]]) -> Any:
        without_decay = [
            p for name, p in named_parameters if name.endswith("bias") or "norm" in name
        ]
        rest = [p for _, p in named_parameters if all(p is not other for other in without_decay)]
        return LAMB([{"params": rest}, {"params": without_decay, "weight_decay": 0.0}], 0.05, 0.3)


NAMED: dict[str, Any] = {
    "name": "LAMB",
    "lr": 0.05,
    "weight_decay": 0.3,
    "groups": [{"match": "*.bias,*norm*", "weight_decay": 0}],
}


@pytest.fixture(scope="module")
def task_optimizer_parameters() -> dict[str, Tensor]:
    return train(grouped_job("ring", 1, optimizer={"name": "task"}), TaskOptimizer).parameters()


@pytest.mark.parametrize("name", STRATEGIES)
def test_named_optimizer_matches_the_task_optimizer(
    name: str, task_optimizer_parameters: dict[str, Tensor]
) -> None:
    task_type: type[Task] = Small
    assert_close(
        train(grouped_job(*STRATEGIES[name], optimizer=NAMED), task_type).parameters(),
        task_optimizer_parameters,
    )


@pytest.mark.parametrize("name", ["ring-2", "ps-sync-3-servers"])
def test_resumes_bit_identically(name: str) -> None:
    spec = grouped_job(*STRATEGIES[name], optimizer=NAMED, checkpoint={"every_steps": 2})
    uninterrupted = train(spec, Small)
    resumed = train(spec, Small, saved=uninterrupted.checkpoints[2])
    for key, value in uninterrupted.parameters().items():
        assert torch.equal(resumed.parameters()[key], value), key
