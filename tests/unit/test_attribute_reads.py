"""What a loss only writes is no state of it; what it may read is told."""

import importlib.util
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from jobs import job_of
from local_run import train
from torch import nn

from distplat.strategies.loop.attribute_reads import AttributeReads
from distplat.strategies.task import Task

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
import distplat
import losses_of_mine


class Model(nn.Linear):
    pass


class Base(distplat.Task):
    @property
    def shown(self):
        return self.of_property


class Some(Base):
    def __init__(self):
        self.last, self.steps, self.of_property = 0.0, 0, 0

    def model(self):
        return Model(4, 3)

    def train_data(self):
        return TensorDataset(torch.randn(16, 4), torch.randn(16, 3))

    def loss(self, outputs, targets):
        loss = F.mse_loss(outputs, targets)
"""
TAIL = """
        return loss


def scaled(task, loss):
    return loss * min(1.0, task.steps / 9)
"""
MODULE = """
def scaled(task, loss):
    return loss * min(1.0, task.last)
"""
WRITTEN = {
    "a number": "self.last = loss.item()",
    "a tensor": "self.last = loss.detach()",
    "a new one": "self.now = loss.detach()",
}
READ = {
    "itself": "self.steps += 1",
    "a factor": "self.steps = self.steps + 1; loss = loss * min(1.0, self.steps / 9)",
    "by its name": 'self.last = loss.item(); loss = loss * getattr(self, "last")',
    "as one of all": "self.last = loss.item(); loss = loss * vars(self)['la' + 'st']",
    "by a function": "self.steps = 5; loss = scaled(self, loss)",
    "by another module's function": "self.last = 0.5; loss = losses_of_mine.scaled(self, loss)",
    "by a function inside": "self.last = 0.5; loss = (lambda: loss * self.last)()",
    "by a base's property": "self.of_property = 5",
}


def task_of(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> type[Task]:
    """Import a file with a task whose loss does something more."""
    (folder / "losses_of_mine.py").write_text(MODULE)
    more = textwrap.indent(body, " " * 8)
    (folder / "some_task.py").write_text(f"{HEAD}{more}\n{TAIL}")
    for name in ("losses_of_mine", "some_task"):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    found: type[Task] = module.Some
    return found


@pytest.mark.parametrize("name", [*WRITTEN, *READ])
def test_what_may_be_read_is_told(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of((WRITTEN | READ)[name], tmp_path, monkeypatch)
    train(job_of("ring", 1, steps=3, global_batch_size=8), task)
    assert ("no checkpoint has" in caplog.text) == (name in READ)


class Writes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.read_elsewhere = self.read_nowhere = x
        return x


class Reads(nn.Module):
    """Reads what another one has."""

    def __init__(self, other: Writes) -> None:
        super().__init__()
        self.others = [other]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.others[0].read_elsewhere


def test_others_may_read_it() -> None:
    reads = AttributeReads([held := Writes(), Reads(held), nn.Linear(1, 1)])
    assert reads.may_read(held, "read_elsewhere")
    assert not reads.may_read(held, f"read_{'nowhere'}")


def test_what_a_library_writes_it_may_read() -> None:
    assert AttributeReads([]).may_read(nn.BatchNorm1d(1), "anything")
