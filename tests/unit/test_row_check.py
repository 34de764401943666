"""A scalar loss that is a mean over unequal numbers of rows per sample gives a warning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import train
from torch import Tensor, nn
from torch.nn import functional as F

from distplat import Task
from distplat.strategies.loop.loss_check import loss_warning
from distplat.strategies.loop.row_check import rows_of

WARNING = "loss() is a mean over"


def warning_of(loss: Callable[[Any, Any], Any], rows: int, samples: int) -> str | None:
    generator = torch.Generator().manual_seed(rows)
    outputs = torch.randn(rows, 5, generator=generator)
    targets = torch.randn(rows, 5, generator=generator)
    return loss_warning(loss, outputs, targets, loss(outputs, targets), samples=samples)


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, lambda o, t: (o - t).abs().mean()])
@pytest.mark.parametrize(("rows", "samples"), [(9, 4), (7, 3), (3, 4)])
def test_mean_over_rows_gives_a_warning(
    loss: Callable[[Any, Any], Any], rows: int, samples: int
) -> None:
    warning = warning_of(loss, rows, samples)
    assert warning is not None and warning.startswith(f"{WARNING} {rows} rows of {samples} samples")


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "a sum and its weight": lambda o, t: (F.mse_loss(o, t, reduction="sum"), o.numel()),
    "a mean with a weight": lambda o, t: (F.mse_loss(o, t), 1.0),
    "a sum over samples": lambda o, t: F.mse_loss(o, t, reduction="sum") / 4,
    "a constant": lambda o, t: (o * 0).mean() + 1,
    "a loss that needs all rows": lambda o, t: F.mse_loss(o - o.mean(0), t),
    "a loss that fails for some rows": lambda o, t: F.mse_loss(o.view(9, 5), t),
}


@pytest.mark.parametrize("name", LOSSES)
def test_other_losses_give_no_warning(name: str) -> None:
    assert warning_of(LOSSES[name], 9, 4) is None


@pytest.mark.parametrize(
    ("shapes", "samples", "expected"),
    [
        ([(9, 5), (9,)], 4, 9),
        ([(3, 5), (3,), ()], 4, 3),
        ([(9, 5), (8,)], 4, None),  # unequal first dimensions
        ([(8, 5), (8,)], 4, None),  # possibly two rows per sample
        ([(2, 5), (2,)], 4, None),  # pairs
        ([(9, 4, 5), (9, 4)], 4, None),  # time first
        ([(4, 5), (4,)], 4, None),
        ([(9, 5), (9,)], 1, None),
        ([()], 4, None),
    ],
)
def test_rows_of_a_batch(shapes: list[tuple[int, ...]], samples: int, expected: int | None) -> None:
    assert rows_of([torch.zeros(shape) for shape in shapes], samples) == expected


class Windows(Task):
    """A sample has one or more windows; a batch has all windows of its samples."""

    counts = (1, 3, 2, 1, 4, 2, 3, 3)

    def model(self) -> nn.Module:
        return nn.Linear(5, 1)

    def train_data(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(count, 5, generator=generator) for count in self.counts]

    def collate(self, samples: list[Tensor]) -> Any:
        rows = torch.cat(samples)
        return rows, rows.sum(1, keepdim=True)

    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        return F.mse_loss(outputs, targets)


class Weighted(Windows):
    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        return F.mse_loss(outputs, targets, reduction="sum"), len(targets)


class Even(Windows):
    counts = (2,) * 8


@pytest.mark.parametrize(
    ("task_class", "warns"), [(Windows, True), (Weighted, False), (Even, False)]
)
def test_run_gives_the_warning(
    task_class: type[Task], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fields: dict[str, Any] = {"steps": 2, "global_batch_size": 8, "data": {"shuffle": False}}
    train(job_of("ring", 2, **fields), task_class)
    assert (WARNING in caplog.text) == warns
