"""A task with some non-finite gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from jobs import job_of
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplat.platform.spec import Job
from distplat.strategies.task import Task

SAMPLES, BATCH, STEPS = 22, 6, 7


class Spoiled(Task):
    """
    The gradients of a few samples are NaN, and optionally their losses.

    Args:
        bad: indices of these samples.
        loss_too: whether their loss is NaN, too.
        norm: whether the model has a batch norm.
        large: factor of the loss.
    """

    def __init__(
        self,
        bad: Sequence[int] = (),
        loss_too: bool = False,
        norm: bool = True,
        large: float = 1.0,
    ) -> None:
        self.bad, self.loss_too, self.norm, self.large = bad, loss_too, norm, large

    def model(self) -> nn.Module:
        norm = nn.BatchNorm1d(6) if self.norm else nn.Identity()
        # The gradient of a bias before a batch norm is only noise, which Adam would amplify.
        first = nn.Linear(4, 6, bias=not self.norm)
        return nn.Sequential(first, norm, nn.Tanh(), nn.Linear(6, 2)).double()

    def train_data(self) -> Dataset[Any]:
        draw = torch.Generator().manual_seed(1)
        marks = torch.zeros(SAMPLES, dtype=torch.float64)
        marks[list(self.bad)] = 1.0
        inputs = torch.randn(SAMPLES, 4, generator=draw, dtype=torch.float64)
        targets = torch.randn(SAMPLES, 2, generator=draw, dtype=torch.float64)
        return TensorDataset(inputs, torch.cat([targets, marks[:, None]], 1))

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        targets, marks = targets[:, :2], targets[:, 2]
        loss: Tensor = (outputs - targets).square().mean() * self.large
        if marks.any():
            # The derivative of sqrt at 0 is infinite; times 0 it is NaN.
            loss = loss + (outputs.sum() * 0.0).abs().sqrt()
            if self.loss_too:
                loss = loss * float("nan")
        return loss


def spoiled_job(strategy: dict[str, Any], workers: int, policy: str, **task: Any) -> Job:
    return job_of(
        strategy,
        workers,
        task_args=task,
        optimizer={"name": "AdamW", "lr": 0.05, "weight_decay": 0.1},
        steps=STEPS,
        global_batch_size=BATCH,
        data={"shuffle": False},
        failure={"non_finite": policy, "max_skipped_steps": 5},
    )
