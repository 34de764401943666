"""The optimizer skips parameters without a gradient in a step, in every grid."""

from functools import cache
from typing import Any

import pytest
import torch
from hybrid_models import grid_of, hybrid_job, merge_parts
from local_run import train
from routed_task import BATCH, Routed
from torch import Tensor

STEPS = 4
EXPERTS = torch.tensor(
    [[4] * 14 + [2] * 2, [0] * 2 + [4] * 14, [4] * BATCH, [4] * 6 + [1, 1] + [4] * 8]
)
"""The expert of each sample by step: 0, 1 and 2 are used in one step each, 3 in none."""
ADAM = {"name": "AdamW", "lr": 0.01, "weight_decay": 0.1}
SGD = {"name": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}


class UnusedExperts(Routed):
    def train_data(self) -> Any:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(STEPS * BATCH, 5, generator=generator).double()
        inputs[:, 0] = EXPERTS.reshape(-1)
        outputs = torch.randn(STEPS * BATCH, 2, generator=generator).double()
        return torch.utils.data.TensorDataset(inputs, outputs)


@cache
def plain_loop(name: str) -> dict[str, Tensor]:
    task = UnusedExperts()
    torch.manual_seed(5)
    model = task.model()
    cls = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}[name]
    fields = {"AdamW": ADAM, "SGD": SGD}[name]
    optimizer = cls(model.parameters(), **{k: v for k, v in fields.items() if k != "name"})
    inputs, targets = task.train_data().tensors
    for step in range(STEPS):
        batch = slice(step * BATCH, (step + 1) * BATCH)
        optimizer.zero_grad()
        task.loss(model(inputs[batch]), targets[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {key: value.detach() for key, value in model.state_dict().items()}


@pytest.mark.sweep(8)
@pytest.mark.parametrize("optimizer", [ADAM, SGD], ids=lambda optimizer: optimizer["name"])
@pytest.mark.parametrize("data_strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved"])
@pytest.mark.parametrize("data", [1, 2])
def test_parameters_without_a_gradient_are_not_updated(
    data: int, schedule: str, data_strategy: str, optimizer: dict[str, Any]
) -> None:
    options, workers = grid_of(2, 1, data, schedule=schedule, data_strategy=data_strategy)
    job = hybrid_job(options, workers, steps=STEPS, data={"shuffle": False}, optimizer=optimizer)
    found, expected = merge_parts(train(job, UnusedExperts)), plain_loop(optimizer["name"])
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name
