"""A task and its samples, read from a stream."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from jobs import job_of
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.spec import Job
from distplat.strategies.loop.batches import make_sampler, micro_batches
from distplat.strategies.loop.checks import checked_data
from distplat.strategies.loop.streams import StreamSamples
from distplat.strategies.task import Task

SAMPLES, BATCH = 37, 9
SGD = {"name": "SGD", "lr": 0.1, "momentum": 0.9}


def tensors(count: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 5, generator=generator)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


class MapStyleTask(Task):
    """A task with an indexed dataset."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def train_data(self) -> Any:
        return TensorDataset(*tensors())

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


def job(strategy: Any = "ring", workers: int = 1, **fields: Any) -> Job:
    length = {} if "steps" in fields else {"epochs": 3}
    fields = {"optimizer": SGD, "global_batch_size": BATCH, "seed": 5, **length, **fields}
    return job_of(strategy, workers, **{"data": {"shuffle": False}, **fields})


def open_stream(source: Any, **fields: Any) -> StreamSamples:
    """Open a source as a task's training data."""
    samples = checked_data(job(**fields), MapStyleTask(), source, "train_data")
    assert isinstance(samples, StreamSamples)
    return samples


def read_steps(source: Any, world: int = 1, parts: int = 1, **fields: Any) -> list[list[Any]]:
    """Return the samples of each step over all ranks."""
    spec = job(workers=world, gradient_accumulation=parts, **fields)
    data = open_stream(source, **fields)
    sampler, steps = make_sampler(spec, data), range(spec.steps or 15)
    samples: list[list[Any]] = [[] for _ in steps]
    for rank in range(world):
        batches = micro_batches(spec, data, sampler, rank, steps, parts)
        for step in steps:
            for _ in sampler.micro_batches(step, rank, parts):
                random.random(), torch.rand(rank + 1)  # other ranks draw random numbers, too
                samples[step] += next(batches).tolist()
    return samples


def iterable_of(*columns: Tensor) -> Any:
    class Pairs:
        """A re-iterable object that is not an `IterableDataset`."""

        def __iter__(self) -> Iterator[Any]:
            return zip(*columns, strict=True)

    return Pairs()
