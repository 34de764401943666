"""
A task whose gradients depend on no parameter, and whose sums are exact in float32.

So what a run comes to tells, to the bit and in whatever order updates were made, whether each
sample's gradient was applied as often as it should be.
"""

import os
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task
from distplat.nn import ShardedEmbedding

SAMPLES, BATCH, ROWS, WIDTH = 32, 8, 12, 4
RATE = 0.5


class Net(nn.Module):
    """Rows and a vector, each times what the sample says."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = ShardedEmbedding(ROWS, WIDTH, init_std=0.0)
        self.dense = nn.Parameter(torch.zeros(6))

    def forward(self, inputs: Tensor) -> Tensor:
        ids, factors = inputs[:, :2].long(), inputs[:, 2:]
        # Clones, for a gradient that is one value for many elements has no memory of its own.
        return (self.rows(ids).sum((1, 2)) + self.dense.clone().sum()) * factors[:, 0]  # type: ignore[no-any-return]


class Exact(Task):
    """Two ids and a small whole factor for each sample."""

    def model(self) -> nn.Module:
        return Net()

    def train_data(self) -> Dataset[Any]:
        numbers = torch.arange(SAMPLES)
        columns = [numbers * 7 % ROWS, numbers * 5 % ROWS, numbers % 5 + 1]
        return TensorDataset(torch.stack(columns, 1).float(), torch.zeros(SAMPLES))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()


def expected(epochs: int, world: int = 1) -> tuple[NDArray[np.float32], float]:
    """
    Give what each row's elements come to, shape [ROWS], and those of the vector.

    Args:
        epochs: of the run.
        world: ranks that make an update of their own each; 1: updates are of all ranks.
    """
    rows = np.zeros(ROWS, np.float32)
    for number in range(SAMPLES):
        for row in (number * 7 % ROWS, number * 5 % ROWS):
            rows[row] += number % 5 + 1
    factors = sum(number % 5 + 1 for number in range(SAMPLES))
    scale = np.float32(-RATE * epochs / BATCH)
    return rows * scale, -RATE * epochs * factors * world / BATCH


class Paced(Exact):
    """Takes its time over each step until a file is there, so that something can happen before."""

    def __init__(self, until: str, seconds: float) -> None:
        self.until, self.seconds = until, seconds

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not os.path.exists(self.until):
            time.sleep(self.seconds)
        return super().loss(outputs, targets)
