"""
The tasks of the soak in memory: they tell whoever listens of each moment that a worker gets to.

Ranks are threads and share torch's generator: nothing here draws from it.
"""

from collections.abc import Callable
from typing import Any

import torch
from ray_in_memory import process_here
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task
from distplat.nn import ShardedEmbedding

SAMPLES, IDS = 48, 23
heard: Callable[[str, str], None] = lambda moment, who: None  # noqa: E731
"""Told of a moment, and which process has got there."""


def reach(moment: str) -> None:
    """Tell of a moment; does not return in a process that is killed there."""
    process = process_here()
    if process is not None:  # else it is `distplat replay`
        process.check()
        heard(moment, process.name)
        process.check()


class Dense(Task):
    """
    A small classifier.

    Args:
        stateful: whether layers keep buffers.
    """

    def __init__(self, stateful: bool = True) -> None:
        self.stateful = stateful

    def model(self) -> nn.Module:
        reach("model")
        inner = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
        layers = [nn.Linear(5, 16), Block(self.stateful), inner, Block(self.stateful)]
        return filled(nn.Sequential(*layers, nn.Linear(16, 3)))

    def train_data(self) -> Dataset[Any]:
        reach("data")
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(SAMPLES, 5, generator=generator)
        return TensorDataset(inputs, torch.randint(0, 3, (SAMPLES,), generator=generator))

    def eval_data(self) -> Dataset[Any] | None:
        return self.train_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


class Rows(Dense):
    """The same of ids, whose rows are on servers."""

    def model(self) -> nn.Module:
        reach("model")
        table = ShardedEmbedding(IDS, 4, init_std=0.3)
        layers = [nn.Flatten(), nn.Linear(12, 16), Block(self.stateful), nn.Linear(16, 3)]
        return nn.Sequential(table, filled(nn.Sequential(*layers)))

    def train_data(self) -> Dataset[Any]:
        reach("data")
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, IDS, (SAMPLES, 3), generator=generator)
        return TensorDataset(ids, torch.randint(0, 3, (SAMPLES,), generator=generator))


class Block(nn.Module):
    """Layers that may keep state; tells of each forward and backward."""

    def __init__(self, stateful: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16) if stateful else nn.LayerNorm(16)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = torch.tanh(self.norm(inputs))
        reach("forward" if self.training else "evaluation")
        if outputs.requires_grad:
            outputs.register_hook(lambda _: reach("backward"))  # type: ignore[no-untyped-call]
        return outputs


def filled(model: nn.Module) -> nn.Module:
    """Fill the parameters with what is the same in every process."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model
