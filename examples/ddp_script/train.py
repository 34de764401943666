"""
A training script for torch's DistributedDataParallel, which does not use distplat.

    torchrun --nproc-per-node 2 train.py
    distplat submit --num-workers 2 -- python train.py

The data are the scanned digits of scikit-learn, as in examples/digits.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def main() -> None:
    """Initialize the process group, train, and destroy the group."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.1)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    train(args.epochs, args.lr)
    dist.destroy_process_group()


def train(epochs: int, lr: float) -> None:
    """Print the loss and accuracy of each epoch on rank 0."""
    torch.manual_seed(0)
    digits = load_digits()
    pixels = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    data = TensorDataset(pixels, torch.tensor(digits.target))
    sampler: DistributedSampler[object] = DistributedSampler(data)
    loader = DataLoader(data, batch_size=32, sampler=sampler)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        right = torch.zeros(1)
        for inputs, targets in loader:
            outputs = model(inputs)
            loss = F.cross_entropy(outputs, targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            right += (outputs.argmax(1) == targets).sum()
        dist.all_reduce(right)
        if dist.get_rank() == 0:
            accuracy = right.item() / len(data)
            print(f"epoch {epoch + 1}  loss {loss.item():.6f}  accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
