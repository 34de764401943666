"""A loss that keeps figures to show them is left alone; one that computes with them is told."""

import importlib.util
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from jobs import job_of
from local_run import train
from torch import nn

from distplat.strategies.loop.attribute_use import AttributeUse
from distplat.strategies.task import Task

HEAD = """
import logging
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
import distplat

logger = logging.getLogger(__name__)


class Model(nn.Linear):
    pass


class Some(distplat.Task):
    def __init__(self):
        self.steps, self.last, self.total, self.mean = 0, 0.0, 0.0, 0.0
        self.history = []

    def model(self):
        return Model(4, 3)

    def train_data(self):
        return TensorDataset(torch.randn(16, 4), torch.randn(16, 3))

    def loss(self, outputs, targets):
        loss = F.mse_loss(outputs, targets)
"""

SHOWN = {
    "the last one": "self.last = loss.item()",
    "a tensor": "self.last = loss.detach()",
    "a counter": "self.steps += 1",
    "a moving average": "self.mean = 0.9 * self.mean + 0.1 * loss.item()",
    "each hundredth": """
        self.steps += 1
        self.total += float(loss.detach())
        if self.steps % 100 == 0:
            mean = self.total / self.steps
            logger.info("loss %.3f", mean)
            print(f"{self.steps}: {loss.item():.3f}, {mean:.3f}")
            self.total = 0.0
        """,
    "a figure of a figure": """
        self.last = loss.item()
        if self.steps > 0 and self.last < self.mean:
            pass
        else:
            self.mean = self.last
        self.steps = self.steps + 1
        """,
    "one of a list": "self.steps += 1; self.last = [1.0, 2.0][self.steps % 2]",
    "a history": """
        self.steps += 1
        self.last = loss.detach()
        self.history.append(self.last)
        if len(self.history) == 10:
            print(torch.stack(self.history).mean().item(), self.history[-1])
            self.history.clear()
        """,
}
COMPUTED = {
    "a factor": "self.steps += 1; loss = loss * min(1.0, self.steps / 9)",
    "a condition": """
        self.steps += 1
        if self.steps > 1000:
            loss = loss * 2
        """,
    "another attribute": """
        self.steps += 1
        self.mean = self.steps / 9
        loss = loss * self.mean
        """,
    "a local name": """
        self.steps += 1
        share = min(1.0, self.steps / 9)
        loss = share * loss
        """,
    "in place": """
        self.steps += 1
        loss *= self.steps
        """,
    "by its name": 'self.steps += 1; loss = loss * getattr(self, "steps")',
    "as a whole": "self.steps += 1; loss = scaled(self, loss)",
    "all attributes": 'self.steps += 1; loss = loss * self.__dict__["steps"]',
    "a method of its own": "self.steps += 1; self.log(self.steps); loss = loss * self.mean",
    "one that is named like torch's": "self.steps += 1; shown = self.norm(self.steps)",
    "what is drawn": """
        self.steps += 1
        if self.steps > 1000:
            self.last = torch.rand(())
        """,
    "a call that is left out": "self.steps += 1; self.last = self.steps > 9 and torch.rand(())",
    "a list": "self.steps += 1; loss = loss * [1.0, 2.0][self.steps % 2]",
    "a history of it": """
        self.steps += 1
        self.history.append(self.steps)
        loss = loss / len(self.history)
        """,
    "put elsewhere": "self.steps += 1; self.others().append(self.steps)",
    "a loop": """
        self.steps += 1
        for _ in range(self.steps):
            loss = loss * 0.5
        """,
}
TAIL = """
        return loss

    def norm(self, value):
        self.mean = value

    def others(self):
        return []

    def log(self, value):
        self.mean = value


def scaled(task, loss):
    return loss * getattr(task, "".join(["ste", "ps"]))
"""


def task_of(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> type[Task]:
    """Import a file with a task whose loss does something more."""
    path = folder / "some_task.py"
    more = textwrap.indent(textwrap.dedent(body).strip(), " " * 8)
    path.write_text(f"{HEAD}{more}\n{TAIL}")
    spec = importlib.util.spec_from_file_location("some_task", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "some_task", module)
    spec.loader.exec_module(module)
    found: type[Task] = module.Some
    return found


@pytest.mark.parametrize("name", [*SHOWN, *COMPUTED])
def test_what_is_computed_with_is_told(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of((SHOWN | COMPUTED)[name], tmp_path, monkeypatch)
    train(job_of("ring", 1, steps=3, global_batch_size=8), task)
    assert ("no checkpoint has" in caplog.text) == (name in COMPUTED)


def test_where_there_is_no_file_it_may_be_computed_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = task_of(SHOWN["a counter"], tmp_path, monkeypatch)()
    assert AttributeUse([one]).is_shown_only(one, "steps")
    (tmp_path / "some_task.py").unlink()
    assert not AttributeUse([one]).is_shown_only(one, "steps")


def test_a_cell_of_a_notebook_is_no_file() -> None:
    names: dict[str, Any] = {"__name__": "cell"}
    text = "class Cell:\n    def loss(self):\n        self.steps = 1\n"
    exec(compile(text, "<cell>", "exec"), names)
    one = names["Cell"]()
    assert not AttributeUse([one]).is_shown_only(one, "steps")


class Reads(nn.Module):
    """Reads an attribute of another one."""

    def forward(self, other: Any) -> Any:
        return other.read_elsewhere * F.relu(other.weight)


class Kept(nn.Module):
    def forward(self, x: Any) -> Any:
        self.read_elsewhere = x
        self.read_nowhere = x
        return x


def test_others_that_read_it_count() -> None:
    use = AttributeUse([kept := Kept(), Reads(), nn.Linear(1, 1)])
    assert not use.is_shown_only(kept, "read_elsewhere")
    assert use.is_shown_only(kept, f"read_{'nowhere'}")
    assert not use.is_shown_only(nn.BatchNorm1d(1), "anything")
