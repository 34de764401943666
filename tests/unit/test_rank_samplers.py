"""Loaders of a train function whose samplers already shard by rank."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from function_ranks import call_on_ranks
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler

import distplat
from distplat.platform.errors import SpecError
from distplat.strategies.function.batched_loader import BatchSamplerLoader
from distplat.strategies.function.sharded_loader import DataShard

pytestmark = pytest.mark.usefixtures("loader_server")


class Numbers(Dataset[int]):
    def __init__(self, count: int = 23) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class GroupedBatchSampler(BatchSampler):
    """Groups batches of a sampler that shards by rank, as torchvision's GroupedBatchSampler."""

    def __iter__(self) -> Iterator[list[int]]:
        order = [*self.sampler]
        return iter([order[:3], order[3:8], order[8:]])

    def __len__(self) -> int:
        return 3


class OwnSampler(Sampler[Any]):
    """Shards by rank and epoch; yields indices or batches of indices."""

    def __init__(self, rank: int, *, batches: bool, world: int = 2) -> None:
        self.rank, self.num_replicas, self.batches, self.epoch = rank, world, batches, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 2 if self.batches else 6

    def __iter__(self) -> Iterator[Any]:
        first = 10 * self.rank + self.epoch
        numbers = [*range(first, first + 6)]
        return iter([numbers[:2], numbers[2:]] if self.batches else numbers)


def grouped_loader(rank: int) -> DataLoader[int]:
    inner: DistributedSampler[int] = DistributedSampler(Numbers(), 2, rank, seed=3)
    return DataLoader(Numbers(), batch_sampler=GroupedBatchSampler(inner, 3, drop_last=False))


SHARDED_LOADERS: dict[str, Callable[[int], DataLoader[int]]] = {
    "batches": lambda rank: DataLoader(Numbers(), batch_sampler=OwnSampler(rank, batches=True)),
    "numbers": lambda rank: DataLoader(
        Numbers(), batch_size=4, sampler=OwnSampler(rank, batches=False)
    ),
    "grouped": grouped_loader,
}


@pytest.mark.parametrize("sampler_type", SHARDED_LOADERS)
def test_sharding_sampler_is_kept(sampler_type: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        plain, loader = (
            SHARDED_LOADERS[sampler_type](rank),
            distplat.prepare(SHARDED_LOADERS[sampler_type](rank)),
        )
        batches: Any = plain.batch_sampler
        for epoch in range(2):
            samplers = (batches, batches.sampler) if hasattr(batches, "sampler") else (batches,)
            for sampler in samplers:
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(epoch)
            assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in plain]

    call_on_ranks(train, 2)


def loaders_for(rank: int, world: int) -> dict[str, DataLoader[int]]:
    """Return loaders whose samplers have this rank and number of ranks."""
    distributed: DistributedSampler[int] = DistributedSampler(Numbers(), world, rank, shuffle=False)
    return {
        "batches": DataLoader(Numbers(), batch_sampler=OwnSampler(rank, batches=True, world=world)),
        "numbers": DataLoader(Numbers(), 2, sampler=OwnSampler(rank, batches=False, world=world)),
        "grouped": DataLoader(
            Numbers(), batch_sampler=GroupedBatchSampler(distributed, 3, drop_last=False)
        ),
        "torch's": DataLoader(Numbers(), 4, sampler=distributed),
    }


EXPECTED_BATCHES = {
    "batches": [[[0, 1]], [[2, 3, 4, 5]]],
    "numbers": [[[0, 2], [4]], [[1, 3], [5]]],
    "grouped": [[[0, 1, 2], [*range(8, 23)]], [[3, 4, 5, 6, 7], [0, 1, 2]]],
    "torch's": [
        [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 20, 22]],
        [[1, 3, 5, 7], [9, 11, 13, 15], [17, 19, 21, 0]],
    ],
}


@pytest.mark.parametrize("sampler_type", EXPECTED_BATCHES)
def test_sampler_of_a_single_rank_is_sharded(sampler_type: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        loader, rank = (
            distplat.prepare(loaders_for(0, 1)[sampler_type]),
            distplat.get_context().rank,
        )
        assert [batch.tolist() for batch in loader] == EXPECTED_BATCHES[sampler_type][rank]

    call_on_ranks(train, 2)


@pytest.mark.parametrize("sampler_type", loaders_for(0, 1))
@pytest.mark.parametrize("shift", [(0, 3), (1, 2)])
def test_sampler_of_another_rank_or_world_is_rejected(
    sampler_type: str, shift: tuple[int, int]
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        offset, world = shift
        rank = (distplat.get_context().rank + offset) % 2
        distplat.prepare(loaders_for(rank, world)[sampler_type])

    text = r"of rank \d, num_replicas [23], on rank \d of 2 workers.*get_world_size\(\)"
    with pytest.raises(SpecError, match=f"(?s){text}"):
        call_on_ranks(train, 2)


class StaleLength(Sampler[Any]):
    """Shards 24 indices; `len` is that of the previous epoch."""

    def __init__(self, rank: int, *, batches: bool) -> None:
        self.rank, self.num_replicas, self.batches, self.epoch = rank, 2, batches, 0
        self.count = 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        order = [*range(24)][self.rank :: 2]
        size = (6, 2, 3)[self.epoch]
        items: list[Any] = [order[first : first + size] for first in range(0, 12, size)]
        items = items if self.batches else order[: 2 * size]
        self.count = len(items)
        return iter(items)


@pytest.mark.parametrize("batches", [False, True])
def test_wrong_length_of_a_sharding_sampler_is_ignored(
    batches: bool,
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        sampler = StaleLength(distplat.get_context().rank, batches=batches)
        sampler.count = 12  # wrong for each epoch
        loader = distplat.prepare(
            DataLoader(Numbers(24), batch_sampler=sampler)
            if batches
            else DataLoader(Numbers(24), 5, sampler=sampler)
        )
        for epoch in range(3):
            found, samples = [], 0
            for batch in loader:
                samples += len(batch)
                found += distplat.gather_for_metrics(batch).tolist()
            assert samples == (12 if batches else (12, 4, 6)[epoch])
            assert sorted(found) == [*range(2 * samples)]
            distplat.report({"loss": 0.0})

    run = call_on_ranks(train, 2)
    counts = [getattr(report, "samples", None) for report in run.reports]
    assert counts == ([24] * 3 if batches else [24, 8, 12])


class Strided(DistributedSampler[Any]):
    """DistributedSampler with another order."""

    def __iter__(self) -> Iterator[Any]:
        return iter([*range(23)][self.rank :: 2][:11])


def test_distributed_sampler_with_another_order_repeats_nothing() -> None:
    def train(config: Mapping[str, Any]) -> None:
        sampler: Any = Strided(Numbers(21), 2, distplat.get_context().rank)
        loader = distplat.prepare(DataLoader(Numbers(21), 4, sampler=sampler))
        found = [distplat.gather_for_metrics(batch) for batch in loader]
        assert sorted(torch.cat(found).tolist()) == [*range(22)]

    call_on_ranks(train, 2)


@pytest.mark.parametrize("sampler_type", SHARDED_LOADERS)
def test_state_of_a_sharding_sampler_needs_the_same_world(sampler_type: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        loader, unit = distplat.prepare(SHARDED_LOADERS[sampler_type](rank)), "batches"
        if sampler_type == "numbers":
            unit = "samples"
        batches = iter(loader)
        next(batches)
        state = loader.state_dict()
        rest = [batch.tolist() for batch in batches]
        loader.load_state_dict(state)
        assert [batch.tolist() for batch in loader] == rest
        for other in ({"num_replicas": 4}, {}):
            state_of_other_world = {"epoch": 3, unit: 8, **other}
            with pytest.raises(ValueError, match=r"for 2 workers than.*set_epoch\(3\)"):
                loader.load_state_dict(state_of_other_world)
            loader.load_state_dict({**state_of_other_world, unit: 0})  # start of an epoch

    call_on_ranks(train, 2)


class CountsEpochs(OwnSampler):
    """Increments its epoch itself."""

    def __iter__(self) -> Iterator[Any]:
        items = super().__iter__()
        self.epoch += 1
        return items


@pytest.mark.parametrize("loaders", [0, 1])
def test_loaded_state_is_kept_if_the_sampler_counts_epochs(loaders: int) -> None:
    torch_loader = DataLoader(
        Numbers(), batch_sampler=CountsEpochs(0, batches=True), num_workers=loaders
    )
    loader = BatchSamplerLoader(
        torch_loader, DataShard(0, 2, 5), torch.device("cpu"), lambda *read: None
    )

    def read_epoch() -> list[list[int]]:
        return [batch.tolist() for batch in loader]

    expected = [read_epoch() for _ in range(3)]
    assert [epoch[0] for epoch in expected] == [[0, 1], [1, 2], [2, 3]]
    loader.load_state_dict({"epoch": 1, "batches": 2, "num_replicas": 2})
    assert [read_epoch() for _ in range(2)] == [expected[1][1:], expected[2]]
