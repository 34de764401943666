"""Streams in a train function: each rank's part, the end of a pass, the place after a restart."""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from function_ranks import call_on_ranks, function_job
from prepared_loaders import loader_of
from torch import Tensor, nn
from torch.autograd import backward
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import distplat
from distplat.platform.errors import SpecError
from distplat.strategies.function.sharded_loader import (
    RankBatch,
    ShardedLoader,
)

pytestmark = pytest.mark.usefixtures("loader_server")

COUNT = 23


class Numbers(IterableDataset[int]):
    """Its state is where it is; what it was asked for is counted."""

    asked = 0

    def __init__(self, count: int = COUNT) -> None:
        self.count, self.place = count, 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.place = state["place"]

    def __iter__(self) -> Iterator[int]:
        while self.place < self.count:
            self.place += 1
            Numbers.asked += 1
            yield self.place - 1
        self.place = 0


class Plain(IterableDataset[int]):
    """It has no state, and shuffles itself anew in each pass, differently by its epoch, too."""

    def __init__(self, count: int = COUNT, *, shuffles: bool = False) -> None:
        self.count, self.shuffles, self.epoch = count, shuffles, -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = [*range(self.count)]
        if self.shuffles:
            random.shuffle(order)
        yield from order


class Sharing(Plain):
    """Cuts itself by loader, as torch's documentation shows."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        for place, number in enumerate(super().__iter__()):
            if info is None or place % info.num_workers == info.id:
                yield number


def a_pass(loader: ShardedLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def read_twice(data: Any, rank: int, world: int, *, drop_last: bool) -> tuple[Any, Any]:
    """Give the batches of two passes, and what the session is told of each."""
    heard: list[tuple[int, int, int]] = []

    def read(one: object, batch: RankBatch | None, waited_s: float, epoch: int) -> None:
        if batch is not None:
            heard.append((epoch, batch.samples, batch.unique))

    loader = loader_of(data, rank, world, read=read, drop_last=drop_last)
    return [a_pass(loader) for _ in range(2)], heard


@pytest.mark.sweep(3)
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5, 12, COUNT])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_batches_are_those_of_the_same_samples_by_number(
    world: int, count: int, drop_last: bool
) -> None:
    lengths = set()
    for rank in range(world):
        streamed, numbered = (
            read_twice(data, rank, world, drop_last=drop_last)
            for data in (Numbers(count), [*range(count)])
        )
        assert streamed == numbered
        lengths.add(len(streamed[0][0]))
    assert len(lengths) == 1, "all ranks have as many batches"


@pytest.mark.sweep(2)
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", [Plain, Sharing])
def test_loader_processes_lose_no_sample_and_shuffle_anew(
    kind: type[Plain], persistent: bool
) -> None:
    options = {"num_workers": 2, "persistent_workers": persistent}
    alone = [loader_of(kind(shuffles=True), rank, 2) for rank in range(2)]
    shared = [loader_of(kind(shuffles=True), rank, 2, **options) for rank in range(2)]
    passes = [[a_pass(one) for _ in range(2)] for one in alone]
    assert [[a_pass(one) for _ in range(2)] for one in shared] == passes
    for number in range(2):
        union = [n for rank in passes for batch in rank[number] for n in batch]
        assert {*union} == {*range(COUNT)}
        assert len(union) == COUNT + 1, "one is repeated, so that both ranks have as many"
    assert passes[0][0] != passes[0][1]
    shared[0].set_epoch(0)
    assert a_pass(shared[0]) == passes[0][0]


def test_it_is_told_its_epoch_and_has_a_length_if_the_stream_has() -> None:
    class Long(Plain):
        def __len__(self) -> int:
            return self.count

        def __iter__(self) -> Iterator[int]:
            return iter([self.epoch])

    loader = loader_of(Long(), world=2)
    assert [a_pass(loader)[0][0] for _ in range(2)] == [0, 1]
    loader.set_epoch(7)
    assert a_pass(loader) == [[7]]
    assert len(loader) == 4
    assert len(loader_of(Long(), world=2, drop_last=True)) == 3
    with pytest.raises(TypeError, match="if its stream has none"):
        len(loader_of(Plain()))


def test_two_passes_at_once_do_not_disturb_each_other() -> None:
    loader = loader_of(Numbers())
    assert [(a.tolist(), b.tolist()) for a, b in zip(loader, loader, strict=True)] == [
        (one, one) for one in a_pass(loader_of(Numbers()))
    ]


# --- the place -------------------------------------------------------------------------------


SOURCES: dict[str, Callable[[], Any]] = {
    "stateful": Numbers,
    "shuffled": lambda: Plain(shuffles=True),
    "numbered": lambda: [*range(COUNT)],
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("made", range(10))
def test_a_loop_goes_on_where_its_checkpoint_was_taken(source: str, made: int) -> None:
    """Rank 0's state is good for each rank; six batches are a pass."""
    options = {"shuffle": True} if source == "numbered" else {}

    def new(rank: int) -> ShardedLoader:
        return loader_of(SOURCES[source](), rank, 2, batch=2, **options)

    leader = new(0)
    given = (batch for _ in range(3) for batch in leader)
    for _ in range(made):
        next(given)
    state = leader.state_dict()
    for rank in range(2):
        unfailed, resumed = new(rank), new(rank)
        whole = [batch for _ in range(3) for batch in a_pass(unfailed)]
        resumed.load_state_dict(state)
        epoch = state["epoch"]
        resumed.set_epoch(epoch)  # as a loop over epochs says it
        rest = [batch for _ in range(epoch, 3) for batch in a_pass(resumed)]
        assert rest == whole[made:]
        resumed.set_epoch(epoch)
        assert a_pass(resumed) == whole[epoch * 6 :][:6], "anew, from its start"


def test_after_a_pass_the_place_is_the_start_of_the_next() -> None:
    loader = loader_of(Numbers())
    a_pass(loader)
    assert loader.state_dict() == {"epoch": 1, "samples": 0, "stream": None}


@pytest.mark.parametrize("persistent", [False, True])
def test_with_loader_processes_too(persistent: bool) -> None:
    options: Any = {"num_workers": 2, "persistent_workers": persistent}
    loader = loader_of(Numbers(), 0, 2, batch=2, **options)
    whole = a_pass(loader)
    again = iter(loader)
    assert [next(again).tolist() for _ in range(3)] == whole[:3]
    state = loader.state_dict()
    assert state["stream"]["place"] == 8
    loader.load_state_dict(state)
    assert a_pass(loader) == whole[3:]


def test_a_stream_with_a_state_is_not_read_from_its_start() -> None:
    loader = loader_of(Numbers(1000), batch=10)
    batches = iter(loader)
    for _ in range(50):
        next(batches)
    state = loader.state_dict()
    resumed = loader_of(Numbers(1000), batch=10)
    Numbers.asked = 0
    resumed.load_state_dict(state)
    assert next(iter(resumed)).tolist() == [*range(500, 510)]
    assert Numbers.asked <= 40


@pytest.mark.parametrize("data", [Numbers(), [*range(COUNT)]])
def test_places_that_no_batch_begins_at_are_told(data: Any) -> None:
    loader = loader_of(data, world=2, batch=4)
    with pytest.raises(
        ValueError, match=r"18 samples into epoch 1 is not the start of a batch of 4 on each"
    ):
        loader.load_state_dict({"epoch": 1, "samples": 18, "stream": None})
    with pytest.raises(ValueError, match=r"'epoch' and 'samples'; got a mapping of _snapshot"):
        loader.load_state_dict({"_snapshot": 3})
    loader.load_state_dict({"epoch": 1, "samples": 16, "stream": None})
    assert len(a_pass(loader)) == 1


# --- training --------------------------------------------------------------------------------


def rows(count: int = 22) -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [(one, one.square().sum(0, keepdim=True)) for one in inputs]


class Rows(IterableDataset[Any]):
    def __init__(self, found: list[tuple[Tensor, Tensor]]) -> None:
        self.found = found

    def __iter__(self) -> Iterator[Any]:
        return iter(self.found)


def model_of() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        for one in model.parameters():
            one.copy_(torch.randn(one.shape, generator=generator, dtype=torch.float64))
    return model


def trained(data: Callable[[int], Any], strategy: str, world: int) -> dict[str, Tensor]:
    """Train two epochs; a checkpoint in the middle of each, with the place in the data."""

    def train(config: Mapping[str, Any]) -> None:
        model, place = model_of(), distplat.get_context()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        loader = DataLoader(data(place.rank), batch_size=4)
        model, optimizer, loader = distplat.prepare(model, optimizer, loader)
        for _ in range(2):
            for inputs, targets in loader:
                loss = (model(inputs) - targets).square().mean()
                backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                distplat.report({"loss": loss.item()}, checkpoint={"data": loader.state_dict()})

    job = function_job(world, strategy=strategy)
    return call_on_ranks(train, job=job).trained[0]


@pytest.mark.parametrize(
    ("strategy", "world"), [("ring", 2), ("ring", 3), ("ps-sync", 2), ("ps-async", 1)]
)
def test_a_loop_trains_to_the_bits_of_the_numbered_samples(strategy: str, world: int) -> None:
    streamed = trained(lambda rank: Rows(rows()), strategy, world)
    numbered = trained(lambda rank: rows(), strategy, world)
    for name, value in numbered.items():
        assert torch.equal(streamed[name], value), name


def test_asynchronous_ranks_go_through_their_parts_at_their_own_pace() -> None:
    seen: dict[int, list[int]] = {}

    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        loader = distplat.prepare(DataLoader(Numbers(), batch_size=4))
        seen[rank] = [n for _ in range(rank + 1) for batch in loader for n in batch.tolist()]

    call_on_ranks(train, job=function_job(2, strategy="ps-async"))
    assert seen[0] == [*range(0, COUNT, 2)]
    assert seen[1] == [*range(1, COUNT, 2), 0] * 2


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize(
    "change", [lambda found: found[:18], lambda found: [*found[:16], *found[:1], *found[17:]]]
)
def test_ranks_whose_streams_part_later_are_told_at_once(
    strategy: str, change: Callable[[list[Any]], list[Any]]
) -> None:
    """The first 16 samples are the same. Of two streams the shorter one ends the pass of a rank."""
    data = lambda rank: Rows(change(rows(60)) if rank else rows(60))  # noqa: E731
    with pytest.raises(ValueError, match=r"in step 3 worker-. read another batch of a stream"):
        trained(data, strategy, 2)


def test_ranks_that_cut_the_stream_themselves_are_told() -> None:
    with pytest.raises(SpecError, match="gives worker-1, worker-2 other samples than worker-0"):
        trained(lambda rank: Rows(rows()[rank:]), "ring", 3)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_ranks_may_read_streams_of_their_own_and_end_with_the_first_that_is_over(
    strategy: str,
) -> None:
    """By a loader that is not prepared, as docs/streams.md shows it."""
    parts, made = (rows()[:14], rows()[14:]), [0, 0]

    def train(config: Mapping[str, Any]) -> None:
        rank, model = distplat.get_context().rank, model_of()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        model, optimizer = distplat.prepare(model, optimizer)
        for _ in range(2):
            batches = iter(DataLoader(Rows(parts[rank]), batch_size=2))
            while distplat.gather_for_metrics((batch := next(batches, None)) is not None).all():
                assert batch is not None
                backward((model(batch[0]) - batch[1]).square().mean())
                optimizer.step()
                optimizer.zero_grad()
                made[rank] += 1

    found = call_on_ranks(train, job=function_job(2, strategy=strategy)).trained[1]
    assert made == [8, 8], "four batches of the shorter one, twice"
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(8):
        first = step % 4 * 2
        batch = [*parts[0][first : first + 2], *parts[1][first : first + 2]]
        inputs, targets = (torch.stack(one) for one in zip(*batch, strict=True))
        backward((model(inputs) - targets).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10)


class Once(IterableDataset[int]):
    def __init__(self) -> None:
        self._left = iter(range(COUNT))

    def __iter__(self) -> Iterator[int]:
        return self._left


def shares(loader: int) -> None:
    """Cut the stream in a `worker_init_fn`, as torch's documentation shows, too."""
    get_worker_info().dataset.count = loader  # type: ignore[union-attr]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no batches": (lambda: DataLoader(Numbers(), batch_size=None), "batch_size=None"),
    "empty": (lambda: DataLoader(Numbers(0)), "gave no samples"),
    "read once": (lambda: DataLoader(Once()), "gave another sample 0"),
    "cut by loader": (
        lambda: DataLoader(Numbers(), num_workers=1, worker_init_fn=shares),
        "'NoneType' object has no attribute 'dataset'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_gone_through_is_told(name: str) -> None:
    make, text = REFUSED[name]

    def train(config: Mapping[str, Any]) -> None:
        next(iter(distplat.prepare(make())))

    with pytest.raises((SpecError, ValueError, AttributeError), match=text):
        call_on_ranks(train)
