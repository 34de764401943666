"""A task with embeddings on servers: few rows, each used by many samples."""

import os
import signal
import time
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task
from distplat.nn import ShardedEmbedding, ShardedEmbeddingBag

ROWS, WIDTH = 40, 6


class Net(nn.Module):
    """A table used twice in one forward, a bag with padding, and a dense layer."""

    def __init__(self, words: nn.Module, tags: nn.Module) -> None:
        super().__init__()
        self.words, self.tags = words, tags
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, ids: Tensor) -> Tensor:
        first = self.words(ids[:, :3]).mean(1) - self.words(ids[:, 1])
        return self.head(torch.cat([first, self.tags(ids[:, 2:])], 1))  # type: ignore[no-any-return]


class Words(Task):
    """37 samples of six ids with many repeats: parts of a batch are uneven, ids are shared."""

    def model(self) -> nn.Module:
        return Net(
            ShardedEmbedding(ROWS, WIDTH), ShardedEmbeddingBag(ROWS, WIDTH, "sum", padding_idx=0)
        )

    def train_data(self) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, ROWS, (37, 6), generator=generator) % 23
        return TensorDataset(ids, torch.randint(0, 3, (37,), generator=generator))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def eval_data(self) -> TensorDataset:
        ids = torch.arange(ROWS - 12, ROWS).view(2, 6)  # never trained
        return TensorDataset(ids, torch.zeros(2, dtype=torch.int64))


def process_of(role: str) -> int:
    """Find the process of an actor of this Ray instance."""
    for process in psutil.Process().parent().children():  # type: ignore[union-attr]
        if " ".join(process.cmdline()).startswith(f"ray::{role}"):
            return process.pid
    raise LookupError(role)


class Deadly(Words):
    """
    Kills a process once.

    Args:
        marker: file created by the first process that kills.
        at: number of the loss call that kills; 0: none.
        victim: actor class; one of its actors is killed. Empty: the calling process.
        pause: minimum duration of each loss call, in seconds.
    """

    def __init__(self, marker: str, at: int, victim: str = "", pause: float = 0.0) -> None:
        self.marker, self.at, self.calls = marker, at, 0
        self.victim, self.pause = victim, pause

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(self.pause)
        if self.calls == self.at:
            try:
                os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os.kill(process_of(self.victim) if self.victim else os.getpid(), signal.SIGKILL)
        return super().loss(outputs, targets)
