"""Loaders with a `batch_sampler`, or another sampler of batches, in a train function."""

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
    """Batches of several sizes, in an order and a number that depend on the epoch."""

    def __init__(self, count: int = 23, *, drop_last: bool = False) -> None:
        self.count, self.drop_last, self.epoch = count, drop_last, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def batches(self) -> list[list[int]]:
        draw = random.Random(self.epoch)  # ranks share a process here, and its generators
        order, found = draw.sample(range(self.count), self.count), []
        while order:
            size = draw.randint(1, 4)
            found.append(order[:size])
            order = order[size:]
        return found

    def __len__(self) -> int:
        return len(self.batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches())


def batches_of(epoch: int, drop_last: bool = False) -> list[list[int]]:
    buckets = Buckets(drop_last=drop_last)
    buckets.set_epoch(epoch)
    return buckets.batches()


def steps_of(epoch: int, world: int, drop_last: bool) -> list[list[list[int]]]:
    """Give each step's batches of all ranks, by the rule: what is left is filled or left out."""
    batches = batches_of(epoch)
    steps = [batches[first : first + world] for first in range(0, len(batches), world)]
    if len(steps[-1]) < world:
        short = steps.pop()
        steps += [] if drop_last else [[*short, *batches[: world - len(short)]]]
    return steps


# --- training --------------------------------------------------------------------------------


def rows_of(numbers: list[int]) -> list[Tensor]:
    return [one[numbers] for one in data_of().tensors]


def by_the_rule(world: int, drop_last: bool) -> dict[str, Tensor]:
    """Train by the mean over ranks of the means of their batches, in one process."""
    model = model_of()
    optimizer = momentum(model.parameters())
    for epoch in range(2):
        for step in steps_of(epoch, world, drop_last):
            backward(sum(loss_of(model, rows_of(one)) for one in step) / world)  # type: ignore[arg-type]
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("strategy", "world"), [("ring", 2), ("ring", 3), ("ps-sync", 3)])
def test_a_step_has_the_mean_of_the_means_of_the_ranks_batches(
    strategy: str, world: int, drop_last: bool
) -> None:
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
    assert_equal(run.trained[1], by_the_rule(world, drop_last))


# --- each rank's part ------------------------------------------------------------------------


class Odd(Dataset[int]):
    def __init__(self, count: int = 23) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def prepared(
    rank: int = 0, world: int = 2, sampler: Any = None, **options: Any
) -> BatchSamplerLoader:
    """Prepare a loader as a rank does, without the others."""

    def told(one: object, batch: RankBatch | None, waited_s: float, epoch: int) -> None:
        del one, batch, waited_s, epoch

    given = DataLoader(Odd(), batch_sampler=sampler or Buckets(), **options)
    return BatchSamplerLoader(given, DataShard(rank, world, 5), torch.device("cpu"), told)


def a_pass(loader: BatchSamplerLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize(("loaders", "ranks"), [(0, [0, 1, 2]), (1, [1])])
def test_ranks_take_turns_with_the_batches_of_each_epoch(loaders: int, ranks: list[int]) -> None:
    for rank in ranks:
        loader = prepared(rank, 3, num_workers=loaders, persistent_workers=loaders > 0)
        for epoch in range(3):
            wanted = [step[rank] for step in steps_of(epoch, 3, drop_last=False)]
            assert a_pass(loader) == wanted
            assert len(loader) == len(wanted)
        loader.batch_sampler.set_epoch(1)  # as loops under DDP say it
        assert a_pass(loader)[0] == batches_of(1)[rank]
    assert len({len(batches_of(epoch)) for epoch in range(3)}) > 1, "of several lengths"


def test_a_loop_may_tell_its_own_batch_sampler_the_epoch() -> None:
    buckets = Buckets()
    loader = prepared(1, 2, buckets)
    for epoch in (4, 2):
        buckets.set_epoch(epoch)
        assert a_pass(loader)[0] == batches_of(epoch)[1]


def test_the_same_epoch_may_be_told_again() -> None:
    buckets = Buckets()
    loader = prepared(1, 2, buckets)
    for tell in (buckets.set_epoch, loader.sampler.set_epoch, loader.set_epoch):
        for epoch in (0, 0, 0, 2, 2):
            tell(epoch)
            assert a_pass(loader)[0] == batches_of(epoch)[1]
        assert a_pass(loader)[0] == batches_of(3)[1], "the next one follows"


def test_the_length_is_that_of_the_epoch_that_was_told() -> None:
    wanted = {epoch: -(-len(batches_of(epoch)) // 2) for epoch in range(9)}
    buckets = Buckets()
    loader = prepared(1, 2, buckets)
    for epoch in range(9):
        loader.set_epoch(epoch)
        assert len(loader) == wanted[epoch]
        loader.load_state_dict({"epoch": (epoch + 4) % 9, "batches": 2})
        assert len(loader) == wanted[(epoch + 4) % 9]
        buckets.set_epoch(epoch)
        assert len(loader) == wanted[epoch]
        assert len(a_pass(loader)) == wanted[epoch] == len(loader)
    assert len({*wanted.values()}) > 2


def test_the_end_of_a_pass_is_a_position_too() -> None:
    loader = prepared(1, 2)
    loader.load_state_dict({"epoch": 2, "batches": 2 * -(-len(batches_of(2)) // 2)})
    assert a_pass(loader) == []
    assert a_pass(loader)[0] == batches_of(3)[1]


def test_one_that_counts_its_passes_itself_goes_on_where_it_was() -> None:
    class Counting(Buckets):
        def __iter__(self) -> Iterator[list[int]]:
            batches = self.batches()
            self.epoch += 1
            return iter(batches)

    loader = prepared(1, 2, Counting())
    for epoch in range(2):
        assert a_pass(loader)[0] == batches_of(epoch)[1]
    resumed = prepared(1, 2, Counting())
    resumed.load_state_dict({"epoch": 5, "batches": 2})
    assert a_pass(resumed)[0] == batches_of(5)[3]


@pytest.mark.parametrize("strategy", ["ring", "ps-async"])
def test_gathered_metrics_are_of_every_sample_once(strategy: str) -> None:
    def train(config: Mapping[str, Any]) -> None:
        loader = distplat.prepare(DataLoader(Odd(), batch_sampler=Buckets()))
        for _ in range(3):
            found = [distplat.gather_for_metrics(batch) for batch in loader]
            assert sorted(torch.cat(found).tolist()) == [*range(23)]

    call_on_ranks(train, job=function_job(3, strategy=strategy))


@pytest.mark.parametrize("made", range(11))
def test_a_loop_goes_on_where_its_checkpoint_was_taken(made: int) -> None:
    leader = prepared()
    given = (batch for _ in range(3) for batch in leader)
    for _ in range(made):
        next(given)
    state = leader.state_dict()
    for rank in range(2):
        whole = prepared(rank)
        wanted = [batch for _ in range(3) for batch in a_pass(whole)]
        resumed = prepared(rank)
        resumed.load_state_dict(state)
        rest = [batch for _ in range(state["epoch"], 3) for batch in a_pass(resumed)]
        assert rest == wanted[made:]


def test_a_place_between_the_steps_is_told() -> None:
    loader = prepared(0, 2)
    with pytest.raises(
        ValueError, match=r"3 batches into epoch 1 is not the start of a step of 2 workers"
    ):
        loader.load_state_dict({"epoch": 1, "batches": 3})
    with pytest.raises(ValueError, match=r"'epoch' and 'batches'; got a mapping of epoch, samples"):
        loader.load_state_dict({"epoch": 1, "samples": 4})


def list_used_again() -> Iterator[Any]:
    batch: list[int] = []
    for number in range(23):
        batch.append(number)
        if len(batch) == 4:
            yield batch
            batch.clear()
    yield batch


def array_used_again(buffer: Any) -> Iterator[Any]:
    for first in range(0, 20, 2):
        for place in range(2):
            buffer[place] = first + place
        yield buffer


class Given(Sampler[Any]):
    """Batches as a function gives them, with or without a length."""

    def __init__(self, batches: Callable[[], Iterator[Any]], length: Any = None) -> None:
        self.batches, self.length = batches, length

    def __iter__(self) -> Iterator[Any]:
        return self.batches()

    def __len__(self) -> int:
        if isinstance(self.length, Exception):
            raise self.length
        return int(self.length)  # TypeError: it is None


@pytest.mark.parametrize(
    "batches",
    [
        list_used_again,
        lambda: array_used_again(np.empty(2, np.int64)),
        lambda: array_used_again(torch.empty(2, dtype=torch.int64)),
        lambda: map(iter, [[1, 2], [3], [4, 5], [6]]),
    ],
)
def test_a_batch_is_what_it_was_when_it_was_given(batches: Callable[[], Iterator[Any]]) -> None:
    wanted = [[int(number) for number in batch] for batch in batches()]
    for rank in range(2):
        assert a_pass(prepared(rank, 2, Given(batches, len(wanted))))[:2] == wanted[rank::2][:2]


@pytest.mark.parametrize("error", [None, ValueError("num_steps"), NotImplementedError()])
def test_batches_need_no_length(error: Exception | None) -> None:
    def train(config: Mapping[str, Any]) -> None:
        given = Given(lambda: iter(batches_of(0)), error)
        loader = distplat.prepare(DataLoader(Odd(), batch_sampler=given))
        wanted = [step[distplat.get_context().rank] for step in steps_of(0, 2, drop_last=False)]
        assert a_pass(loader) == wanted and len(loader) == len(wanted)

    call_on_ranks(train, 2)


# --- a data set that is asked for whole batches ----------------------------------------------


class Whole(Odd):
    """As a data set of Hugging Face's, which reads many rows at once."""

    def __getitem__(self, index: Any) -> Any:
        assert isinstance(index, list)
        return torch.tensor(index)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_sampler_of_batches_is_one_of_their_samples(world: int, drop_last: bool) -> None:
    def train(config: Mapping[str, Any]) -> None:
        order = BatchSampler(range(23), 4, drop_last)
        whole = DataLoader(Whole(), batch_size=None, sampler=order)
        single = DataLoader(Odd(), batch_size=4, drop_last=drop_last)
        whole, single = distplat.prepare(whole, single)
        assert (len(whole), whole.batch_size) == (len(single), 4)
        for _ in range(2):
            assert [one.tolist() for one in whole] == [one.tolist() for one in single]

    call_on_ranks(train, world)


def test_a_sampler_of_batches_of_several_sizes_is_dealt_out_too() -> None:
    class Uneven(BatchSampler):
        def __iter__(self) -> Iterator[list[int]]:
            return iter([[0, 1], [2], [3, 4, 5]])

        def __len__(self) -> int:
            return 3

    def train(config: Mapping[str, Any]) -> None:
        given = DataLoader(Whole(), batch_size=None, sampler=Uneven(range(6), 2, False))
        loader, rank = distplat.prepare(given), distplat.get_context().rank
        wanted = [[0, 1], [3, 4, 5]] if rank == 0 else [[2], [0, 1]]
        assert [one.tolist() for one in loader] == wanted

    call_on_ranks(train, 2)


# --- refused ---------------------------------------------------------------------------------


class Drawing(Buckets):
    """Keeps a generator, so another pass has other batches."""

    generator = random.Random(1)

    def batches(self) -> list[list[int]]:
        return [[number] for number in self.generator.sample(range(9), 9)]


class Threes(BatchSampler):
    """Has a batch size, and batches of other sizes."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0], [1, 2], [3, 4]])

    def __len__(self) -> int:
        return 3


def unending(most: int) -> Iterator[list[int]]:
    for _ in range(most + 1):
        yield [0]
    raise AssertionError("it is asked for more than shows that it does not end")


class Own(Buckets):
    """Gives the batches of one rank, and does not say so."""

    def batches(self) -> list[list[int]]:
        return super().batches()[distplat.get_context().rank :: 2]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no end": (
        lambda: Given(lambda: unending(500), 5),
        "a Given, which yields more than 500 batches in a pass.*end its __iter__",
    ),
    "no end, no length": (lambda: Given(lambda: unending(2300)), "yields more than 2300 batches"),
    "draws": (Drawing, "a Drawing, which yields another order in each"),
    "by rank": (Own, "another order on rank 1 than on rank 0.*attributes rank and num_replicas"),
    "too few, of a size": (
        lambda: Threes(range(5), 4, drop_last=True),
        "gives no batch: of 3 batches each of 4 workers has less than one, and drop_last",
    ),
    "too few": (
        lambda: Buckets(1, drop_last=True),
        "gives no batch: of 1 batches each of 2 workers has less than one, and drop_last",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_dealt_out_is_told(name: str) -> None:
    make, text = REFUSED[name]

    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(DataLoader(Odd(), batch_sampler=make()))

    with pytest.raises(SpecError, match=f"(?s){text}"):
        call_on_ranks(train, 4 if name == "too few, of a size" else 2)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_batches_that_part_in_a_later_epoch_are_told(strategy: str) -> None:
    class Later(Buckets):
        def batches(self) -> list[list[int]]:
            batches = super().batches()
            return batches[::-1] if self.epoch and distplat.get_context().rank else batches

    def train(config: Mapping[str, Any]) -> None:
        loader = DataLoader(data_of(), batch_sampler=Later())
        model, loader = distplat.prepare(model_of(), loader)
        for _ in range(2):
            for batch in loader:
                backward(loss_of(model, batch))

    with pytest.raises(ValueError, match="its sampler gave another order"):
        call_on_ranks(train, job=function_job(2, strategy=strategy))
