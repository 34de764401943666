"""Samplers of a train function's loaders that deal out by rank themselves."""

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


class Odd(Dataset[int]):
    def __init__(self, count: int = 23) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class Grouped(BatchSampler):
    """As torchvision's: makes batches of what a sampler gives, which deals out by rank."""

    def __iter__(self) -> Iterator[list[int]]:
        order = [*self.sampler]
        return iter([order[:3], order[3:8], order[8:]])

    def __len__(self) -> int:
        return 3


class Mine(Sampler[Any]):
    """Its own rule, by rank and epoch; of numbers or of batches."""

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


def grouped(rank: int) -> DataLoader[int]:
    inner: DistributedSampler[int] = DistributedSampler(Odd(), 2, rank, seed=3)
    return DataLoader(Odd(), batch_sampler=Grouped(inner, 3, drop_last=False))


DEALING: dict[str, Callable[[int], DataLoader[int]]] = {
    "batches": lambda rank: DataLoader(Odd(), batch_sampler=Mine(rank, batches=True)),
    "numbers": lambda rank: DataLoader(Odd(), batch_size=4, sampler=Mine(rank, batches=False)),
    "grouped": grouped,
}


@pytest.mark.parametrize("kind", DEALING)
def test_one_that_deals_out_by_rank_itself_is_taken_as_it_is(kind: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        plain, loader = DEALING[kind](rank), distplat.prepare(DEALING[kind](rank))
        batches: Any = plain.batch_sampler
        for epoch in range(2):
            for one in (batches, batches.sampler) if hasattr(batches, "sampler") else (batches,):
                if hasattr(one, "set_epoch"):
                    one.set_epoch(epoch)
            assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in plain]

    call_on_ranks(train, 2)


def made_for(rank: int, world: int) -> dict[str, DataLoader[int]]:
    """Give loaders of which each has a sampler with a rank and a number of ranks."""
    dealing: DistributedSampler[int] = DistributedSampler(Odd(), world, rank, shuffle=False)
    return {
        "batches": DataLoader(Odd(), batch_sampler=Mine(rank, batches=True, world=world)),
        "numbers": DataLoader(Odd(), 2, sampler=Mine(rank, batches=False, world=world)),
        "grouped": DataLoader(Odd(), batch_sampler=Grouped(dealing, 3, drop_last=False)),
        "torch's": DataLoader(Odd(), 4, sampler=dealing),
    }


DEALT = {
    "batches": [[[0, 1]], [[2, 3, 4, 5]]],
    "numbers": [[[0, 2], [4]], [[1, 3], [5]]],
    "grouped": [[[0, 1, 2], [*range(8, 23)]], [[3, 4, 5, 6, 7], [0, 1, 2]]],
    "torch's": [
        [[0, 2, 4, 6], [8, 10, 12, 14], [16, 18, 20, 22]],
        [[1, 3, 5, 7], [9, 11, 13, 15], [17, 19, 21, 0]],
    ],
}


@pytest.mark.parametrize("kind", DEALT)
def test_one_that_knows_of_a_single_rank_is_dealt_out(kind: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        loader, rank = distplat.prepare(made_for(0, 1)[kind]), distplat.get_context().rank
        assert [batch.tolist() for batch in loader] == DEALT[kind][rank]

    call_on_ranks(train, 2)


@pytest.mark.parametrize("kind", made_for(0, 1))
@pytest.mark.parametrize("shift", [(0, 3), (1, 2)])
def test_one_of_another_rank_or_number_of_ranks_is_refused(
    kind: str, shift: tuple[int, int]
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        other, world = shift
        rank = (distplat.get_context().rank + other) % 2
        distplat.prepare(made_for(rank, world)[kind])

    text = r"of rank \d, num_replicas [23], on rank \d of 2 workers.*get_world_size\(\)"
    with pytest.raises(SpecError, match=f"(?s){text}"):
        call_on_ranks(train, 2)


class Stale(Sampler[Any]):
    """A rank's part of 24 numbers; its length is that of the pass before."""

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
        given: list[Any] = [order[first : first + size] for first in range(0, 12, size)]
        given = given if self.batches else order[: 2 * size]
        self.count = len(given)
        return iter(given)


@pytest.mark.parametrize("batches", [False, True])
def test_what_one_gives_that_deals_out_itself_counts_whatever_its_length_says(
    batches: bool,
) -> None:
    def train(config: Mapping[str, Any]) -> None:
        given = Stale(distplat.get_context().rank, batches=batches)
        given.count = 12  # of no pass
        loader = distplat.prepare(
            DataLoader(Odd(24), batch_sampler=given)
            if batches
            else DataLoader(Odd(24), 5, sampler=given)
        )
        for epoch in range(3):
            found, mine = [], 0
            for batch in loader:
                mine += len(batch)
                found += distplat.gather_for_metrics(batch).tolist()
            assert mine == (12 if batches else (12, 4, 6)[epoch])
            assert sorted(found) == [*range(2 * mine)]
            distplat.report({"loss": 0.0})

    run = call_on_ranks(train, 2)
    counted = [getattr(one, "samples", None) for one in run.reports]
    assert counted == ([24] * 3 if batches else [24, 8, 12])


class InPieces(DistributedSampler[Any]):
    """Torch's with an order of its own: rank r has the r-th piece."""

    def __iter__(self) -> Iterator[Any]:
        return iter([*range(23)][self.rank :: 2][:11])


def test_torchs_own_with_another_order_repeats_nothing_either() -> None:
    def train(config: Mapping[str, Any]) -> None:
        given: Any = InPieces(Odd(21), 2, distplat.get_context().rank)
        loader = distplat.prepare(DataLoader(Odd(21), 4, sampler=given))
        found = [distplat.gather_for_metrics(batch) for batch in loader]
        assert sorted(torch.cat(found).tolist()) == [*range(22)]

    call_on_ranks(train, 2)


@pytest.mark.parametrize("kind", DEALING)
def test_the_position_in_one_that_deals_out_itself_is_for_as_many_ranks(kind: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        loader, counted = distplat.prepare(DEALING[kind](rank)), "batches"
        if kind == "numbers":
            counted = "samples"
        passed = iter(loader)
        next(passed)
        state = loader.state_dict()
        rest = [batch.tolist() for batch in passed]
        loader.load_state_dict(state)
        assert [batch.tolist() for batch in loader] == rest
        for other in ({"num_replicas": 4}, {}):
            earlier = {"epoch": 3, counted: 8, **other}
            with pytest.raises(ValueError, match=r"for 2 workers than.*set_epoch\(3\)"):
                loader.load_state_dict(earlier)
            loader.load_state_dict({**earlier, counted: 0})  # no part has begun

    call_on_ranks(train, 2)


class Passes(Mine):
    """Counts its passes itself."""

    def __iter__(self) -> Iterator[Any]:
        given = super().__iter__()
        self.epoch += 1
        return given


@pytest.mark.parametrize("loaders", [0, 1])
def test_a_position_that_is_loaded_stays_where_a_sampler_counts_its_passes(loaders: int) -> None:
    given = DataLoader(Odd(), batch_sampler=Passes(0, batches=True), num_workers=loaders)
    loader = BatchSamplerLoader(given, DataShard(0, 2, 5), torch.device("cpu"), lambda *read: None)

    def a_pass() -> list[list[int]]:
        return [batch.tolist() for batch in loader]

    wanted = [a_pass() for _ in range(3)]
    assert [one[0] for one in wanted] == [[0, 1], [1, 2], [2, 3]]
    loader.load_state_dict({"epoch": 1, "batches": 2, "num_replicas": 2})
    assert [a_pass() for _ in range(2)] == [wanted[1][1:], wanted[2]]
