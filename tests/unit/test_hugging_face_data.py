"""Data sets of Hugging Face's `datasets`, by number and as streams."""

from typing import Any

import pytest
import torch
from local_run import train
from test_equivalence import same_bits
from test_streams import BATCH, Numbered, job, read, tensors
from torch import Tensor, nn

from distplat.strategies.task import Task

datasets = pytest.importorskip("datasets")


def columns() -> dict[str, Any]:
    inputs, targets = tensors()
    return {"inputs": inputs.tolist(), "targets": targets.tolist()}


class ByNumber(Numbered):
    def train_data(self) -> Any:
        return datasets.Dataset.from_dict(columns()).with_format("torch")

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        outputs: Tensor = model(batch["inputs"])
        return outputs

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().loss(outputs, batch["targets"])


class AsAStream(ByNumber):
    def train_data(self) -> Any:
        data = datasets.Dataset.from_dict(columns()).to_iterable_dataset()  # one shard: in order
        return data.with_format("torch")


@pytest.mark.parametrize("kind", [ByNumber, AsAStream])
@pytest.mark.parametrize("workers", [1, 3])
def test_they_train_to_the_bits_of_a_tensor_data_set(workers: int, kind: type[Task]) -> None:
    given = job("ring", workers)
    assert same_bits(train(given, kind), train(given, Numbered))


def test_their_shards_are_not_dealt_to_loaders() -> None:
    def numbers() -> Any:
        data = datasets.Dataset.from_dict({"n": [*range(37)]}).to_iterable_dataset(num_shards=3)
        return data.map(lambda row: {"n": row["n"] + 1}).with_format("torch")

    def read_by(loaders: int, world: int) -> list[list[int]]:
        found = read(Values(numbers()), world=world, data={"num_workers": loaders})
        return [[int(n) for n in batch] for batch in found]

    alone = read_by(0, 1)
    assert sorted(number for batch in alone[:5] for number in batch) == [*range(1, 38)]
    assert read_by(2, 2) == alone


class Values:
    """The numbers in its rows."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return (row["n"] for row in self.rows)


@pytest.mark.parametrize("buffer", [None, 8])
def test_a_stream_of_theirs_goes_on(buffer: int | None) -> None:
    """With its own state; and where it shuffles, which its state forgets, by counting."""

    class Shuffled(AsAStream):
        def train_data(self) -> Any:
            data = super().train_data()
            return data if buffer is None else data.shuffle(seed=3, buffer_size=buffer)

    given = job("ring", 1, steps=10, checkpoint={"every_steps": 3, "num_to_keep": 9})
    unfailed = train(given, Shuffled)
    mark = unfailed.checkpoints[3].state["stream"]
    assert (mark["number"], bool(mark["state"])) == (2 * BATCH, True)
    for version in (3, 6, 9):
        resumed = train(given, Shuffled, saved=unfailed.checkpoints[version])
        assert all(
            torch.equal(value, unfailed.parameters()[name])
            for name, value in resumed.parameters().items()
        )
