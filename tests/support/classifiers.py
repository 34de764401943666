"""Small classifiers, jobs that train them, and a plain torch loop to compare with."""

from functools import cache
from typing import Any

import torch
from jobs import job_of
from plain_loss import mean_loss
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.task import Task

SAMPLES, BATCH, EPOCHS = 37, 9, 3
STEPS = 15
"""Three epochs of 4 batches of 9 and one of 1."""


class Classify(Task):
    """Random samples of three classes."""

    shape: tuple[int, ...]

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(SAMPLES, *self.shape, generator=generator)
        return TensorDataset(inputs, torch.randint(0, 3, (SAMPLES,), generator=generator))

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


class Mlp(Classify):
    shape = (5,)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


class Conv(Classify):
    shape = (1, 8, 8)

    def model(self) -> nn.Module:
        features = (nn.Conv2d(1, 4, 3), nn.GELU(), nn.AvgPool2d(2), nn.Flatten())
        return nn.Sequential(*features, nn.Linear(36, 3))


class Dropout(Mlp):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 20), nn.Dropout(0.5), nn.Linear(20, 3))


SGD = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
ADAM = {"name": "Adam", "lr": 0.01}
ADAMW = {"name": "AdamW", "lr": 0.01, "weight_decay": 0.1}

RECIPES: dict[str, tuple[type[Task], dict[str, Any], int, float | None]] = {
    "mlp-sgd": (Mlp, SGD, 1, None),
    "mlp-sgd-accumulated-clipped": (Mlp, SGD, 3, 0.3),
    "mlp-adam-accumulated": (Mlp, ADAM, 3, None),
    "mlp-adamw-clipped": (Mlp, ADAMW, 1, 0.3),
    "conv-sgd-clipped": (Conv, SGD, 1, 0.3),
    "conv-adam": (Conv, ADAM, 1, None),
    "conv-adamw-accumulated-clipped": (Conv, ADAMW, 3, 0.3),
}


def recipe_job(recipe: str, strategy: str, workers: int, servers: int) -> Job:
    _, optimizer, accumulation, clip_norm = RECIPES[recipe]
    options = {"num_servers": servers} if servers else {}
    return job_of(
        {"name": strategy, **options},
        workers,
        optimizer=optimizer,
        lr_schedule={"name": "cosine", "warmup_steps": 3, "final_factor": 0.1},
        epochs=EPOCHS,
        global_batch_size=BATCH,
        gradient_accumulation=accumulation,
        clip_norm=clip_norm,
        seed=5,
    )


@cache
def train_plain(recipe: str) -> tuple[dict[str, Tensor], list[float]]:
    """Train in a plain torch loop in one process; return the model and the losses."""
    task_type, optimizer_spec, _, clip_norm = RECIPES[recipe]
    job = recipe_job(recipe, "ring", 1, 0)
    task = task_type()
    torch.manual_seed(5)
    model, data = task.model(), task.train_data()
    arguments = {key: value for key, value in optimizer_spec.items() if key != "name"}
    optimizer = getattr(torch.optim, optimizer_spec["name"])(model.parameters(), **arguments)
    sampler = Sampler(SAMPLES, BATCH, world=1, seed=5)
    losses = []
    for step in range(STEPS):
        inputs, targets = data[sampler.batch_ids(step).tolist()]
        optimizer.zero_grad()
        loss = mean_loss(task, model(inputs), targets)
        torch.autograd.backward(loss)
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.param_groups[0]["lr"] = job.lr_schedule.rate(arguments["lr"], step, STEPS)
        optimizer.step()
        losses.append(loss.item())
    return {name: value.detach() for name, value in model.state_dict().items()}, losses


def job(strategy: Any, workers: int, **more: Any) -> Job:
    fields = {
        "optimizer": SGD,
        "lr_schedule": {"name": "cosine", "warmup_steps": 3, "final_factor": 0.1},
        "epochs": 3,
        "global_batch_size": 9,
        "seed": 5,
        **more,
    }
    return job_of(strategy, workers, **fields)
