"""
A train function on handwritten digits: a training loop with `prepare` and `report`.

The data are the 1797 scanned digits of 8 x 8 pixels of scikit-learn, as in `examples/digits`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import distplat


def train(config: dict[str, Any]) -> None:
    """
    Train an MLP; every worker calls this function.

    Args:
        config: `task_args` of the job file: `epochs`, `lr`, and `batch_size` per worker.
    """
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["epochs"])
    loader = DataLoader(digits(), batch_size=config["batch_size"], shuffle=True)
    model, optimizer, loader = distplat.prepare(model, optimizer, loader)

    first = 0
    if (saved := distplat.get_checkpoint()) is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        first = saved["epoch"]

    for epoch in range(first, config["epochs"]):
        loader.set_epoch(epoch)
        correct = total = 0
        for images, labels in loader:
            outputs = model(images)
            loss = F.cross_entropy(outputs, labels)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            correct += int((outputs.argmax(1) == labels).sum())
            total += len(labels)
        scheduler.step()
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "epoch": epoch + 1,
        }
        metrics = {"loss": loss.item(), "accuracy": correct / total}
        distplat.report(metrics, checkpoint=state)


def digits() -> TensorDataset:
    """Return all images, shape [64] each, and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(images, dtype=torch.float32) / 16.0
    return TensorDataset(pixels, torch.tensor(labels, dtype=torch.int64))
