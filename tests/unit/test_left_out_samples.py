"""Samples that are None, which `collate` leaves out: the mean is that over the others."""

from typing import Any

import pytest
import torch
from hybrid_models import whole
from jobs import job_of
from local_run import evaluations, train
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from distplat import Task
from distplat.strategies.loop.batches import count_samples

SAMPLES, BATCH, STEPS = 22, 12, 4


class Broken(Dataset[Any]):
    """Every fifth sample cannot be read, and some that follow each other."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(SAMPLES, 3, generator=generator).double()
        self.y = self.x.sum(1, keepdim=True).sin()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, at: int) -> Any:
        return None if at % 5 == 0 or at in {6, 7} else (self.x[at], self.y[at])


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return (Broken()[at] for at in range(SAMPLES))

    def __len__(self) -> int:
        return SAMPLES


class Filtering(Task):
    data: type[Dataset[Any]] = Broken

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def train_data(self) -> Any:
        return self.data()

    def eval_data(self) -> Any:
        return self.data()

    def collate(self, samples: list[Any]) -> Any:
        return default_collate([one for one in samples if one is not None])

    def loss(self, outputs: Any, targets: Any) -> Any:
        return nn.functional.mse_loss(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> dict[str, Any]:
        return {"distance": (outputs - targets).abs().mean()}


class Streamed(Filtering):
    data = Rows


class Marked(Dataset[Any]):
    """The same, which can all be read: a mark says which are no good."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, at: int) -> Any:
        data = Broken()
        return {"x": data.x[at], "y": data.y[at], "bad": data[at] is None}


class Choosing(Filtering):
    """Leaves samples out by what is in them."""

    data = Marked

    def collate(self, samples: list[Any]) -> Any:
        return default_collate([(one["x"], one["y"]) for one in samples if not one["bad"]])


class Summed(Filtering):
    """Its weight is its own."""

    def loss(self, outputs: Any, targets: Any) -> Any:
        return nn.functional.mse_loss(outputs, targets, reduction="sum"), len(targets)


def plain() -> tuple[dict[str, Tensor], dict[str, float]]:
    task, data = Filtering(), Broken()
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        start = step % 2 * BATCH
        samples = [data[at] for at in range(start, min(start + BATCH, SAMPLES))]
        inputs, targets = task.collate(samples)
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model(inputs), targets))
        optimizer.step()
    inputs, targets = task.collate([*map(data.__getitem__, range(SAMPLES))])
    with torch.no_grad():
        outputs = model(inputs)
        figures = {name: float(one) for name, one in task.metrics(outputs, targets).items()}
        figures["loss"] = float(task.loss(outputs, targets))
    return model.state_dict(), figures


CUT = {"name": "hybrid", "pipeline": 2, "micro_batches": 2, "cut": "even"}


@pytest.mark.parametrize(
    ("strategy", "workers", "kind", "fields"),
    [
        ("ring", 3, Filtering, {}),
        ("ring", 2, Filtering, {"gradient_accumulation": 2}),
        ("ring", 2, Streamed, {}),
        ("ring", 2, Summed, {}),
        ("ring", 3, Choosing, {}),
        ("ring", 2, Choosing, {"gradient_accumulation": 2}),
        ("ps-sync", 2, Choosing, {}),
        (CUT, 2, Choosing, {}),
        ("ps-sync", 2, Filtering, {}),
        ("ps-async", 1, Filtering, {}),
        (CUT, 2, Filtering, {}),
        ({**CUT, "data": 2}, 4, Filtering, {}),
    ],
    ids=str,
)
def test_a_run_takes_the_mean_over_the_others(
    strategy: Any, workers: int, kind: type[Task], fields: dict[str, Any]
) -> None:
    given = {"steps": STEPS, "global_batch_size": BATCH, "data": {"shuffle": False}, **fields}
    run = train(job_of(strategy, workers, **given), kind, timeout_s=30)
    found, (expected, figures) = whole(run), plain()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
    last = evaluations(run)[-1]
    assert last.samples == SAMPLES
    assert dict(last.metrics) == pytest.approx(figures, rel=1e-9)


X, Y, NUMBER = torch.zeros(3), torch.zeros(1), torch.tensor(0.5)
FOUR, TWO = [(X, Y)] * 4, torch.zeros(2, 3)
COUNTED: dict[str, tuple[Any, list[Any], int]] = {
    "two are left out": ([TWO, torch.zeros(2, 1)], FOUR, 2),
    "of numbers": (torch.zeros(3), [1.0] * 4, 3),
    "with a constant beside": ([TWO, torch.tensor(0.5)], FOUR, 2),
    "two None, and one left out": (TWO, [None, X, X, None, X], 2),
    "time first": (torch.zeros(2, 4, 3), [torch.zeros(2, 3)] * 4, 4),
    "packed": (torch.zeros(2, 5), [torch.zeros(5), *[torch.zeros(2)] * 3], 4),
    "a list of rows": ([TWO[0], TWO[1]], FOUR, 4),
    "lists of fields": ([[X] * 4, [NUMBER] * 4], [(X, NUMBER)] * 4, 4),
    "a list of samples": ([(X, NUMBER)] * 4, [(X, NUMBER)] * 4, 4),
    "a list of dicts": ([{"x": X, "y": NUMBER}] * 4, [{"x": X, "y": NUMBER}] * 4, 4),
    "numbers of as many as there are fields": ([TWO.T, X], [(TWO[:, 0], NUMBER)] * 4, 3),
    "other rows": (torch.zeros(2, 7), FOUR, 4),
    "text beside": ([TWO, "ab"], FOUR, 4),
    "more rows": (torch.zeros(6, 3), FOUR, 4),
}


@pytest.mark.parametrize("name", COUNTED)
def test_rows_are_samples_where_each_is_like_one(name: str) -> None:
    batch, given, wanted = COUNTED[name]
    assert count_samples(batch, given) == wanted


class Made(Filtering):
    """Its batches are made of nothing: all samples are None, and count."""

    def train_data(self) -> Any:
        return [None] * SAMPLES

    def eval_data(self) -> Any:
        return None

    def collate(self, samples: list[Any]) -> Any:
        data = Broken()
        return data.x[: len(samples)], data.y[: len(samples)]


def test_where_all_samples_are_none_they_count() -> None:
    fields: dict[str, Any] = {"steps": 2, "global_batch_size": BATCH}
    run = train(job_of("ring", 2, **fields), Made)
    torch.manual_seed(0)
    model = Made().model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for size in (BATCH, SAMPLES - BATCH):
        inputs, targets = Made().collate([None] * (size // 2))
        optimizer.zero_grad()
        torch.autograd.backward(Made().loss(model(inputs), targets))
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.trained[0][name], value, rtol=1e-9, atol=1e-9)


class Filling(Filtering):
    """Others stand in the place of samples that are None: the batch has as many as were read."""

    def collate(self, samples: list[Any]) -> Any:
        zeros = torch.zeros(3).double(), torch.ones(1).double()
        return default_collate([zeros if one is None else one for one in samples])


@pytest.mark.parametrize("strategy", ["ring", CUT], ids=str)
def test_samples_that_collate_fills_in_for_count(strategy: Any) -> None:
    fields: dict[str, Any] = {"steps": 2, "global_batch_size": BATCH, "data": {"shuffle": False}}
    one, several = (
        whole(train(job_of(how, workers, **fields), Filling, timeout_s=30))
        for how, workers in (("ring", 1), (strategy, 2))
    )
    task = Filling()
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for start in (0, BATCH):
        samples = [Broken()[at] for at in range(start, min(start + BATCH, SAMPLES))]
        inputs, targets = task.collate(samples)
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model(inputs), targets))
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(one[name], value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(several[name], value, rtol=1e-9, atol=1e-9)
