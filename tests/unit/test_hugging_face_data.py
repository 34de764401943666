"""Data sets of Hugging Face's `datasets`, by number and as streams."""

import json
from typing import Any

import pytest
import torch
from comparison import same_bits
from local_run import train
from prepared_loaders import loader_of
from stream_task import BATCH, Numbered, job, read, tensors
from torch import Tensor, nn

from distplat.strategies.function.sharded_loader import ShardedLoader
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


@pytest.mark.sweep(2)
@pytest.mark.parametrize("loaders", [0, 2])
@pytest.mark.parametrize("buffer", [None, 4])
def test_in_a_train_function_ranks_get_their_parts_and_go_on(
    buffer: int | None, loaders: int
) -> None:
    def new(rank: int) -> ShardedLoader:
        data = datasets.Dataset.from_dict({"n": [*range(21)]}).to_iterable_dataset(num_shards=3)
        data = data if buffer is None else data.shuffle(seed=3, buffer_size=buffer)
        return loader_of(data.with_format("torch"), rank, 2, num_workers=loaders)

    ranks = [new(rank) for rank in range(2)]
    whole = [[[batch["n"].tolist() for batch in one] for _ in range(2)] for one in ranks]
    for epoch in range(2):
        numbers = [n for rank in whole for batch in rank[epoch] for n in batch]
        assert sorted(numbers) == sorted([*range(21), whole[0][epoch][0][0]])
    assert (whole[0][0] != whole[0][1]) == (buffer is not None), "shuffled anew by the epoch"
    leader = new(0)
    leader.set_epoch(1)
    batches = iter(leader)
    assert [next(batches)["n"].tolist() for _ in range(2)] == whole[0][1][:2]
    state = json.loads(json.dumps(leader.state_dict()))
    assert bool(state["stream"]["state"]), "their stream has a state"
    resumed = new(1)
    resumed.load_state_dict(state)
    assert [batch["n"].tolist() for batch in resumed] == whole[1][1][2:]
