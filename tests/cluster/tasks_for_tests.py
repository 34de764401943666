"""Tasks that the cluster tests train, importable by the workers."""

import os
import signal
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task


class Blobs(Task):
    """37 samples in 5 dimensions, 3 classes: a last batch that is short, parts that are uneven."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def train_data(self) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(37, 5, generator=generator)
        return TensorDataset(inputs, torch.randint(0, 3, (37,), generator=generator))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def eval_data(self) -> Dataset[Any] | None:
        return self.train_data()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(-1) == targets).float().mean()}


def first_to_come(marker: str) -> bool:
    """Say whether no other process has asked yet."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class SlowStart(Blobs):
    """Takes its time over the data, in the process that gets there first."""

    def __init__(self, marker: str, seconds: float) -> None:
        self.marker, self.seconds = marker, seconds

    def train_data(self) -> Dataset[Any]:
        if first_to_come(self.marker):
            time.sleep(self.seconds)
        return super().train_data()

    def eval_data(self) -> None:
        return None


class Misbehaving(Blobs):
    """
    Does something at its call number `at` of `loss`, in the process that gets there first.

    Args:
        deed: `raise`, `exit`, `kill`, `stop` or `hang`.
        marker: a file that the first process creates, so that only one rank misbehaves.
    """

    def __init__(self, deed: str, marker: str, at: int = 5) -> None:
        self.deed, self.marker, self.at = deed, marker, at
        self.calls = 0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(0.05)  # so that the controller hears of some steps
        if self.calls == self.at and first_to_come(self.marker):
            self._misbehave()
        return super().loss(outputs, targets)

    def _misbehave(self) -> None:
        if self.deed == "raise":
            raise KeyError("no such token: 17")
        if self.deed == "exit":
            raise SystemExit(0)
        if self.deed == "hang":
            time.sleep(3600)
        os.kill(os.getpid(), signal.SIGKILL if self.deed == "kill" else signal.SIGSTOP)


class Big(Blobs):
    """A million parameters: its shards are cut inside one tensor."""

    def model(self) -> nn.Module:
        layers = [nn.Linear(5, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.Linear(1000, 3)]
        return nn.Sequential(*layers)
