"""Samples and layers that draw from the global random number generators."""

import random
from typing import Any

import numpy as np
import torch
from jobs import job_of
from torch import Tensor, nn
from torch.utils.data import Dataset

import distplat
from distplat.platform.spec import Job
from distplat.strategies.task import Task

Draws = tuple[float, float, float, float]


def draws() -> Draws:
    """Draw from each global generator, and from a new generator seeded for the sample."""
    own = distplat.sample_rng()
    return torch.rand(()).item(), float(np.random.randn()), random.random(), own.random()


class Noise(Dataset[Any]):
    """Eleven samples: three steps of four, the last one short."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.tensor(draws(), dtype=torch.float64)


def job(world: int = 1, loaders: int = 0, accumulation: int = 1, **fields: Any) -> Job:
    defaults = {
        "epochs": 2,
        "gradient_accumulation": accumulation,
        "seed": 7,
        "data": {"num_workers": loaders, "shuffle": True},
    }
    # Some jobs have more ranks than samples per batch, which a job file must not have.
    return job_of(**{**defaults, **fields}).with_workers(world)


class Drops(nn.Linear):
    """Draws from all global generators in its forward."""

    def __init__(self) -> None:
        super().__init__(4, 1)
        self.drawn: list[Draws] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.drawn.append(draws())
        return super().forward(inputs)


class Dropping(Task):
    def __init__(self, noise: bool = True) -> None:
        self.noise = noise

    def model(self) -> nn.Module:
        return Drops()

    def train_data(self) -> Any:
        noisy = [(torch.zeros(4), torch.zeros(1))] * 11
        return Silent(noisy) if not self.noise else Noisy(noisy)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) ** 2).mean()


class Silent(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Noisy(Silent):
    def __getitem__(self, index: int) -> Any:
        draws()
        return super().__getitem__(index)
