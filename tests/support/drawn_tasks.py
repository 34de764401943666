"""Blocks with special properties, and a task with random blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jobs import job_of
from torch import Tensor, nn
from torch.utils.data import Dataset

from distplat.platform.spec import Job
from distplat.strategies.task import Task

WIDTH, CLASSES = 4, 3


class Plain(nn.Sequential):
    """An ordinary layer."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Tanh())


class Quiet(nn.Module):
    """A block without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.left(x)) * self.right(x)
        return out


class Shared(nn.Module):
    """Two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.once = nn.Linear(WIDTH, WIDTH)
        self.again = nn.Linear(WIDTH, WIDTH)
        self.again.weight = self.once.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.again(torch.tanh(self.once(x))))


class Unused(Plain):
    """A layer that is not called, so its parameters have no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self[0](x))
        return out


class ZeroGradient(Plain):
    """A layer whose gradient is exactly zero: momentum and weight decay still change it."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(x) + 0.0 * self[0](x)
        return out


class Frozen(nn.Module):
    """A frozen layer, and a layer with a frozen bias."""

    def __init__(self) -> None:
        super().__init__()
        self.still = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.partly = nn.Linear(WIDTH, WIDTH)
        self.partly.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.partly(self.still(x)))


class Views(nn.Module):
    """Parts of one tensor, used in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        top, bottom = self.weight[:WIDTH], self.weight[WIDTH:]
        return torch.tanh(x @ top.t()) + x @ bottom


class Experts(nn.Module):
    """Routes each sample to one of two layers; a layer without samples is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for mine, expert in ((x[:, 0] > 0.7, self.high), (x[:, 0] <= 0.7, self.low)):
            if mine.any():
                out = out.index_put((mine.nonzero()[:, 0],), expert(x[mine]))
        return torch.tanh(out)


class Sometimes(nn.Module):
    """A layer that is used in every third call."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.rare = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        out = self.always(x)
        if self.training:
            out = out + self.rare(x) if self.calls % 3 == 1 else out
            self.calls += 1
        return torch.tanh(out)


class Unfrozen(nn.Module):
    """A layer that is frozen for two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.late.requires_grad_(self.calls >= 2)
            self.calls += 1
        return torch.tanh(self.late(x)) + x


class Remembers(nn.Module):
    """A running mean that each call updates and uses, and a counter."""

    mean: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                self.calls += 1
        return x - self.mean


class Counts(nn.Module):
    """A buffer that counts calls, and scales the output; equal on all called ranks."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x * (1 + 0.1 * self.calls)


class Teacher(nn.Module):
    """A frozen layer with a moving average of a trained layer."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(WIDTH, WIDTH)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
                for student, teacher in pairs:
                    teacher.mul_(0.7).add_(student, alpha=0.3)
        return torch.tanh(self.student(x) - 0.5 * self.teacher(x))


class Bounded(nn.Module):
    """A parameter that the forward clamps in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.inner.weight.data.clamp_(-0.4, 0.4)
        return torch.tanh(self.inner(x))


class Narrow(nn.Module):
    """A layer of another dtype than the rest of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x.to(self.inner.weight.dtype))).to(x.dtype)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "quiet": Quiet,
    "branches": Branches,
    "shared": Shared,
    "unused": Unused,
    "zero": ZeroGradient,
    "frozen": Frozen,
    "views": Views,
    "experts": Experts,
    "sometimes": Sometimes,
    "unfrozen": Unfrozen,
    "remembers": Remembers,
    "counts": Counts,
    "teacher": Teacher,
    "bounded": Bounded,
    "narrow": Narrow,
}


@dataclass(frozen=True)
class DrawnRun:
    """A random training run."""

    blocks: tuple[str, ...] = ("plain",)
    form: str = "tensor"
    """Form of a batch's inputs: `tensor`, `dict` or `tuple`."""
    narrow: str = "float32"
    """Dtype of the blocks of lower precision."""
    weighted: bool = False
    """Whether the loss returns its sum and its weight."""
    optimizer: dict[str, Any] = field(default_factory=lambda: {"name": "SGD", "lr": 0.1})
    lr_schedule: dict[str, Any] = field(default_factory=lambda: {"name": "constant"})
    clip_norm: float | None = None
    accumulation: int = 1
    strategy: str = "ring"
    options: dict[str, Any] = field(default_factory=dict)
    workers: int = 2
    samples: int = 11
    batch: int = 5
    steps: int = 6

    def job(self) -> Job:
        """Return the job, with a checkpoint after every step."""
        cuts = self.strategy == "hybrid"
        return job_of(
            {"name": self.strategy, **self.options},
            self.workers,
            optimizer=self.optimizer,
            lr_schedule=self.lr_schedule,
            clip_norm=self.clip_norm,
            gradient_accumulation=1 if cuts else self.accumulation,
            steps=self.steps,
            global_batch_size=self.batch,
            seed=3,
            checkpoint={"every_steps": 1, "num_to_keep": 99},
            evaluation={"every_epochs": 0},
        )

    def task(self) -> type[Task]:
        """Return the task's class."""
        drawn = self

        class DrawnTask(Task):
            def model(self) -> nn.Module:
                return build(drawn)

            def train_data(self) -> Dataset[Any]:
                return Samples(drawn.samples, drawn.form)

            def loss(self, outputs: Any, targets: Any) -> Any:
                losses = nn.functional.cross_entropy(outputs, targets, reduction="none")
                if not drawn.weighted:
                    return losses.mean()
                weights = 1.0 + targets.double()
                return (losses * weights).sum(), weights.sum()

        return DrawnTask


class Samples(Dataset[Any]):
    """Random samples of three classes, in one of three forms."""

    def __init__(self, count: int, form: str) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
        self.y = torch.randint(0, CLASSES, (count,), generator=generator)
        self.form = form

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        x, y = self.x[index], int(self.y[index])
        if self.form == "dict":
            return {"x": x, "number": index}, y
        return ((x, index), y) if self.form == "tuple" else (x, y)


class Unpack(nn.Module):
    """Returns the tensor of a batch's inputs."""

    def forward(self, inputs: Any) -> Tensor:
        found = inputs["x"] if isinstance(inputs, dict) else inputs
        x: Tensor = found[0] if isinstance(found, list | tuple) else found
        return x


def build(drawn: DrawnRun) -> nn.Module:
    """Build the model, in float64 except for blocks of lower precision."""
    layers = [BLOCKS[name]() for name in drawn.blocks]
    first = [] if drawn.form == "tensor" else [Unpack()]
    model = nn.Sequential(*first, *layers, nn.Linear(WIDTH, CLASSES)).double()
    for module in model.modules():
        if isinstance(module, Narrow):
            module.to(getattr(torch, drawn.narrow))
    return model
