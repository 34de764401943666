"""LAMB against Algorithm 2 of the paper, written out; and runs by its name."""

import math
from typing import Any

import pytest
import torch
from grouped_task import STRATEGIES, Small, close
from grouped_task import job as grouped_job
from local_run import train
from torch import Tensor, nn

from distplat.strategies.model.lamb import LAMB
from distplat.strategies.task import Task

RATES = [0.1, 0.1, 0.05]
BETA1, BETA2, EPS, DECAY = 0.9, 0.99, 1e-6, 0.3


def written_out(x: list[float], gradients: list[list[float]]) -> list[float]:
    """One parameter, number by number; phi is the identity."""
    m, v = [0.0] * len(x), [0.0] * len(x)
    for t, (rate, g) in enumerate(zip(RATES, gradients, strict=True), 1):
        m = [BETA1 * a + (1 - BETA1) * b for a, b in zip(m, g, strict=True)]
        v = [BETA2 * a + (1 - BETA2) * b * b for a, b in zip(v, g, strict=True)]
        r = [
            (a / (1 - BETA1**t)) / (math.sqrt(b / (1 - BETA2**t)) + EPS)
            for a, b in zip(m, v, strict=True)
        ]
        way = [a + DECAY * b for a, b in zip(r, x, strict=True)]
        norm, length = math.hypot(*x), math.hypot(*way)
        trust = norm / length if norm and length else 1.0
        x = [a - rate * trust * b for a, b in zip(x, way, strict=True)]
    return x


@pytest.mark.parametrize("x", [[0.5, -2.0, 3.0], [1e-3, 1e-3, 0.0], [0.0, 0.0, 0.0]])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_it_is_the_papers_algorithm(x: list[float], scale: float) -> None:
    gradients = [[scale, -2.0 * scale, 0.5], [0.1, 0.0, -3.0], [0.0, -1.0, 2.0]]
    one = nn.Parameter(torch.tensor(x, dtype=torch.float64))
    other = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))  # its norm is no part of the first
    made = LAMB([one, other], 1.0, DECAY, (BETA1, BETA2), EPS)
    for rate, gradient in zip(RATES, gradients, strict=True):
        one.grad, other.grad = torch.tensor(gradient, dtype=torch.float64), torch.ones_like(other)
        made.param_groups[0]["lr"] = rate
        made.step()
    torch.testing.assert_close(one.detach().tolist(), written_out(x, gradients))
    nothing = LAMB([nn.Parameter(torch.zeros(3))], 1.0)
    nothing.param_groups[0]["params"][0].grad = torch.zeros(3)
    nothing.step()
    assert not nothing.param_groups[0]["params"][0].any()  # 0 / 0 nowhere


class ByTask(Small):
    """The same, made by the task: by number, not by name."""

    def optimizer(self, named_parameters: list[tuple[str, nn.Parameter]]) -> Any:
        still = [p for name, p in named_parameters if name.endswith("bias") or "norm" in name]
        rest = [p for _, p in named_parameters if all(p is not one for one in still)]
        return LAMB([{"params": rest}, {"params": still, "weight_decay": 0.0}], 0.05, 0.3)


BY_NAME: dict[str, Any] = {
    "name": "LAMB",
    "lr": 0.05,
    "weight_decay": 0.3,
    "groups": [{"match": "*.bias,*norm*", "weight_decay": 0}],
}


@pytest.fixture(scope="module")
def by_task() -> dict[str, Tensor]:
    return train(grouped_job("ring", 1, optimizer={"name": "task"}), ByTask).parameters()


@pytest.mark.parametrize("name", STRATEGIES)
def test_by_name_it_is_the_same_under_every_strategy(name: str, by_task: dict[str, Tensor]) -> None:
    kind: type[Task] = Small
    close(train(grouped_job(*STRATEGIES[name], optimizer=BY_NAME), kind).parameters(), by_task)


@pytest.mark.parametrize("name", ["ring-2", "ps-sync-3-servers"])
def test_a_run_that_goes_on_has_the_same_bits(name: str) -> None:
    of = grouped_job(*STRATEGIES[name], optimizer=BY_NAME, checkpoint={"every_steps": 2})
    unfailed = train(of, Small)
    resumed = train(of, Small, saved=unfailed.checkpoints[2])
    for key, value in unfailed.parameters().items():
        assert torch.equal(resumed.parameters()[key], value), key
