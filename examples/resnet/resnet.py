"""
A ResNet with augmentation: loader processes randomly shift, rotate and erase images in each epoch.

The data are the 1797 scanned digits of 8 x 8 pixels of scikit-learn, so no download is needed. The
network is a small version of that of He et al. 2016, with batch norms over all workers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from distplat import Task

DARKEST = 16.0
TEST_PART = 0.2


class ResNetDigits(Task):
    """Classify the ten digits."""

    def __init__(self, width: int = 16, blocks: int = 2, augment: bool = True) -> None:
        """
        Initialize the task with the `task_args` of the job file.

        Args:
            width: channels of the first stage; each of the next two stages doubles them.
            blocks: number of blocks of each stage.
            augment: whether training images are augmented.
        """
        self.width, self.blocks, self.augment = width, blocks, augment

    def model(self) -> nn.Module:
        return resnet(self.width, self.blocks)

    def train_data(self) -> Dataset[Any]:
        return Images(held_out=False, augment=self.augment)

    def eval_data(self) -> Dataset[Any]:
        return Images(held_out=True, augment=False)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, label_smoothing=0.1)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(dim=1) == targets).float().mean()}


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Scans of digits, [1, 8, 8] each, from 0 to 1."""

    def __init__(self, *, held_out: bool, augment: bool) -> None:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / DARKEST
        targets = torch.tensor(digits.target)
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
        first = int(len(order) * TEST_PART)
        indices = order[:first] if held_out else order[first:]
        self.images, self.targets, self.augment = images[indices], targets[indices], augment

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return augmented(image) if self.augment else image, self.targets[index]


def augmented(image: Tensor) -> Tensor:
    """
    Rotate an image by up to 15 degrees, shift it by up to a pixel, and erase a square of 2 x 2.

    The random numbers are a function of the job's seed, the epoch and the sample, in any process.
    """
    angle = (torch.rand(()) - 0.5) * torch.pi / 6
    shift = (torch.rand(2) - 0.5) * 2 / 4
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, shift[0]]), torch.stack([sin, cos, shift[1]])])
    grid = F.affine_grid(matrix[None], [1, *image.shape], align_corners=False)
    result = F.grid_sample(image[None], grid, align_corners=False)[0]
    row, column = torch.randint(0, 7, (2,)).tolist()
    result[:, row : row + 2, column : column + 2] = 0.0
    return result


class Block(nn.Module):
    """Two convolutions with a shortcut connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm_first = nn.SyncBatchNorm(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm_second = nn.SyncBatchNorm(outputs)
        same = inputs == outputs and stride == 1
        around = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.around = nn.Identity() if same else around
        self.norm_around = nn.Identity() if same else nn.SyncBatchNorm(outputs)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm_second(self.second(F.relu(self.norm_first(self.first(images)))))
        return F.relu(features + self.norm_around(self.around(images)))


def resnet(width: int, blocks: int) -> nn.Module:
    """Return a ResNet of three stages; each except the first halves the resolution."""
    layers: list[nn.Module] = []
    inputs = 1
    for stage in range(3):
        outputs = width * 2**stage
        for number in range(blocks):
            stride = 2 if stage > 0 and number == 0 else 1
            layers.append(Block(inputs, outputs, stride))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
