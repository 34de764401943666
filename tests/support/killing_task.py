"""A task whose forward kills a process of the in-memory cluster."""

from __future__ import annotations

import torch
from in_memory_processes import process_here
from ray_in_memory import InMemoryRay
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat import Task


class KillsInForward(Task):
    """Kills a process in the fourth forward. Rank threads share generators: nothing is random."""

    killed = ""
    """Name of the process to kill in the forward of `worker-1`; empty: none."""
    ray: InMemoryRay

    def model(self) -> nn.Module:
        layer = nn.Linear(3, 2)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(6.0).view(2, 3) / 7)
            layer.bias.zero_()
        self.forwards = 0
        return nn.Sequential(layer)

    def train_data(self) -> TensorDataset:
        numbers = torch.arange(36.0).view(12, 3)
        return TensorDataset(numbers.sin(), numbers[:, 0].long() % 2)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.forwards += 1
        process = process_here()
        if process is not None and process.name == "worker-1" and self.forwards == 4:
            killed, KillsInForward.killed = KillsInForward.killed, ""
            assert not killed or KillsInForward.ray.kill_process(killed)
            process.check()
        return nn.functional.cross_entropy(outputs, targets)
