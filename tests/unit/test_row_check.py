"""A scalar loss that is a mean over rows, of which samples have more or less, is warned of."""

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

TOLD = "loss() is a mean over"


def asked(loss: Callable[[Any, Any], Any], rows: int, samples: int) -> str | None:
    generator = torch.Generator().manual_seed(rows)
    outputs = torch.randn(rows, 5, generator=generator)
    targets = torch.randn(rows, 5, generator=generator)
    return loss_warning(loss, outputs, targets, loss(outputs, targets), samples=samples)


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, lambda o, t: (o - t).abs().mean()])
@pytest.mark.parametrize(("rows", "samples"), [(9, 4), (7, 3), (3, 4)])
def test_a_mean_over_rows_is_told(loss: Callable[[Any, Any], Any], rows: int, samples: int) -> None:
    told = asked(loss, rows, samples)
    assert told is not None and told.startswith(f"{TOLD} {rows} rows of {samples} samples")


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "a sum and its weight": lambda o, t: (F.mse_loss(o, t, reduction="sum"), o.numel()),
    "a mean with a weight": lambda o, t: (F.mse_loss(o, t), 1.0),
    "a sum over samples": lambda o, t: F.mse_loss(o, t, reduction="sum") / 4,
    "a constant": lambda o, t: (o * 0).mean() + 1,
    "that needs all rows": lambda o, t: F.mse_loss(o - o.mean(0), t),
    "that fails for some": lambda o, t: F.mse_loss(o.view(9, 5), t),
}


@pytest.mark.parametrize("name", LOSSES)
def test_others_are_not(name: str) -> None:
    assert asked(LOSSES[name], 9, 4) is None


@pytest.mark.parametrize(
    ("shapes", "samples", "wanted"),
    [
        ([(9, 5), (9,)], 4, 9),
        ([(3, 5), (3,), ()], 4, 3),
        ([(9, 5), (8,)], 4, None),  # not all have them
        ([(8, 5), (8,)], 4, None),  # two of each, it may be
        ([(2, 5), (2,)], 4, None),  # pairs
        ([(9, 4, 5), (9, 4)], 4, None),  # time first
        ([(4, 5), (4,)], 4, None),
        ([(9, 5), (9,)], 1, None),
        ([()], 4, None),
    ],
)
def test_rows_are_those_of_a_batch_that_is_not_by_sample(
    shapes: list[tuple[int, ...]], samples: int, wanted: int | None
) -> None:
    assert rows_of([torch.zeros(one) for one in shapes], samples) == wanted


class Windows(Task):
    """Each sample has some windows, of which a batch has all."""

    counts = (1, 3, 2, 1, 4, 2, 3, 3)

    def model(self) -> nn.Module:
        return nn.Linear(5, 1)

    def train_data(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        return [torch.randn(one, 5, generator=generator) for one in self.counts]

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


@pytest.mark.parametrize(("kind", "said"), [(Windows, True), (Weighted, False), (Even, False)])
def test_a_run_says_so(kind: type[Task], said: bool, caplog: pytest.LogCaptureFixture) -> None:
    fields: dict[str, Any] = {"steps": 2, "global_batch_size": 8, "data": {"shuffle": False}}
    train(job_of("ring", 2, **fields), kind)
    assert (TOLD in caplog.text) == said
