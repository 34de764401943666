"""State that a loss changes is named in a warning, and the loss still counts as a mean."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jobs import job_of
from local_run import train
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat.strategies.loop.loss_check import MeanCheck
from distplat.strategies.task import Task


class Small(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def train_data(self) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(1)
        sizes = (4, 3)
        tensors = (torch.randn(16, n, generator=generator, dtype=torch.float64) for n in sizes)
        return TensorDataset(*tensors)


class Plain(Small):
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return F.mse_loss(outputs, targets)


class CountsCalls(Plain):
    """Scales the loss by its number of calls."""

    def __init__(self) -> None:
        self.calls = 0

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        self.calls += 1
        return super().loss(outputs, targets) * min(1.0, self.calls / 9)


class KeepsCenter(Plain):
    """Keeps a moving average in a tensor attribute."""

    def __init__(self) -> None:
        self.center = torch.zeros(3, dtype=torch.float64)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        loss = super().loss(outputs - self.center, targets)
        self.center = 0.9 * self.center + outputs.detach().mean(0)
        return loss


class Centered(nn.Module):
    """A loss of self-supervised learning with a buffer and a counter."""

    center: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(3, dtype=torch.float64))
        self.seen = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = F.mse_loss(outputs - self.center, targets) / (1 + self.seen)
        self.seen += len(outputs)
        self.center.lerp_(outputs.detach().mean(0), 0.9)
        return loss


class Criterion(Plain):
    def __init__(self) -> None:
        self.parts = {"criterion": Centered()}

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        loss: Tensor = self.parts["criterion"](outputs, targets)
        return loss


class DataTeacher(Plain):
    """Updates a momentum teacher through `.data`."""

    def __init__(self) -> None:
        self.student = self.model()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        for parameter in self.teacher.parameters():
            parameter.data.mul_(0.9)
        return super().loss(outputs, targets)


class CountingModule(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.calls = body, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.body(x)


class CountingModel(Plain):
    def model(self) -> nn.Module:
        return CountingModule(super().model())


class CountingSum(CountsCalls):
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return super().loss(outputs, targets) * len(targets)


class Metric:
    def __init__(self) -> None:
        self.seen = 0

    def update(self, number: int) -> None:
        self.seen += number

    def compute(self) -> float:
        return float(self.seen)


class ModuleMetric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def update(self) -> None:
        self.get_buffer("seen").add_(1)

    def compute(self) -> float:
        return float(self.get_buffer("seen"))


class KeepsMetrics(Plain):
    """Keeps state without an effect on the loss: metrics and the last outputs."""

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.metric, self.metrics_of, self.name = Metric(), [ModuleMetric()], "run"

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        self.last = outputs.detach()
        self.metric.update(len(targets))
        self.metrics_of[0].update()
        return super().loss(outputs, targets)


def warnings_of(task: type[Task], caplog: pytest.LogCaptureFixture) -> list[str]:
    job = job_of("ring", 1, steps=4, global_batch_size=6, gradient_accumulation=2)
    train(job, task)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("task", "names"),
    [
        (CountsCalls, "a micro-batch changes self.calls: no checkpoint has it"),
        (KeepsCenter, "a micro-batch changes self.center: "),
        (Criterion, "self.parts.criterion.seen, self.parts.criterion.center: no checkpoint has "),
        (DataTeacher, "micro-batches change self.teacher.0.weight, "),
        (CountingModel, "a micro-batch changes the model's calls: "),
    ],
)
def test_changing_state_gives_one_warning(
    task: type[Task], names: str, caplog: pytest.LogCaptureFixture
) -> None:
    (text,) = warnings_of(task, caplog)
    assert names in text
    assert "buffer of what model() returns" in text


class CountsInStep(Small):
    def __init__(self) -> None:
        self.calls = 0

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return F.mse_loss(model(batch[0]), batch[1]) * min(1.0, self.calls / 9)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async", "hybrid"])
def test_step_is_checked_under_every_strategy(
    strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"pipeline": 1} if strategy == "hybrid" else {}
    job = job_of({"name": strategy, **sizes}, 1, steps=2, global_batch_size=6)
    train(job, CountsInStep)
    (text,) = [record.getMessage() for record in caplog.records]
    assert "changes self.calls: " in text


def test_counting_sum_gives_both_warnings(caplog: pytest.LogCaptureFixture) -> None:
    state, mean = warnings_of(CountingSum, caplog)
    assert "self.calls" in state
    assert "It is a sum" in mean


def test_state_without_effect_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(KeepsMetrics, caplog) == []


def test_check_does_not_change_the_state() -> None:
    counts, weights = [], {}
    for is_checked in (True, False):
        with pytest.MonkeyPatch.context() as patched:
            if not is_checked:
                patched.setattr(MeanCheck, "begin", lambda self, step: None)
                patched.setattr(MeanCheck, "look", lambda self, step, result, size: None)
            run = train(job_of("ring", 1, steps=4, global_batch_size=6), Criterion)
        task: Any = run.ranks[0].prepared.task
        counts.append((task.parts["criterion"].seen, task.parts["criterion"].center.sum().item()))
        weights[is_checked] = run.trained[0]
    assert counts[0] == counts[1]
    assert all(torch.equal(value, weights[False][name]) for name, value in weights[True].items())


class Recurrent(Small):
    """Continues with the hidden state of the previous micro-batch."""

    def __init__(self) -> None:
        self.state: Any = None

    def model(self) -> nn.Module:
        return nn.LSTM(4, 3).double()

    def step(self, model: nn.Module, batch: Any) -> Any:
        outputs, state = model(batch[0].unsqueeze(0)[:, :2], self.state)
        self.state = tuple(tensor.detach() for tensor in state)
        return F.mse_loss(outputs[0], batch[1][:2])


class ScaledLoss(Plain):
    """Divides by a moving average of losses, created in the first call."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        loss = super().loss(outputs, targets)
        before = getattr(self, "scale", loss.detach())
        self.scale = 0.9 * before + 0.1 * loss.detach()
        return loss / self.scale


class SparseScale(Plain):
    """Changes the layout of its scale in the second micro-batch; `notes` contains itself."""

    def __init__(self) -> None:
        self.scale: Any = None
        self.notes: Any = None

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        if self.scale is None:
            self.scale, self.notes = torch.ones(3, 3, dtype=torch.float64), [outputs.detach()]
            self.notes.append(self.notes)
            return super().loss(outputs, targets)
        loss = super().loss(outputs @ self.scale, targets)
        self.scale = self.scale.to_dense().to_sparse()
        return loss


class MovingTeacher(Small):
    """Creates a teacher in its first step, which then follows the model."""

    rate = 0.1

    def __init__(self) -> None:
        self.teacher: Any = None

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        if self.teacher is None:
            self.teacher = copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            pairs = zip(model.parameters(), self.teacher.parameters(), strict=True)
            for parameter, average in pairs if self.rate else ():
                average.lerp_(parameter, self.rate)
        outputs = model(batch[0])
        return F.mse_loss(outputs, batch[1]) + F.mse_loss(outputs, self.teacher(batch[0]))


class FixedTeacher(MovingTeacher):
    """Its teacher does not change."""

    rate = 0.0


class KeepsOutputs(Plain):
    """Keeps state without an effect: the last outputs, and constants created once."""

    def __init__(self) -> None:
        self.outputs: Any = None
        self.mask: Any = None
        self.sums: Any = None

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        self.outputs = outputs.detach()
        if self.mask is None:
            self.mask = torch.ones(3, dtype=torch.float64)
            self.sums = torch.eye(3, dtype=torch.float64).to_sparse()
        return super().loss((outputs * self.mask) @ self.sums, targets)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (Recurrent, "changes self.state:"),
        (ScaledLoss, "changes self.scale:"),
        (SparseScale, "changes self.scale"),
        (MovingTeacher, "changes self.teacher:"),
        (FixedTeacher, ""),
        (KeepsOutputs, ""),
    ],
)
def test_state_created_in_the_first_micro_batch_is_named(
    task: type[Task], expected: str, parts: int, caplog: pytest.LogCaptureFixture
) -> None:
    train(job_of("ring", 1, global_batch_size=8, gradient_accumulation=parts), task)
    assert expected in caplog.text and caplog.text.count("no checkpoint has it") == bool(expected)
