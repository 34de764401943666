"""
A ResNet with augmentation: images that a loader process shifts, turns and erases anew each epoch.

The data are the 1797 scanned digits of 8 x 8 pixels that come with scikit-learn, so nothing is
downloaded. The network is that of He et al. 2016, small; its batch norms are over all workers.
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
    """Tell the ten digits apart."""

    def __init__(self, width: int = 16, blocks: int = 2, augment: bool = True) -> None:
        """
        Take what `task_args` of the job file says.

        Args:
            width: channels of the first stage; each of the two after it has twice as many.
            blocks: of each stage.
            augment: whether training images are changed.
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

        found: Any = load_digits()
        images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / DARKEST
        targets = torch.tensor(found.target)
        order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
        first = int(len(order) * TEST_PART)
        mine = order[:first] if held_out else order[first:]
        self.images, self.targets, self.augment = images[mine], targets[mine], augment

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return augmented(image) if self.augment else image, self.targets[index]


def augmented(image: Tensor) -> Tensor:
    """
    Turn an image by up to 15 degrees, move it by up to a pixel, and erase a square of two pixels.

    What is drawn is a function of the job's seed, the epoch and the sample, whoever draws it.
    """
    angle = (torch.rand(()) - 0.5) * torch.pi / 6
    moved = (torch.rand(2) - 0.5) * 2 / 4
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, moved[0]]), torch.stack([sin, cos, moved[1]])])
    grid = F.affine_grid(matrix[None], [1, *image.shape], align_corners=False)
    turned = F.grid_sample(image[None], grid, align_corners=False)[0]
    row, column = torch.randint(0, 7, (2,)).tolist()
    turned[:, row : row + 2, column : column + 2] = 0.0
    return turned


class Block(nn.Module):
    """Two convolutions beside a way around them."""

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
    """Give three stages of blocks, each but the first at half the size."""
    layers: list[nn.Module] = []
    inputs = 1
    for stage in range(3):
        outputs = width * 2**stage
        for number in range(blocks):
            stride = 2 if stage > 0 and number == 0 else 1
            layers.append(Block(inputs, outputs, stride))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
