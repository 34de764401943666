"""
What workers tell the controller is read without torch.

To import it holds up the whole process, its answers to the driver included: for seconds on a
busy machine.
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
        kept = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        distplat.report({"loss": 1.0}, checkpoint=kept)


def modules(value: object) -> set[str]:
    """Name the modules whose classes and functions a value is pickled with."""
    text: list[str] = []
    found = set()
    for opcode, argument, _ in pickletools.genops(pickle.dumps(value, 4)):
        if opcode.name in ("BINUNICODE", "SHORT_BINUNICODE"):
            text.append(str(argument))
        if opcode.name == "STACK_GLOBAL":
            found.add(text[-2])
    return found


def test_torch_is_found_where_it_is() -> None:
    assert "torch.torch_version" in modules({"torch": torch.__version__})


@pytest.mark.parametrize("what", ["task", "function"])
def test_parts_of_checkpoints_come_without_torch(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliveries: list[Delivery] = []
    take = Checkpoints.take

    def taken(self: Checkpoints, delivery: Delivery) -> None:
        deliveries.append(delivery)
        take(self, delivery)

    monkeypatch.setattr(Checkpoints, "take", taken)
    job = {**FIELDS, "storage_path": str(tmp_path)}
    if what == "function":
        job = {key: job[key] for key in ("name", "strategy", "scaling", "storage_path")}
    Trainer(job, Small if what == "task" else loop).fit()
    assert deliveries
    assert not {name for one in deliveries for name in modules(one) if name.startswith("torch")}
