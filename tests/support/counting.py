"""
A task whose trained model counts what was applied: how often a gradient of each sample.

The loss is linear, so gradients depend on no value, and every number is exact in float32: neither
the order of updates nor who made them changes a bit.
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
    """Row i of a table and element i of the dense part fall by 1 with each gradient of sample i."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = ShardedEmbedding(SAMPLES, WIDTH, init_std=0.0)
        self.dense = nn.Parameter(torch.zeros(SAMPLES))

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids).sum(1) + self.dense[ids]  # type: ignore[no-any-return]


class Counting(Task):
    """
    As many samples as rows.

    Args:
        until: takes its time over each task until this file is there; empty: never.
        seconds: this much.
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


def counting(parts: int = PARTS, **more: Any) -> dict[str, Any]:
    fields = {
        "name": "counting",
        "strategy": {"name": "ps-async", "num_servers": 2},
        # A sample weighs 1/batch in its rows, and that times the parts of a step elsewhere.
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
