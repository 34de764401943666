"""What a loss only writes is no state of it; what it may read is told."""

import functools
import importlib.util
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import train
from torch import nn

from distplat.strategies.loop.attribute_reads import AttributeReads
from distplat.strategies.task import Task

HEAD = """
import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
import distplat
import losses_of_mine


class Answers(dict):
    __getattr__ = dict.__getitem__


class Model(nn.Linear):
    settings = Answers(rate=1)


class Outside:
    @property
    def __class__(self):
        raise RuntimeError("outside of its context")

    __dict__ = __class__


class Tool:
    def scaled(self, task, loss):
        return loss * min(1.0, task.last)


tool, outside = Tool(), Outside()


class Base(distplat.Task):
    @functools.cached_property
    def kept(self):
        return self.of_kept

    @torch.no_grad()
    def decorated(self):
        return self.of_decorated

    @property
    def shown(self):
        return self.of_property


class Some(Base):
    def __init__(self):
        self.last, self.steps, self.settings = 0.0, 0, Answers(rate=1)
        self.of_property = self.of_kept = self.of_decorated = self.first = self.h1 = 0

    def model(self):
        return Model(4, 3)

    def train_data(self):
        return TensorDataset(torch.randn(16, 4), torch.randn(16, 3))

    def loss(self, outputs, targets):
        loss = F.mse_loss(outputs, targets)
"""
TAIL = """
        return loss


@torch.enable_grad()
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
    "beside another one": "self.last = loss.item(); getattr(self.settings, 'rate', self)",
    "beside a proxy": "self.last = loss.item(); outside",
}
READ = {
    "itself": "self.steps += 1",
    "a factor": "self.steps = self.steps + 1; loss = loss * min(1.0, self.steps / 9)",
    "by its name": 'self.last = loss.item(); loss = loss * getattr(self, "last")',
    "as one of all": "self.last = loss.item(); loss = loss * vars(self)['la' + 'st']",
    "by a function": "self.steps = 5; loss = scaled(self, loss)",
    "by another module's function": "self.last = 0.5; loss = losses_of_mine.scaled(self, loss)",
    "by a function inside": "self.last = 0.5; loss = (lambda: loss * self.last)()",
    "by an object's method": "self.last = 0.5; loss = tool.scaled(self, loss)",
    "by a function that is imported there": (
        "self.last = 0.5; from losses_of_mine import scaled; loss = scaled(self, loss)"
    ),
    "by one of several names": (
        "self.first = 5; loss = loss * sum(getattr(self, one) for one in ('first', 'steps'))"
    ),
    "by a name that is computed": "self.h1 = 5; loss = loss * getattr(self, f'h{self.steps + 1}')",
    "by a base's property": "self.of_property = 5",
    "by a base's cached property": "self.of_kept = 5",
    "by a decorated method": "self.of_decorated = 5",
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


class Answers(dict[str, Any]):
    __getattr__ = dict.__getitem__


class Keeps(Task):
    def __init__(self) -> None:
        self.settings = Answers(rate=1)

    def model(self) -> nn.Module:
        return nn.Linear(4, 4)

    def train_data(self) -> Any:
        return [(torch.ones(4), torch.zeros(4))] * 8

    eval_data = train_data

    def loss(self, outputs: Any, targets: Any) -> Any:
        return (outputs - targets).square().mean()

    def metrics(self, outputs: Any, targets: Any) -> Any:
        return {"error": self.loss(outputs, targets)}


def test_a_kept_dict_may_take_attributes_for_keys() -> None:
    run = train(job_of("ring", 1, steps=2, global_batch_size=4), Keeps)
    assert run.trained


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


def helped() -> type:
    def reads(other: Any) -> Any:
        return other.of_closure

    class Helped:
        def __call__(self) -> Any:
            return reads(self)

    return Helped


class Changes(nn.Dropout):
    """Its base reads `p`."""


class Matches:
    of_match: Any

    first = functools.partialmethod(lambda self: self.of_partial)

    def second(self) -> Any:
        match self:
            case Matches(of_match=found):
                return found


class Makes:
    def __call__(self) -> Any:
        class Made:
            __slots__ = ("of_slots",)

        self.of_slots = 1
        return Made()


def test_the_slots_of_a_class_are_no_reads() -> None:
    assert not AttributeReads([Makes()]).may_read(Makes(), f"of_{'slots'}")


def hooked() -> object:
    holder = Writes()
    holder.register_forward_hook(lambda self, *_: self.of_hook)
    return holder


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (helped(), "of_closure"),
        (Changes, "p"),
        (Matches, "of_partial"),
        (Matches, "of_match"),
        (hooked, "of_hook"),
    ],
)
def test_code_is_found_wherever_it_is(make: Callable[[], Any], name: str) -> None:
    holder = make()
    reads = AttributeReads([holder])
    assert reads.may_read(holder, name)
    assert not reads.may_read(holder, f"{name}_{'not'}")
