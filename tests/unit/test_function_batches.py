"""Loaders with a `batch_sampler`, or with a sampler of batches, in a train function."""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from function_ranks import call_on_ranks, function_job
from plain_functions import assert_equal, data_of, loss_of, model_of, momentum
from torch import Tensor
from torch.autograd import backward
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

import distplat
from distplat.platform.errors import SpecError
from distplat.strategies.function.batched_loader import BatchSamplerLoader
from distplat.strategies.function.sharded_loader import DataShard, RankBatch

pytestmark = pytest.mark.usefixtures("loader_server")


class Buckets(Sampler[list[int]]):
    """Batches of several sizes, whose order and number depend on the epoch."""

    def __init__(self, count: int = 23, *, drop_last: bool = False) -> None:
        self.count, self.drop_last, self.epoch = count, drop_last, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def batches(self) -> list[list[int]]:
        rng = random.Random(self.epoch)  # ranks share the global generator here
        order, batches = rng.sample(range(self.count), self.count), []
        while order:
            size = rng.randint(1, 4)
            batches.append(order[:size])
            order = order[size:]
        return batches

    def __len__(self) -> int:
        return len(self.batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches())


def batches_of(epoch: int, drop_last: bool = False) -> list[list[int]]:
    buckets = Buckets(drop_last=drop_last)
    buckets.set_epoch(epoch)
    return buckets.batches()


def steps_of(epoch: int, world: int, drop_last: bool) -> list[list[list[int]]]:
    """Return the batches of all ranks by step; an incomplete step is dropped or filled."""
    batches = batches_of(epoch)
    steps = [batches[first : first + world] for first in range(0, len(batches), world)]
    if len(steps[-1]) < world:
        incomplete = steps.pop()
        steps += [] if drop_last else [[*incomplete, *batches[: world - len(incomplete)]]]
    return steps


# --- training ---------------------------------------------------------------------------------


def rows_of(numbers: list[int]) -> list[Tensor]:
    return [tensor[numbers] for tensor in data_of().tensors]


def plain_loop(world: int, drop_last: bool) -> dict[str, Tensor]:
    """Train in one process on the mean over ranks of their mean losses."""
    model = model_of()
    optimizer = momentum(model.parameters())
    for epoch in range(2):
        for step in steps_of(epoch, world, drop_last):
            backward(sum(loss_of(model, rows_of(batch)) for batch in step) / world)  # type: ignore[arg-type]
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.sweep(3)
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("strategy", "world"), [("ring", 2), ("ring", 3), ("ps-sync", 3)])
def test_step_averages_the_mean_losses_of_ranks(strategy: str, world: int, drop_last: bool) -> None:
    def train(config: Mapping[str, Any]) -> None:
        model = model_of()
        optimizer = momentum(model.parameters())
        loader = DataLoader(data_of(), batch_sampler=Buckets(drop_last=drop_last))
        model, optimizer, loader = distplat.prepare(model, optimizer, loader)
        for _ in range(2):
            for batch in loader:
                backward(loss_of(model, batch))
                optimizer.step()
                optimizer.zero_grad()

    run = call_on_ranks(train, job=function_job(world, strategy=strategy))
    assert_equal(run.trained[1], plain_loop(world, drop_last))


# --- the batches of a rank --------------------------------------------------------------------


class Indices(Dataset[int]):
    def __init__(self, count: int = 23) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def prepared(
    rank: int = 0, world: int = 2, sampler: Any = None, **options: Any
) -> BatchSamplerLoader:
    """Prepare a loader for one rank, without the others."""

    def on_batch(loader: object, batch: RankBatch | None, waited_s: float, epoch: int) -> None:
        del loader, batch, waited_s, epoch

    loader = DataLoader(Indices(), batch_sampler=sampler or Buckets(), **options)
    return BatchSamplerLoader(loader, DataShard(rank, world, 5), torch.device("cpu"), on_batch)


def read_epoch(loader: BatchSamplerLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize(("loaders", "ranks"), [(0, [0, 1, 2]), (1, [1])])
def test_batches_are_assigned_round_robin(loaders: int, ranks: list[int]) -> None:
    for rank in ranks:
        loader = prepared(rank, 3, num_workers=loaders, persistent_workers=loaders > 0)
        for epoch in range(3):
            expected = [step[rank] for step in steps_of(epoch, 3, drop_last=False)]
            assert read_epoch(loader) == expected
            assert len(loader) == len(expected)
        loader.batch_sampler.set_epoch(1)  # as in loops under DDP
        assert read_epoch(loader)[0] == batches_of(1)[rank]
    assert len({len(batches_of(epoch)) for epoch in range(3)}) > 1, "epochs have different lengths"


def test_set_epoch_of_the_own_batch_sampler() -> None:
    buckets = Buckets()
    loader = prepared(1, 2, buckets)
    for epoch in (4, 2):
        buckets.set_epoch(epoch)
        assert read_epoch(loader)[0] == batches_of(epoch)[1]


def test_set_epoch_may_repeat_an_epoch() -> None:
    buckets = Buckets()
    loader = prepared(1, 2, buckets)
    for set_epoch in (buckets.set_epoch, loader.sampler.set_epoch, loader.set_epoch):
        for epoch in (0, 0, 0, 2, 2):
            set_epoch(epoch)
            assert read_epoch(loader)[0] == batches_of(epoch)[1]
        assert read_epoch(loader)[0] == batches_of(3)[1], "the next epoch follows"


def test_length_follows_set_epoch() -> None:
    expected = {epoch: -(-len(batches_of(epoch)) // 2) for epoch in range(9)}
    buckets = Buckets()
    loader = prepared(1, 2, buckets)
    for epoch in range(9):
        loader.set_epoch(epoch)
        assert len(loader) == expected[epoch]
        loader.load_state_dict({"epoch": (epoch + 4) % 9, "batches": 2})
        assert len(loader) == expected[(epoch + 4) % 9]
        buckets.set_epoch(epoch)
        assert len(loader) == expected[epoch]
        assert len(read_epoch(loader)) == expected[epoch] == len(loader)
    assert len({*expected.values()}) > 2


def test_position_at_the_end_of_an_epoch() -> None:
    loader = prepared(1, 2)
    loader.load_state_dict({"epoch": 2, "batches": 2 * -(-len(batches_of(2)) // 2)})
    assert read_epoch(loader) == []
    assert read_epoch(loader)[0] == batches_of(3)[1]


def test_batch_sampler_that_counts_epochs_resumes() -> None:
    class Counting(Buckets):
        def __iter__(self) -> Iterator[list[int]]:
            batches = self.batches()
            self.epoch += 1
            return iter(batches)

    loader = prepared(1, 2, Counting())
    for epoch in range(2):
        assert read_epoch(loader)[0] == batches_of(epoch)[1]
    resumed = prepared(1, 2, Counting())
    resumed.load_state_dict({"epoch": 5, "batches": 2})
    assert read_epoch(resumed)[0] == batches_of(5)[3]


@pytest.mark.parametrize("strategy", ["ring", "ps-async"])
def test_gather_for_metrics_has_every_sample_once(strategy: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        loader = distplat.prepare(DataLoader(Indices(), batch_sampler=Buckets()))
        for _ in range(3):
            gathered = [distplat.gather_for_metrics(batch) for batch in loader]
            assert sorted(torch.cat(gathered).tolist()) == [*range(23)]

    call_on_ranks(train, job=function_job(3, strategy=strategy))


@pytest.mark.parametrize("steps", range(11))
def test_resumes_at_the_position_of_a_checkpoint(steps: int) -> None:
    leader = prepared()
    batches = (batch for _ in range(3) for batch in leader)
    for _ in range(steps):
        next(batches)
    state = leader.state_dict()
    for rank in range(2):
        whole = prepared(rank)
        expected = [batch for _ in range(3) for batch in read_epoch(whole)]
        resumed = prepared(rank)
        resumed.load_state_dict(state)
        rest = [batch for _ in range(state["epoch"], 3) for batch in read_epoch(resumed)]
        assert rest == expected[steps:]


def test_rejects_a_position_inside_of_a_step() -> None:
    loader = prepared(0, 2)
    with pytest.raises(
        ValueError, match=r"3 batches into epoch 1 is not the start of a step of 2 workers"
    ):
        loader.load_state_dict({"epoch": 1, "batches": 3})
    with pytest.raises(ValueError, match=r"'epoch' and 'batches'; got a mapping of epoch, samples"):
        loader.load_state_dict({"epoch": 1, "samples": 4})


def reused_list() -> Iterator[Any]:
    batch: list[int] = []
    for number in range(23):
        batch.append(number)
        if len(batch) == 4:
            yield batch
            batch.clear()
    yield batch


def reused_array(buffer: Any) -> Iterator[Any]:
    for first in range(0, 20, 2):
        for offset in range(2):
            buffer[offset] = first + offset
        yield buffer


class CustomSampler(Sampler[Any]):
    """A sampler of batches from a function, with or without a length."""

    def __init__(self, batches: Callable[[], Iterator[Any]], length: Any = None) -> None:
        self.batches, self.length = batches, length

    def __iter__(self) -> Iterator[Any]:
        return self.batches()

    def __len__(self) -> int:
        if isinstance(self.length, Exception):
            raise self.length
        return int(self.length)  # TypeError if None


@pytest.mark.parametrize(
    "batches",
    [
        reused_list,
        lambda: reused_array(np.empty(2, np.int64)),
        lambda: reused_array(torch.empty(2, dtype=torch.int64)),
        lambda: map(iter, [[1, 2], [3], [4, 5], [6]]),
    ],
)
def test_batches_are_copied(batches: Callable[[], Iterator[Any]]) -> None:
    expected = [[int(number) for number in batch] for batch in batches()]
    for rank in range(2):
        assert (
            read_epoch(prepared(rank, 2, CustomSampler(batches, len(expected))))[:2]
            == expected[rank::2][:2]
        )


@pytest.mark.parametrize("error", [None, ValueError("num_steps"), NotImplementedError()])
def test_batch_sampler_without_length(error: Exception | None) -> None:
    def train(config: Mapping[str, Any]) -> None:
        sampler = CustomSampler(lambda: iter(batches_of(0)), error)
        loader = distplat.prepare(DataLoader(Indices(), batch_sampler=sampler))
        expected = [step[distplat.get_context().rank] for step in steps_of(0, 2, drop_last=False)]
        assert read_epoch(loader) == expected and len(loader) == len(expected)

    call_on_ranks(train, 2)


# --- data sets that are indexed with whole batches --------------------------------------------


class BatchIndices(Indices):
    """A data set that reads many rows at once, like those of Hugging Face."""

    def __getitem__(self, index: Any) -> Any:
        assert isinstance(index, list)
        return torch.tensor(index)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_sampler_of_batches_matches_batch_size(world: int, drop_last: bool) -> None:
    def train(config: Mapping[str, Any]) -> None:
        order = BatchSampler(range(23), 4, drop_last)
        whole = DataLoader(BatchIndices(), batch_size=None, sampler=order)
        single = DataLoader(Indices(), batch_size=4, drop_last=drop_last)
        whole, single = distplat.prepare(whole, single)
        assert (len(whole), whole.batch_size) == (len(single), 4)
        for _ in range(2):
            assert [b.tolist() for b in whole] == [b.tolist() for b in single]

    call_on_ranks(train, world)


def test_sampler_of_batches_of_several_sizes() -> None:
    class Uneven(BatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            return iter([[0, 1], [2], [3, 4, 5]])

        def __len__(self) -> int:
            return 3

    def train(config: Mapping[str, Any]) -> None:
        unprepared = DataLoader(BatchIndices(), batch_size=None, sampler=Uneven(range(6), 2, False))
        loader, rank = distplat.prepare(unprepared), distplat.get_context().rank
        expected = [[0, 1], [3, 4, 5]] if rank == 0 else [[2], [0, 1]]
        assert [batch.tolist() for batch in loader] == expected

    call_on_ranks(train, 2)


# --- unsupported ------------------------------------------------------------------------------


class Reshuffling(Buckets):
    """Keeps a generator, so that each pass has other batches."""

    generator = random.Random(1)

    def batches(self) -> list[list[int]]:
        return [[number] for number in self.generator.sample(range(9), 9)]


class MixedSizes(BatchSampler):
    """A `BatchSampler` whose batches do not have its batch size."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0], [1, 2], [3, 4]])

    def __len__(self) -> int:
        return 3


def endless(limit: int) -> Iterator[list[int]]:
    for _ in range(limit + 1):
        yield [0]
    raise AssertionError("read more batches than the limit")


class RankBatches(Buckets):
    """Yields the batches of one rank, without `rank` and `num_replicas`."""

    def batches(self) -> list[list[int]]:
        return super().batches()[distplat.get_context().rank :: 2]


UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "no end": (
        lambda: CustomSampler(lambda: endless(500), 5),
        "a CustomSampler, which yields more than 500 batches in a pass.*end its __iter__",
    ),
    "no end, no length": (
        lambda: CustomSampler(lambda: endless(2300)),
        "yields more than 2300 batches",
    ),
    "draws": (Reshuffling, "a Reshuffling, which yields another order in each"),
    "by rank": (
        RankBatches,
        "another order on rank 1 than on rank 0.*attributes rank and num_replicas",
    ),
    "too few, of a size": (
        lambda: MixedSizes(range(5), 4, drop_last=True),
        "gives no batch: of 3 batches each of 4 workers has less than one, and drop_last",
    ),
    "too few": (
        lambda: Buckets(1, drop_last=True),
        "gives no batch: of 1 batches each of 2 workers has less than one, and drop_last",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_rejects_unsupported_batch_samplers(name: str) -> None:
    make, message = UNSUPPORTED[name]

    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(DataLoader(Indices(), batch_sampler=make()))

    with pytest.raises(SpecError, match=f"(?s){message}"):
        call_on_ranks(train, 4 if name == "too few, of a size" else 2)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_rejects_batches_that_differ_in_a_later_epoch(strategy: str) -> None:
    class DifferentLater(Buckets):
        def batches(self) -> list[list[int]]:
            batches = super().batches()
            return batches[::-1] if self.epoch and distplat.get_context().rank else batches

    def train(config: Mapping[str, Any]) -> None:
        loader = DataLoader(data_of(), batch_sampler=DifferentLater())
        model, loader = distplat.prepare(model_of(), loader)
        for _ in range(2):
            for batch in loader:
                backward(loss_of(model, batch))

    with pytest.raises(ValueError, match="its sampler gave another order"):
        call_on_ranks(train, job=function_job(2, strategy=strategy))
