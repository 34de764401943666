"""
A task whose trained model counts how often a gradient of each sample was applied.

The loss is linear, so gradients do not depend on values, and all numbers are exact in float32:
results do not depend on the order of updates or on the ranks that computed them.
"""

import os
import time
from typing import Any

import torch
from jobs import fields_of
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task
from distplat.nn import ShardedEmbedding

SAMPLES, BATCH, WIDTH, PARTS = 32, 8, 2, 2


class Tally(nn.Module):
    """Each gradient of sample i decreases row i of the table and element i of `dense` by 1."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = ShardedEmbedding(SAMPLES, WIDTH, init_std=0.0)
        self.dense = nn.Parameter(torch.zeros(SAMPLES))

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids).sum(1) + self.dense[ids]  # type: ignore[no-any-return]


class Counting(Task):
    """
    One sample per row.

    Args:
        until: file; each task sleeps until it exists. Empty: tasks do not sleep.
        seconds: duration of a sleep.
    """

    def __init__(self, until: str = "", seconds: float = 0.0) -> None:
        self.until, self.seconds = until, seconds

    def model(self) -> nn.Module:
        return Tally()

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(torch.arange(SAMPLES), torch.zeros(SAMPLES))

    def eval_data(self) -> None:
        return None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.until and not os.path.exists(self.until):
            time.sleep(self.seconds)
        return outputs.mean()


def counting_fields(parts: int = PARTS, **more: Any) -> dict[str, Any]:
    fields = {
        "name": "counting",
        "strategy": {"name": "ps-async", "num_servers": 2},
        # The weight of a sample is 1/batch in its rows, and parts/batch in `dense`.
        "optimizer": {"name": "SGD", "lr": BATCH / max(1, parts)},
        "embeddings": {
            "servers": 2,
            "asynchronous": True,
            "optimizer": {"name": "SGD", "lr": float(BATCH)},
        },
        "global_batch_size": BATCH,
        "epochs": 3,
    }
    return fields_of(workers=parts, **{**fields, **more})
