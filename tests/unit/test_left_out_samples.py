"""`collate` drops samples that are None: the mean is over the remaining samples."""

from typing import Any

import pytest
import torch
from hybrid_models import merge_parts
from in_memory_engine import task_factory, to_trained
from jobs import job_of
from local_run import evaluations, train
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from distplat import Task
from distplat.strategies.loop.batches import count_samples
from distplat.strategies.verification.recipes import ReferenceSamples, recipe_of, split_batches
from distplat.strategies.verification.reference import train as train_reference
from distplat.strategies.verification.switched import Switches

SAMPLES, BATCH, STEPS = 22, 12, 4


class UnreadableSamples(Dataset[Any]):
    """Every fifth sample is None, and two consecutive ones."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(SAMPLES, 3, generator=generator).double()
        self.y = self.x.sum(1, keepdim=True).sin()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return None if index % 5 == 0 or index in {6, 7} else (self.x[index], self.y[index])


class Rows(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return (UnreadableSamples()[index] for index in range(SAMPLES))

    def __len__(self) -> int:
        return SAMPLES


class DropsNone(Task):
    data: type[Dataset[Any]] = UnreadableSamples

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def train_data(self) -> Any:
        return self.data()

    def eval_data(self) -> Any:
        return self.data()

    def collate(self, samples: list[Any]) -> Any:
        return default_collate([sample for sample in samples if sample is not None])

    def loss(self, outputs: Any, targets: Any) -> Any:
        return nn.functional.mse_loss(outputs, targets)

    def metrics(self, outputs: Any, targets: Any) -> dict[str, Any]:
        return {"distance": (outputs - targets).abs().mean()}


class StreamDropsNone(DropsNone):
    data = Rows


class FlaggedSamples(Dataset[Any]):
    """The same samples, with a flag `bad` instead of None."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        data = UnreadableSamples()
        return {"x": data.x[index], "y": data.y[index], "bad": data[index] is None}


class DropsFlagged(DropsNone):
    """Drops samples by their flag."""

    data = FlaggedSamples

    def collate(self, samples: list[Any]) -> Any:
        return default_collate([(s["x"], s["y"]) for s in samples if not s["bad"]])


class SummedLoss(DropsNone):
    """Returns a summed loss with its weight."""

    def loss(self, outputs: Any, targets: Any) -> Any:
        return nn.functional.mse_loss(outputs, targets, reduction="sum"), len(targets)


def plain_loop() -> tuple[dict[str, Tensor], dict[str, float]]:
    task, data = DropsNone(), UnreadableSamples()
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        start = step % 2 * BATCH
        samples = [data[index] for index in range(start, min(start + BATCH, SAMPLES))]
        inputs, targets = task.collate(samples)
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model(inputs), targets))
        optimizer.step()
    inputs, targets = task.collate([*map(data.__getitem__, range(SAMPLES))])
    with torch.no_grad():
        outputs = model(inputs)
        metrics = {name: float(value) for name, value in task.metrics(outputs, targets).items()}
        metrics["loss"] = float(task.loss(outputs, targets))
    return model.state_dict(), metrics


PIPELINE = {"name": "hybrid", "pipeline": 2, "micro_batches": 2, "cut": "even"}


@pytest.mark.parametrize(
    ("strategy", "workers", "task_type", "fields"),
    [
        ("ring", 3, DropsNone, {}),
        ("ring", 2, DropsNone, {"gradient_accumulation": 2}),
        ("ring", 2, StreamDropsNone, {}),
        ("ring", 2, SummedLoss, {}),
        ("ring", 3, DropsFlagged, {}),
        ("ring", 2, DropsFlagged, {"gradient_accumulation": 2}),
        ("ps-sync", 2, DropsFlagged, {}),
        (PIPELINE, 2, DropsFlagged, {}),
        ("ps-sync", 2, DropsNone, {}),
        ("ps-async", 1, DropsNone, {}),
        (PIPELINE, 2, DropsNone, {}),
        ({**PIPELINE, "data": 2}, 4, DropsNone, {}),
    ],
    ids=str,
)
def test_mean_excludes_dropped_samples(
    strategy: Any, workers: int, task_type: type[Task], fields: dict[str, Any]
) -> None:
    all_fields = {"steps": STEPS, "global_batch_size": BATCH, "data": {"shuffle": False}, **fields}
    run = train(job_of(strategy, workers, **all_fields), task_type, timeout_s=30)
    found, (expected, metrics) = merge_parts(run), plain_loop()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
    last = evaluations(run)[-1]
    assert last.samples == SAMPLES
    assert dict(last.metrics) == pytest.approx(metrics, rel=1e-9)


X, Y, NUMBER = torch.zeros(3), torch.zeros(1), torch.tensor(0.5)
FOUR, TWO = [(X, Y)] * 4, torch.zeros(2, 3)
COUNTED: dict[str, tuple[Any, list[Any], int]] = {
    "two dropped": ([TWO, torch.zeros(2, 1)], FOUR, 2),
    "numbers": (torch.zeros(3), [1.0] * 4, 3),
    "with a constant": ([TWO, torch.tensor(0.5)], FOUR, 2),
    "two None, one dropped": (TWO, [None, X, X, None, X], 2),
    "time first": (torch.zeros(2, 4, 3), [torch.zeros(2, 3)] * 4, 4),
    "packed": (torch.zeros(2, 5), [torch.zeros(5), *[torch.zeros(2)] * 3], 4),
    "a list of rows": ([TWO[0], TWO[1]], FOUR, 4),
    "lists of fields": ([[X] * 4, [NUMBER] * 4], [(X, NUMBER)] * 4, 4),
    "a list of samples": ([(X, NUMBER)] * 4, [(X, NUMBER)] * 4, 4),
    "a list of dicts": ([{"x": X, "y": NUMBER}] * 4, [{"x": X, "y": NUMBER}] * 4, 4),
    "as many numbers as fields": ([TWO.T, X], [(TWO[:, 0], NUMBER)] * 4, 3),
    "other rows": (torch.zeros(2, 7), FOUR, 4),
    "with text": ([TWO, "ab"], FOUR, 4),
    "more rows": (torch.zeros(6, 3), FOUR, 4),
    "all dropped": ([torch.zeros(0, 3), torch.zeros(0, 1)], FOUR, 0),
    "all None, dropped": ([torch.zeros(0, 3), torch.zeros(0, 1)], [None] * 4, 0),
    "all None, with text": ([torch.zeros(0, 3), "ab"], [None] * 4, 4),
    "without boxes": (torch.zeros(0, 7), FOUR, 4),
}


@pytest.mark.parametrize("name", COUNTED)
def test_count_samples(name: str) -> None:
    batch, samples, expected = COUNTED[name]
    assert count_samples(batch, samples) == expected


class IgnoresSamples(DropsNone):
    """Creates batches from samples that are all None."""

    def train_data(self) -> Any:
        return [None] * SAMPLES

    def eval_data(self) -> Any:
        return None

    def collate(self, samples: list[Any]) -> Any:
        data = UnreadableSamples()
        return data.x[: len(samples)], data.y[: len(samples)]


def test_samples_count_if_all_are_none() -> None:
    fields: dict[str, Any] = {"steps": 2, "global_batch_size": BATCH}
    run = train(job_of("ring", 2, **fields), IgnoresSamples)
    torch.manual_seed(0)
    model = IgnoresSamples().model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for size in (BATCH, SAMPLES - BATCH):
        inputs, targets = IgnoresSamples().collate([None] * (size // 2))
        optimizer.zero_grad()
        torch.autograd.backward(IgnoresSamples().loss(model(inputs), targets))
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.trained[0][name], value, rtol=1e-9, atol=1e-9)


class RareSamples(UnreadableSamples):
    """A third of each batch is left, so that a worker's part may have no samples."""

    def __getitem__(self, index: int) -> Any:
        return None if index % BATCH >= BATCH // 3 else (self.x[index], self.y[index])


class DropsPart(DropsNone):
    """Returns a batch without rows if all samples of a part are None: its mean loss is NaN."""

    data: type[Dataset[Any]] = RareSamples

    def collate(self, samples: list[Any]) -> Any:
        remaining = [sample for sample in samples if sample is not None]
        empty = torch.zeros(0, 3).double(), torch.zeros(0, 1).double()
        return default_collate(remaining) if remaining else empty


class FlaggedRareSamples(FlaggedSamples):
    def __getitem__(self, index: int) -> Any:
        return {**super().__getitem__(index), "bad": RareSamples()[index] is None}


class DropsFlaggedPart(DropsPart):
    data = FlaggedRareSamples

    def collate(self, samples: list[Any]) -> Any:
        return super().collate([None if s["bad"] else (s["x"], s["y"]) for s in samples])


@pytest.mark.parametrize("task_type", [DropsPart, DropsFlaggedPart])
@pytest.mark.parametrize("strategy", ["ring", "ps-sync", PIPELINE], ids=str)
def test_part_without_samples_does_not_count(strategy: Any, task_type: type[Task]) -> None:
    fields: dict[str, Any] = {
        "steps": STEPS,
        "global_batch_size": BATCH,
        "data": {"shuffle": False},
    }
    single = train(job_of("ring", 1, **fields), task_type)
    several = train(job_of(strategy, 2, **fields), task_type)
    found = merge_parts(several)
    for name, value in single.parameters().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
    (expected,), (last,) = evaluations(single)[-1:], evaluations(several)[-1:]
    assert dict(last.metrics) == pytest.approx(dict(expected.metrics), rel=1e-9)


def test_verification_reference_omits_part_without_samples() -> None:
    fields: dict[str, Any] = {"steps": STEPS, "global_batch_size": BATCH}
    checkpoint = {"every_steps": 1, "num_to_keep": STEPS}
    job = job_of("ring", 2, **fields, data={"shuffle": False}, checkpoint=checkpoint)
    schedule, new_task = split_batches(job, ReferenceSamples(SAMPLES)), task_factory(DropsPart)
    recipe = recipe_of(job, new_task(Switches()))
    reference = train_reference(lambda: new_task(Switches()), schedule, recipe)
    assert reference.losses == pytest.approx(to_trained(job, train(job, DropsPart)).losses)


class FillsNone(DropsNone):
    """Replaces samples that are None, so that the batch keeps its size."""

    def collate(self, samples: list[Any]) -> Any:
        zeros = torch.zeros(3).double(), torch.ones(1).double()
        return default_collate([zeros if sample is None else sample for sample in samples])


@pytest.mark.parametrize("strategy", ["ring", PIPELINE], ids=str)
def test_samples_replaced_by_collate_count(strategy: Any) -> None:
    fields: dict[str, Any] = {"steps": 2, "global_batch_size": BATCH, "data": {"shuffle": False}}
    single, several = (
        merge_parts(train(job_of(name, workers, **fields), FillsNone, timeout_s=30))
        for name, workers in (("ring", 1), (strategy, 2))
    )
    task = FillsNone()
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for start in (0, BATCH):
        samples = [
            UnreadableSamples()[index] for index in range(start, min(start + BATCH, SAMPLES))
        ]
        inputs, targets = task.collate(samples)
        optimizer.zero_grad()
        torch.autograd.backward(task.loss(model(inputs), targets))
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(single[name], value, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(several[name], value, rtol=1e-9, atol=1e-9)
