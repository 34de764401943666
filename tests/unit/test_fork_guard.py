"""Fork guard: a child process forked in a task's code exits and does not continue training."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import train
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task
from distplat.platform.fork_guard import ForkGuard
from distplat.strategies.model.gradients import Gradients
from distplat.strategies.model.model_state import ModelState
from distplat.strategies.worker_strategy import WorkerStrategy

ENDED, CONTINUED = 1, 77
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def fork() -> int:
    """Fork; an alarm ends a child that hangs."""
    child = os.fork()
    if not child:
        signal.alarm(60)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fail_in_child(*_: Any) -> None:
    """Exit with the status of a child that continued training."""
    os._exit(CONTINUED)


def returning() -> None:
    pass


def raising() -> None:
    raise ValueError("in the child")


@pytest.mark.parametrize("function", [returning, raising])
def test_child_that_leaves_the_task_code_exits(
    function: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    guard = ForkGuard()
    child = fork()
    if not child:
        try:
            with guard:
                function()
        finally:
            fail_in_child()
    assert status_of(child) == ENDED
    error_text = capfd.readouterr().err
    assert f"process {child}" in error_text and f"training process {os.getpid()}" in error_text


def test_parent_continues() -> None:
    with ForkGuard():
        pass
    with pytest.raises(ValueError, match="in the child"), ForkGuard():
        raising()


class Line(Task):
    def model(self) -> nn.Module:
        return nn.Linear(3, 1)

    def train_data(self) -> Dataset[Any]:
        inputs = torch.arange(36.0).view(12, 3) / 36
        return TensorDataset(inputs, inputs.sum(1, keepdim=True))

    def eval_data(self) -> Dataset[Any]:
        return self.train_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.on_loss(torch.is_grad_enabled())
        return nn.functional.mse_loss(outputs, targets)

    def on_loss(self, training: bool) -> None:
        """Overridden by tasks that fork."""


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("strategy", ["ring", "ps-async"])
def test_child_forked_in_loss_exits(
    strategy: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[int] = []

    class Forking(Line):
        def on_loss(self, training_now: bool) -> None:
            if training_now is training and not children:
                child = fork()
                if not child:  # patched in the child only
                    monkeypatch.setattr(Gradients, "before_backward", fail_in_child)
                    monkeypatch.setattr(ModelState, "discard", fail_in_child)
                children.append(child)

    job = job_of(strategy, 1, optimizer={"name": "SGD", "lr": 0.1}, steps=4)
    run = train(job, Forking)
    assert status_of(children[0]) == ENDED
    expected = train(job, Line)
    for rank, reference in zip(run.ranks, expected.ranks, strict=True):
        assert torch.equal(rank.prepared.flat.params, reference.prepared.flat.params)


class UpdateCount:
    """A stateful metric that counts its updates."""

    def __init__(self) -> None:
        self.total = torch.zeros(1)

    def reset(self) -> None:
        self.total = torch.zeros(1)

    def update(self) -> None:
        self.total = self.total + 1

    def merge(self, other: "UpdateCount") -> None:
        self.total = self.total + other.total

    def compute(self) -> Tensor:
        return self.total.sum()


def test_child_forked_in_a_metric_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[int] = []

    class ForkingMetric(UpdateCount):
        def compute(self) -> Tensor:
            if not children:
                child = fork()
                if not child:
                    monkeypatch.setattr(WorkerStrategy, "synchronize", fail_in_child)
                children.append(child)
            return super().compute()

    class Measured(Line):
        def __init__(self) -> None:
            self.counted = ForkingMetric()

        def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
            self.counted.update()
            return {"counted": self.counted}

    optimizer = {"name": "SGD", "lr": 0.1}
    train(job_of("ring", 1, optimizer=optimizer, steps=4, evaluation={"every_epochs": 0}), Measured)
    assert status_of(children[0]) == ENDED
