"""Tasks for `test_verify.py`."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat import Task


class WholeBatch(Task):
    """A model that is not a sequence of layers: only whole-batch strategies apply."""

    def model(self) -> nn.Module:
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                return torch.tanh(self.inner(x))

        return Net()

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(torch.randn(21, 4), torch.randint(0, 2, (21,)))

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


class Drawing(WholeBatch):
    """Dropout, and samples with noise."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.4), nn.Tanh(), nn.Linear(16, 2))

    def train_data(self) -> Dataset[Any]:
        return _Noisy(super().train_data())


class _Noisy(Dataset[Any]):
    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return x + 0.1 * torch.randn(4), y


class Unseeded(WholeBatch):
    """Each process draws different samples."""

    def train_data(self) -> Dataset[Any]:
        noise = int.from_bytes(os.urandom(2), "little") / 65536
        data: Any = super().train_data()
        return TensorDataset(data.tensors[0] + noise, data.tensors[1])


class Failing(WholeBatch):
    def train_data(self) -> Dataset[Any]:
        raise RuntimeError("no samples today")
