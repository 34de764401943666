"""Hugging Face `datasets`: map-style and iterable."""

import json
from typing import Any

import pytest
import torch
from comparison import same_bits
from local_run import train
from prepared_loaders import prepare_loader
from stream_task import BATCH, MapStyleTask, job, read_steps, tensors
from torch import Tensor, nn

from distplat.strategies.function.sharded_loader import ShardedLoader
from distplat.strategies.task import Task

datasets = pytest.importorskip("datasets")


def columns() -> dict[str, Any]:
    inputs, targets = tensors()
    return {"inputs": inputs.tolist(), "targets": targets.tolist()}


class MapStyle(MapStyleTask):
    def train_data(self) -> Any:
        return datasets.Dataset.from_dict(columns()).with_format("torch")

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        outputs: Tensor = model(batch["inputs"])
        return outputs

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().loss(outputs, batch["targets"])


class IterableStyle(MapStyle):
    def train_data(self) -> Any:
        data = datasets.Dataset.from_dict(columns()).to_iterable_dataset()  # one shard: in order
        return data.with_format("torch")


@pytest.mark.parametrize("task_type", [MapStyle, IterableStyle])
@pytest.mark.parametrize("workers", [1, 3])
def test_matches_tensor_data_set_bit_for_bit(workers: int, task_type: type[Task]) -> None:
    spec = job("ring", workers)
    assert same_bits(train(spec, task_type), train(spec, MapStyleTask))


@pytest.mark.usefixtures("loader_server")
def test_iterable_shards_are_not_divided_among_loaders() -> None:
    def shifted_numbers() -> Any:
        data = datasets.Dataset.from_dict({"n": [*range(37)]}).to_iterable_dataset(num_shards=3)
        return data.map(lambda row: {"n": row["n"] + 1}).with_format("torch")

    def read_batches(loaders: int, world: int) -> list[list[int]]:
        batches = read_steps(Values(shifted_numbers()), world=world, data={"num_workers": loaders})
        return [[int(n) for n in batch] for batch in batches]

    single_rank = read_batches(0, 1)
    assert sorted(number for batch in single_rank[:5] for number in batch) == [*range(1, 38)]
    assert read_batches(2, 2) == single_rank


class Values:
    """Yields the number of each row."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return (row["n"] for row in self.rows)


@pytest.mark.parametrize("buffer", [None, 8])
def test_stream_resumes_from_checkpoint(buffer: int | None) -> None:
    """From the stream's own state, or by counting if it shuffles: its state omits the buffer."""

    class Shuffled(IterableStyle):
        def train_data(self) -> Any:
            data = super().train_data()
            return data if buffer is None else data.shuffle(seed=3, buffer_size=buffer)

    spec = job("ring", 1, steps=10, checkpoint={"every_steps": 3, "num_to_keep": 9})
    uninterrupted = train(spec, Shuffled)
    position = uninterrupted.checkpoints[3].state["stream"]
    assert (position["number"], bool(position["state"])) == (2 * BATCH, True)
    for version in (3, 6, 9):
        resumed = train(spec, Shuffled, saved=uninterrupted.checkpoints[version])
        assert all(
            torch.equal(value, uninterrupted.parameters()[name])
            for name, value in resumed.parameters().items()
        )


@pytest.mark.sweep(2)
@pytest.mark.parametrize("loaders", [0, 2])
@pytest.mark.parametrize("buffer", [None, 4])
def test_sharded_loader_splits_by_rank_and_resumes(buffer: int | None, loaders: int) -> None:
    def new_loader(rank: int) -> ShardedLoader:
        data = datasets.Dataset.from_dict({"n": [*range(21)]}).to_iterable_dataset(num_shards=3)
        data = data if buffer is None else data.shuffle(seed=3, buffer_size=buffer)
        return prepare_loader(data.with_format("torch"), rank, 2, num_workers=loaders)

    rank_loaders = [new_loader(rank) for rank in range(2)]
    batches_by_rank = [
        [[batch["n"].tolist() for batch in loader] for _ in range(2)] for loader in rank_loaders
    ]
    for epoch in range(2):
        numbers = [n for rank in batches_by_rank for batch in rank[epoch] for n in batch]
        assert sorted(numbers) == sorted([*range(21), batches_by_rank[0][epoch][0][0]])
    assert (batches_by_rank[0][0] != batches_by_rank[0][1]) == (buffer is not None), (
        "a shuffle depends on the epoch"
    )
    leader = new_loader(0)
    leader.set_epoch(1)
    batches = iter(leader)
    assert [next(batches)["n"].tolist() for _ in range(2)] == batches_by_rank[0][1][:2]
    state = json.loads(json.dumps(leader.state_dict()))
    assert bool(state["stream"]["state"]), "the stream has a state"
    resumed = new_loader(1)
    resumed.load_state_dict(state)
    assert [batch["n"].tolist() for batch in resumed] == batches_by_rank[1][1][2:]
