"""
Handwritten digits: a minimal real task, for a first run and for comparing strategies.

The data are the 1797 scanned digits of 8 x 8 pixels of scikit-learn (Alpaydin & Kaynak
1998, "Optical Recognition of Handwritten Digits"), so no download is needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.strategies.task import Task

CLASSES = 10
PIXELS = 8 * 8
DARKEST = 16.0
TEST_PART = 0.2


class Digits(Task):
    """Classify the ten digits with an MLP or a small CNN."""

    def __init__(self, model: str = "mlp", hidden: int = 64) -> None:
        """
        Initialize the task with the `task_args` of the job file.

        Args:
            model: `mlp` (two hidden layers) or `cnn` (two convolutions, one hidden layer).
            hidden: units of each hidden layer.

        Raises:
            ValueError: `model` is unknown.
        """
        if model not in ("mlp", "cnn"):
            raise ValueError(f"model is {model!r}, allowed: 'mlp', 'cnn'")
        self.kind = model
        self.hidden = hidden

    def model(self) -> nn.Module:
        return _mlp(self.hidden) if self.kind == "mlp" else _cnn(self.hidden)

    def train_data(self) -> TensorDataset:
        return _split()[0]

    def eval_data(self) -> TensorDataset:
        return _split()[1]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(dim=1) == targets).float().mean()}


def _mlp(hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(PIXELS, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, CLASSES),
    )


def _cnn(hidden: int) -> nn.Sequential:
    """Return a CNN without batch norm, whose statistics would depend on the number of workers."""
    return nn.Sequential(
        nn.Conv2d(1, 16, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * PIXELS // 4, hidden),
        nn.ReLU(),
        nn.Linear(hidden, CLASSES),
    )


def _split() -> tuple[TensorDataset, TensorDataset]:
    """Return training and test data, split 80 to 20 for each digit, equally in every process."""
    # A local import: it takes a second, which processes that only build the model can save.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / DARKEST,
        torch.tensor(labels, dtype=torch.int64),
        test_size=TEST_PART,
        stratify=labels,
        random_state=0,  # the split must not depend on the job's seed
    )
    train_images, test_images, train_labels, test_labels = parts
    return TensorDataset(train_images, train_labels), TensorDataset(test_images, test_labels)
