"""Small models for pipelines and tensor parallelism, and a plain torch loop to compare with."""

from functools import cache
from typing import Any

import torch
from jobs import fields_of
from local_run import LocalRun
from plain_loss import mean_loss
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.catalog import make_job
from distplat.strategies.task import Task
from distplat.strategies.tensor.parallel_plan import HeadLayout

SAMPLES, BATCH, STEPS = 45, 16, 20
"""An epoch has 2 batches of 16 and one of 13, whose micro-batches are uneven."""
CLASSES = 4


class Classify(Task):
    """Random samples of a few classes."""

    shape: tuple[int, ...]
    integers = 0

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        if self.integers:
            inputs = torch.randint(self.integers, (SAMPLES, *self.shape), generator=generator)
        else:
            inputs = torch.randn(SAMPLES, *self.shape, generator=generator)
        targets = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
        return TensorDataset(inputs, targets)

    def eval_data(self) -> TensorDataset:
        return self.train_data()

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(1) == targets).float().mean()}


class Mlp(Classify):
    shape = (6,)
    dropout = 0.0

    def model(self) -> nn.Module:
        blocks = [
            nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Dropout(self.dropout)) for _ in range(4)
        ]
        return nn.Sequential(nn.Linear(6, 12), *blocks, nn.Linear(12, CLASSES))


MLP_PLAN = {"1.0": "colwise", "2.0": "rowwise", "4.0": "colwise_gather"}


class Normed(Mlp):
    """A model with running statistics."""

    def model(self) -> nn.Module:
        blocks = [nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Tanh()) for _ in range(2)]
        return nn.Sequential(nn.Linear(6, 12), *blocks, nn.Linear(12, CLASSES))


class Dropping(Mlp):
    dropout = 0.4


class Conv(Classify):
    shape = (1, 8, 8)

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.AvgPool2d(2),
            nn.Conv2d(8, 8, 3),
            nn.Flatten(),
            nn.Linear(32, 16),
            nn.Tanh(),
            nn.Linear(16, CLASSES),
        )


CONV_PLAN = {"6": "colwise", "8": "rowwise"}


class Mixed(nn.Module):
    """Parallel branches of different cost, as in Inception."""

    def __init__(self, width: int, *, norm: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                nn.Conv2d(width, 3, 1),
                nn.Sequential(
                    nn.Conv2d(width, 4, 3, padding=1),
                    nn.BatchNorm2d(4) if norm else nn.Identity(),
                    nn.GELU(),
                    nn.Conv2d(4, 4, 3, padding=1),
                ),
                nn.AvgPool2d(3, 1, 1),
            ]
        )

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([branch(features) for branch in self.branches], dim=1)


class Inception(Classify):
    shape = (1, 6, 6)
    norm = False

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            Mixed(3, norm=self.norm),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(90, 12),
            nn.Tanh(),
            nn.Linear(12, CLASSES),
        )


INCEPTION_PLAN = {"1.branches.*": "branches", "4": "colwise", "6": "rowwise"}


class NormedInception(Inception):
    """A branch has running statistics, which only that branch's rank updates."""

    norm = True


class Attention(nn.Module):
    head_layout = HeadLayout(inwards={"inwards": "3 heads features"}, outwards="outwards")

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.inwards, self.outwards = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        batch, length, _ = features.shape
        split = self.inwards(features).view(batch, length, 3, -1, self.size)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.outwards(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, 2))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, features: Tensor) -> Tensor:
        features = features + self.attention(features)
        return features + torch.as_tensor(self.mlp(features))


GPT_PLAN = {
    "0": "embedding",
    "*.attention.1": "heads",
    "*.mlp.1": "colwise",
    "*.mlp.3": "rowwise",
    "6": "colwise_gather",
}


class First(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features[:, -1]


class Gpt(Classify):
    """Classifies by the last character."""

    shape = (5,)
    integers = 11

    def model(self) -> nn.Module:
        blocks = [Block(8) for _ in range(3)]
        return nn.Sequential(
            nn.Embedding(11, 8), *blocks, nn.LayerNorm(8), First(), nn.Linear(8, CLASSES)
        )


def hybrid_fields(strategy: dict[str, Any], workers: int, **more: Any) -> dict[str, Any]:
    fields = {
        "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
        "steps": STEPS,
        "global_batch_size": BATCH,
        "evaluation": {"every_epochs": 0},
        "seed": 5,
        **more,
    }
    return fields_of({"name": "hybrid", **strategy}, workers, **fields)


def hybrid_job(strategy: dict[str, Any], workers: int, **more: Any) -> Job:
    return make_job(hybrid_fields(strategy, workers, **more))


def grid_of(pipeline: int, tensor: int, data: int, **more: Any) -> tuple[dict[str, Any], int]:
    options = {"pipeline": pipeline, "tensor": tensor, "data": data, **more}
    if pipeline > 1:
        options = {"cut": "even", "micro_batches": 4, **options}
    return options, pipeline * tensor * data


def merge_parts(run: LocalRun) -> dict[str, Tensor]:
    """Merge the ranks' parts of the trained model."""
    return {name: value for part in run.trained for name, value in part.items()}


@cache
def train_plain(
    task_type: type[Task], clip: float | None = None
) -> tuple[dict[str, Tensor], list[float]]:
    """
    Train in a plain torch loop in one process; return the model and the losses.

    With SGD: Adam would amplify rounding errors of zero gradients, such as those of key biases.
    """
    task = task_type()
    torch.manual_seed(5)
    model, data = task.model(), task.train_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sampler = Sampler(SAMPLES, BATCH, 1, seed=5)
    losses = []
    for step in range(STEPS):
        inputs, targets = zip(*(data[int(i)] for i in sampler.batch_ids(step)), strict=True)
        optimizer.zero_grad()
        loss = mean_loss(task, model(torch.stack(inputs)), torch.stack(targets))
        torch.autograd.backward(loss)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return {name: value.detach().clone() for name, value in model.state_dict().items()}, losses
