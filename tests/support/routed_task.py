"""A mixture-of-experts task; some micro-batches do not use all experts."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.strategies.task import Task

BATCH, STEPS = 16, 3
EXPERTS = [0, 0, 4, 4, 4, 4, 1, 1, 4, 4, 4, 4, 4, 4, 2, 2]
"""The expert of each sample. Only the first of 8 micro-batches uses expert 0, only the last uses
expert 2, and one in the middle uses expert 1, on one of two replicas. Expert 3 is not used."""


class Experts(nn.Module):
    """Routes each sample to the expert named by its first feature; other experts are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 4) for _ in range(5))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = torch.zeros_like(inputs[:, 1:])
        for number, expert in enumerate(self.experts):
            mine = inputs[:, 0] == number
            if mine.any():
                outputs = outputs.index_put((mine,), expert(inputs[mine]))
        return torch.cat([inputs[:, :1], torch.tanh(outputs)], dim=1)


class Routed(Task):
    def model(self) -> nn.Module:
        return nn.Sequential(Experts(), Experts(), Experts(), nn.Linear(5, 2)).double()

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(BATCH, 5, generator=generator).double()
        inputs[:, 0] = torch.tensor(EXPERTS)
        return TensorDataset(inputs, torch.randn(BATCH, 2, generator=generator).double())

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)
