"""A model whose forward writes a moving average of its weights."""

import copy
from typing import Any

import torch
from jobs import job_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.spec import Job
from distplat.strategies.task import Task

SAMPLES, BATCH = 25, 8
STEPS = 8
WIDE = torch.float64
SGD = {"name": "SGD", "lr": 0.1, "momentum": 0.9}


class Data(Task):
    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(SAMPLES, 6, generator=generator, dtype=WIDE)
        return TensorDataset(x, torch.randn(SAMPLES, 3, generator=generator, dtype=WIDE))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()


def job(strategy: str | dict[str, Any], world: int, **more: Any) -> Job:
    fields = {"optimizer": SGD, "steps": STEPS, "global_batch_size": BATCH, **more}
    return job_of(strategy, world, **fields)


class Teacher(nn.Module):
    """A student and its moving average, which the forward uses."""

    forwards: Tensor

    def __init__(self, update: str, first_update: int = 0) -> None:
        super().__init__()
        self.update, self.first_update = update, first_update
        self.student = nn.Linear(6, 3, dtype=WIDE)
        self.teacher = copy.deepcopy(self.student).requires_grad_(requires_grad=False)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        if self.training and self.forwards > self.first_update:
            self._follow()
        outputs: Tensor = self.student(x) - 0.5 * self.teacher(x)
        return outputs

    @torch.no_grad()
    def _follow(self) -> None:
        pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
        for own, slow in pairs:
            if self.update == "in place":
                slow.mul_(0.7).add_(own, alpha=0.3)
            elif self.update == "data in place":
                slow.data.mul_(0.7).add_(own.data, alpha=0.3)
            else:
                slow.data = slow.data * 0.7 + own.data * 0.3
