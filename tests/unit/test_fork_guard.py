"""A child that a task forks, and that comes back from its code, does not train on."""

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

ENDED, WENT_ON = 1, 77
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def fork() -> int:
    """Fork; a child that hangs is ended by a signal."""
    child = os.fork()
    if not child:
        signal.alarm(60)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def go_on(*_: Any) -> None:
    """What a child must not come to."""
    os._exit(WENT_ON)


def returning() -> None:
    pass


def raising() -> None:
    raise ValueError("in the child")


@pytest.mark.parametrize("called", [returning, raising])
def test_a_fork_that_leaves_the_tasks_code_ends(
    called: Callable[[], None], capfd: pytest.CaptureFixture[str]
) -> None:
    process = ForkGuard()
    child = fork()
    if not child:
        try:
            with process:
                called()
        finally:
            go_on()
    assert status_of(child) == ENDED
    said = capfd.readouterr().err
    assert f"process {child}" in said and f"training process {os.getpid()}" in said


def test_the_process_itself_is_left_alone() -> None:
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
        self.called(torch.is_grad_enabled())
        return nn.functional.mse_loss(outputs, targets)

    def called(self, training: bool) -> None:
        """Overridden by those that fork."""


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("strategy", ["ring", "ps-async"])
def test_a_fork_that_a_loss_returns_in_ends(
    strategy: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[int] = []

    class Forking(Line):
        def called(self, training_now: bool) -> None:
            if training_now is training and not children:
                child = fork()
                if not child:  # in the parent both stay what they are
                    monkeypatch.setattr(Gradients, "before_backward", go_on)
                    monkeypatch.setattr(ModelState, "discard", go_on)
                children.append(child)

    job = job_of(strategy, 1, optimizer={"name": "SGD", "lr": 0.1}, steps=4)
    run = train(job, Forking)
    assert status_of(children[0]) == ENDED
    expected = train(job, Line)
    for one, other in zip(run.ranks, expected.ranks, strict=True):
        assert torch.equal(one.prepared.flat.params, other.prepared.flat.params)


class Counted:
    """A metric with state that counts its updates."""

    def __init__(self) -> None:
        self.total = torch.zeros(1)

    def reset(self) -> None:
        self.total = torch.zeros(1)

    def update(self) -> None:
        self.total = self.total + 1

    def merge(self, other: "Counted") -> None:
        self.total = self.total + other.total

    def compute(self) -> Tensor:
        return self.total.sum()


def test_a_fork_that_a_metric_returns_in_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[int] = []

    class Forking(Counted):
        def compute(self) -> Tensor:
            if not children:
                child = fork()
                if not child:
                    monkeypatch.setattr(WorkerStrategy, "synchronize", go_on)
                children.append(child)
            return super().compute()

    class Measured(Line):
        def __init__(self) -> None:
            self.counted = Forking()

        def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
            self.counted.update()
            return {"counted": self.counted}

    optimizer = {"name": "SGD", "lr": 0.1}
    train(job_of("ring", 1, optimizer=optimizer, steps=4, evaluation={"every_epochs": 0}), Measured)
    assert status_of(children[0]) == ENDED
