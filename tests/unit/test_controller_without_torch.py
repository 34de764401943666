"""
The controller unpickles messages of workers without importing torch.

On a loaded machine the import takes seconds, and blocks the replies to the driver.
"""

import pickle
import pickletools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distplat
from distplat import Task, Trainer
from distplat.actors.checkpointing import Checkpoints
from distplat.platform.checkpoints import Delivery

FIELDS: dict[str, Any] = {
    "name": "small",
    "strategy": "ring",
    "scaling": {"num_workers": 0},
    "checkpoint": {"every_steps": 1},
    "steps": 2,
    "global_batch_size": 4,
    "optimizer": {"name": "Adam", "lr": 0.1},
}


class Small(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    def train_data(self) -> Any:
        return torch.utils.data.TensorDataset(torch.randn(8, 3), torch.randn(8, 2))

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(outputs, targets)


def loop() -> None:
    model, optimizer = distplat.prepare(net := nn.Linear(3, 2), torch.optim.Adam(net.parameters()))
    for step in range(2):
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        distplat.report({"loss": 1.0}, checkpoint=state)


def modules(value: object) -> set[str]:
    """Return the modules of all classes and functions in the pickle of a value."""
    strings: list[str] = []
    names = set()
    for opcode, argument, _ in pickletools.genops(pickle.dumps(value, 4)):
        if opcode.name in ("BINUNICODE", "SHORT_BINUNICODE"):
            strings.append(str(argument))
        if opcode.name == "STACK_GLOBAL":
            names.add(strings[-2])
    return names


def test_modules_detects_torch() -> None:
    assert "torch.torch_version" in modules({"torch": torch.__version__})


@pytest.mark.parametrize("source", ["task", "function"])
def test_checkpoint_parts_are_pickled_without_torch(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliveries: list[Delivery] = []
    take = Checkpoints.take

    def record(self: Checkpoints, delivery: Delivery) -> None:
        deliveries.append(delivery)
        take(self, delivery)

    monkeypatch.setattr(Checkpoints, "take", record)
    job = {**FIELDS, "storage_path": str(tmp_path)}
    if source == "function":
        job = {key: job[key] for key in ("name", "strategy", "scaling", "storage_path")}
    Trainer(job, Small if source == "task" else loop).fit()
    assert deliveries
    assert not {
        name for delivery in deliveries for name in modules(delivery) if name.startswith("torch")
    }
