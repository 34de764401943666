"""What a loss counts in is told by name, and is no reason to call it no mean."""

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
        draw = torch.Generator().manual_seed(1)
        sizes = (4, 3)
        tensors = (torch.randn(16, n, generator=draw, dtype=torch.float64) for n in sizes)
        return TensorDataset(*tensors)


class Plain(Small):
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return F.mse_loss(outputs, targets)


class Counts(Plain):
    """Warms up by a number of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        self.calls += 1
        return super().loss(outputs, targets) * min(1.0, self.calls / 9)


class Centers(Plain):
    """Keeps a moving average in a tensor."""

    def __init__(self) -> None:
        self.center = torch.zeros(3, dtype=torch.float64)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        found = super().loss(outputs - self.center, targets)
        self.center = 0.9 * self.center + outputs.detach().mean(0)
        return found


class Centered(nn.Module):
    """A loss as self-supervised learning has it: with a buffer, and a number."""

    center: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(3, dtype=torch.float64))
        self.seen = 0

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        found = F.mse_loss(outputs - self.center, targets) / (1 + self.seen)
        self.seen += len(outputs)
        self.center.lerp_(outputs.detach().mean(0), 0.9)
        return found


class Criterion(Plain):
    def __init__(self) -> None:
        self.parts = {"criterion": Centered()}

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        found: Tensor = self.parts["criterion"](outputs, targets)
        return found


class Teacher(Plain):
    """Has a momentum teacher of its own, which it writes through `.data`."""

    def __init__(self) -> None:
        self.student = self.model()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        for parameter in self.teacher.parameters():
            parameter.data.mul_(0.9)
        return super().loss(outputs, targets)


class Stepping(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.calls = body, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.body(x)


class Counted(Plain):
    def model(self) -> nn.Module:
        return Stepping(super().model())


class SumThatCounts(Counts):
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return super().loss(outputs, targets) * len(targets)


class Metric:
    def __init__(self) -> None:
        self.seen = 0

    def update(self, number: int) -> None:
        self.seen += number

    def compute(self) -> float:
        return float(self.seen)


class KeptMetric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def update(self) -> None:
        self.get_buffer("seen").add_(1)

    def compute(self) -> float:
        return float(self.get_buffer("seen"))


class Watching(Plain):
    """Keeps what nothing depends on: a metric, the last outputs."""

    def __init__(self) -> None:
        self.last: Tensor | None = None
        self.metric, self.metrics_of, self.name = Metric(), [KeptMetric()], "run"

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        self.last = outputs.detach()
        self.metric.update(len(targets))
        self.metrics_of[0].update()
        return super().loss(outputs, targets)


def told(task: type[Task], caplog: pytest.LogCaptureFixture) -> list[str]:
    job = job_of("ring", 1, steps=4, global_batch_size=6, gradient_accumulation=2)
    train(job, task)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("task", "names"),
    [
        (Counts, "a micro-batch changes self.calls: no checkpoint has it"),
        (Centers, "a micro-batch changes self.center: "),
        (Criterion, "self.parts.criterion.seen, self.parts.criterion.center: no checkpoint has "),
        (Teacher, "micro-batches change self.teacher.0.weight, "),
        (Counted, "a micro-batch changes the model's calls: "),
    ],
)
def test_it_is_told_once_and_the_loss_is_a_mean_all_the_same(
    task: type[Task], names: str, caplog: pytest.LogCaptureFixture
) -> None:
    (text,) = told(task, caplog)
    assert names in text
    assert "buffer of what model() returns" in text


class CountsInStep(Small):
    def __init__(self) -> None:
        self.calls = 0

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return F.mse_loss(model(batch[0]), batch[1]) * min(1.0, self.calls / 9)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "ps-async", "hybrid"])
def test_under_every_strategy_a_step_is_looked_at(
    strategy: str, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"pipeline": 1} if strategy == "hybrid" else {}
    job = job_of({"name": strategy, **sizes}, 1, steps=2, global_batch_size=6)
    train(job, CountsInStep)
    (text,) = [record.getMessage() for record in caplog.records]
    assert "changes self.calls: " in text


def test_a_sum_that_counts_is_told_of_both(caplog: pytest.LogCaptureFixture) -> None:
    state, mean = told(SumThatCounts, caplog)
    assert "self.calls" in state
    assert "It is a sum" in mean


def test_what_nothing_depends_on_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert told(Watching, caplog) == []


def test_the_look_leaves_it_as_it_is() -> None:
    counts, found = [], {}
    for looks in (True, False):
        with pytest.MonkeyPatch.context() as patched:
            if not looks:
                patched.setattr(MeanCheck, "begin", lambda self, step: None)
                patched.setattr(MeanCheck, "look", lambda self, step, made, size: None)
            run = train(job_of("ring", 1, steps=4, global_batch_size=6), Criterion)
        task: Any = run.ranks[0].prepared.task
        counts.append((task.parts["criterion"].seen, task.parts["criterion"].center.sum().item()))
        found[looks] = run.trained[0]
    assert counts[0] == counts[1]
    assert all(torch.equal(value, found[False][name]) for name, value in found[True].items())


class Recurrent(Small):
    """Goes on with the hidden state of the micro-batch before, at first without."""

    def __init__(self) -> None:
        self.state: Any = None

    def model(self) -> nn.Module:
        return nn.LSTM(4, 3).double()

    def step(self, model: nn.Module, batch: Any) -> Any:
        outputs, state = model(batch[0].unsqueeze(0)[:, :2], self.state)
        self.state = tuple(one.detach() for one in state)
        return F.mse_loss(outputs[0], batch[1][:2])


class Scaled(Plain):
    """Divides by a moving average of the losses."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        found = super().loss(outputs, targets)
        before = getattr(self, "scale", found.detach())
        self.scale = 0.9 * before + 0.1 * found.detach()
        return found / self.scale


class Sparse(Plain):
    """Has a scale of another layout in its second micro-batch, and what holds itself."""

    def __init__(self) -> None:
        self.scale: Any = None
        self.notes: Any = None

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        if self.scale is None:
            self.scale, self.notes = torch.ones(3, 3, dtype=torch.float64), [outputs.detach()]
            self.notes.append(self.notes)
            return super().loss(outputs, targets)
        found = super().loss(outputs @ self.scale, targets)
        self.scale = self.scale.to_dense().to_sparse()
        return found


class Follows(Small):
    """Makes a teacher in its first step, which then follows the model."""

    rate = 0.1

    def __init__(self) -> None:
        self.teacher: Any = None

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        if self.teacher is None:
            self.teacher = copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            pairs = zip(model.parameters(), self.teacher.parameters(), strict=True)
            for one, its in pairs if self.rate else ():
                its.lerp_(one, self.rate)
        outputs = model(batch[0])
        return F.mse_loss(outputs, batch[1]) + F.mse_loss(outputs, self.teacher(batch[0]))


class Stands(Follows):
    """Has one that stays as it was."""

    rate = 0.0


class Shows(Plain):
    """Keeps what nothing depends on: the last batch, and a mask that is made once."""

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


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("task", "told"),
    [
        (Recurrent, "changes self.state:"),
        (Scaled, "changes self.scale:"),
        (Sparse, "changes self.scale"),
        (Follows, "changes self.teacher:"),
        (Stands, ""),
        (Shows, ""),
    ],
)
def test_state_that_begins_with_the_first_micro_batch_is_told(
    task: type[Task], told: str, parts: int, caplog: pytest.LogCaptureFixture
) -> None:
    train(job_of("ring", 1, global_batch_size=8, gradient_accumulation=parts), task)
    assert told in caplog.text and caplog.text.count("no checkpoint has it") == bool(told)
