"""Streams in a train function: parts of ranks, ends of epochs, positions after a resume."""

import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from function_ranks import call_on_ranks, function_job
from prepared_loaders import prepare_loader
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
    """A stateful data set that counts the samples read."""

    samples_read = 0

    def __init__(self, count: int = COUNT) -> None:
        self.count, self.position = count, 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]

    def __iter__(self) -> Iterator[int]:
        while self.position < self.count:
            self.position += 1
            Numbers.samples_read += 1
            yield self.position - 1
        self.position = 0


class StatelessNumbers(IterableDataset[int]):
    """A data set without state, which may shuffle in each pass."""

    def __init__(self, count: int = COUNT, *, shuffles: bool = False) -> None:
        self.count, self.shuffles, self.epoch = count, shuffles, -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = [*range(self.count)]
        if self.shuffles:
            random.shuffle(order)
        yield from order


class SplitByLoader(StatelessNumbers):
    """A data set split by loader process, as in torch's documentation."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        for index, number in enumerate(super().__iter__()):
            if info is None or index % info.num_workers == info.id:
                yield number


def read_epoch(loader: ShardedLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def read_twice(data: Any, rank: int, world: int, *, drop_last: bool) -> tuple[Any, Any]:
    """Return the batches of two epochs, and the counts that the session receives per batch."""
    batch_infos: list[tuple[int, int, int]] = []

    def on_batch(loader: object, batch: RankBatch | None, waited_s: float, epoch: int) -> None:
        if batch is not None:
            batch_infos.append((epoch, batch.samples, batch.unique))

    loader = prepare_loader(data, rank, world, read=on_batch, drop_last=drop_last)
    return [read_epoch(loader) for _ in range(2)], batch_infos


@pytest.mark.sweep(3)
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5, 12, COUNT])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_batches_match_those_of_a_map_style_data_set(
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
    assert len(lengths) == 1, "ranks have different numbers of batches"


@pytest.mark.sweep(2)
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("cls", [StatelessNumbers, SplitByLoader])
def test_loader_processes_keep_all_samples_and_reshuffle(
    cls: type[StatelessNumbers], persistent: bool
) -> None:
    options = {"num_workers": 2, "persistent_workers": persistent}
    alone = [prepare_loader(cls(shuffles=True), rank, 2) for rank in range(2)]
    shared = [prepare_loader(cls(shuffles=True), rank, 2, **options) for rank in range(2)]
    epochs = [[read_epoch(loader) for _ in range(2)] for loader in alone]
    assert [[read_epoch(loader) for _ in range(2)] for loader in shared] == epochs
    for number in range(2):
        union = [n for rank in epochs for batch in rank[number] for n in batch]
        assert {*union} == {*range(COUNT)}
        assert len(union) == COUNT + 1, "one sample is repeated for equal lengths"
    assert epochs[0][0] != epochs[0][1]
    shared[0].set_epoch(0)
    assert read_epoch(shared[0]) == epochs[0][0]


def test_stream_with_set_epoch_and_length() -> None:
    class SizedStream(StatelessNumbers):
        def __len__(self) -> int:
            return self.count

        def __iter__(self) -> Iterator[int]:
            return iter([self.epoch])

    loader = prepare_loader(SizedStream(), world=2)
    assert [read_epoch(loader)[0][0] for _ in range(2)] == [0, 1]
    loader.set_epoch(7)
    assert read_epoch(loader) == [[7]]
    assert len(loader) == 4
    assert len(prepare_loader(SizedStream(), world=2, drop_last=True)) == 3
    with pytest.raises(TypeError, match="if its stream has none"):
        len(prepare_loader(StatelessNumbers()))


def test_two_concurrent_iterators_are_independent() -> None:
    loader = prepare_loader(Numbers())
    assert [(a.tolist(), b.tolist()) for a, b in zip(loader, loader, strict=True)] == [
        (batch, batch) for batch in read_epoch(prepare_loader(Numbers()))
    ]


# --- positions -------------------------------------------------------------------------------

SOURCES: dict[str, Callable[[], Any]] = {
    "stateful": Numbers,
    "shuffled": lambda: StatelessNumbers(shuffles=True),
    "numbered": lambda: [*range(COUNT)],
}


@pytest.mark.sweep(3)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("steps", range(10))
def test_resumes_at_the_position_of_a_checkpoint(source: str, steps: int) -> None:
    """The state of rank 0 is loaded on each rank; an epoch has six batches."""
    options = {"shuffle": True} if source == "numbered" else {}

    def new(rank: int) -> ShardedLoader:
        return prepare_loader(SOURCES[source](), rank, 2, batch=2, **options)

    leader = new(0)
    batches = (batch for _ in range(3) for batch in leader)
    for _ in range(steps):
        next(batches)
    state = leader.state_dict()
    for rank in range(2):
        uninterrupted, resumed = new(rank), new(rank)
        whole = [batch for _ in range(3) for batch in read_epoch(uninterrupted)]
        resumed.load_state_dict(state)
        epoch = state["epoch"]
        resumed.set_epoch(epoch)  # as in a loop over epochs
        rest = [batch for _ in range(epoch, 3) for batch in read_epoch(resumed)]
        assert rest == whole[steps:]
        resumed.set_epoch(epoch)
        assert read_epoch(resumed) == whole[epoch * 6 :][:6], "starts again"


def test_position_after_an_epoch_is_the_start_of_the_next() -> None:
    loader = prepare_loader(Numbers())
    read_epoch(loader)
    assert loader.state_dict() == {"epoch": 1, "samples": 0, "stream": None}


@pytest.mark.parametrize("persistent", [False, True])
def test_resumes_with_loader_processes(persistent: bool) -> None:
    options: Any = {"num_workers": 2, "persistent_workers": persistent}
    loader = prepare_loader(Numbers(), 0, 2, batch=2, **options)
    whole = read_epoch(loader)
    iterator = iter(loader)
    assert [next(iterator).tolist() for _ in range(3)] == whole[:3]
    state = loader.state_dict()
    assert state["stream"]["place"] == 8
    loader.load_state_dict(state)
    assert read_epoch(loader) == whole[3:]


def test_stateful_stream_does_not_read_skipped_samples() -> None:
    loader = prepare_loader(Numbers(1000), batch=10)
    batches = iter(loader)
    for _ in range(50):
        next(batches)
    state = loader.state_dict()
    resumed = prepare_loader(Numbers(1000), batch=10)
    Numbers.samples_read = 0
    resumed.load_state_dict(state)
    assert next(iter(resumed)).tolist() == [*range(500, 510)]
    assert Numbers.samples_read <= 40


@pytest.mark.parametrize("data", [Numbers(), [*range(COUNT)]])
def test_rejects_a_position_inside_of_a_batch(data: Any) -> None:
    loader = prepare_loader(data, world=2, batch=4)
    with pytest.raises(
        ValueError, match=r"18 samples into epoch 1 is not the start of a batch of 4 on each"
    ):
        loader.load_state_dict({"epoch": 1, "samples": 18, "stream": None})
    with pytest.raises(ValueError, match=r"'epoch' and 'samples'; got a mapping of _snapshot"):
        loader.load_state_dict({"_snapshot": 3})
    loader.load_state_dict({"epoch": 1, "samples": 16, "stream": None})
    assert len(read_epoch(loader)) == 1


# --- training --------------------------------------------------------------------------------


def rows(count: int = 22) -> list[tuple[Tensor, Tensor]]:
    inputs = torch.randn(count, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [(row, row.square().sum(0, keepdim=True)) for row in inputs]


class Rows(IterableDataset[Any]):
    def __init__(self, rows: list[tuple[Tensor, Tensor]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


def model_of() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def train_two_epochs(data: Callable[[int], Any], strategy: str, world: int) -> dict[str, Tensor]:
    """Train two epochs; report a checkpoint with the data position in each step."""

    def train(config: Mapping[str, Any]) -> None:
        model, context = model_of(), distplat.get_context()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        loader = DataLoader(data(context.rank), batch_size=4)
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
def test_stream_has_the_bits_of_a_map_style_data_set(strategy: str, world: int) -> None:
    streamed = train_two_epochs(lambda rank: Rows(rows()), strategy, world)
    numbered = train_two_epochs(lambda rank: rows(), strategy, world)
    for name, value in numbered.items():
        assert torch.equal(streamed[name], value), name


def test_asynchronous_ranks_read_their_parts_independently() -> None:
    numbers: dict[int, list[int]] = {}

    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().rank
        loader = distplat.prepare(DataLoader(Numbers(), batch_size=4))
        numbers[rank] = [n for _ in range(rank + 1) for batch in loader for n in batch.tolist()]

    call_on_ranks(train, job=function_job(2, strategy="ps-async"))
    assert numbers[0] == [*range(0, COUNT, 2)]
    assert numbers[1] == [*range(1, COUNT, 2), 0] * 2


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize(
    "change", [lambda rows: rows[:18], lambda rows: [*rows[:16], *rows[:1], *rows[17:]]]
)
def test_rejects_streams_that_differ_later(
    strategy: str, change: Callable[[list[Any]], list[Any]]
) -> None:
    """The first 16 samples are equal. Then the stream of a rank ends, or has another sample."""
    data = lambda rank: Rows(change(rows(60)) if rank else rows(60))  # noqa: E731
    with pytest.raises(ValueError, match=r"in step 3 worker-. read another batch of a stream"):
        train_two_epochs(data, strategy, 2)


def test_rejects_streams_split_by_rank() -> None:
    with pytest.raises(SpecError, match="gives worker-1, worker-2 other samples than worker-0"):
        train_two_epochs(lambda rank: Rows(rows()[rank:]), "ring", 3)


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_unprepared_streams_end_with_the_shortest(
    strategy: str,
) -> None:
    """Loaders that are not prepared, as in docs/streams.md."""
    parts, steps_done = (rows()[:14], rows()[14:]), [0, 0]

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
                steps_done[rank] += 1

    trained = call_on_ranks(train, job=function_job(2, strategy=strategy)).trained[1]
    assert steps_done == [8, 8], "four batches of the shorter stream, twice"
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for step in range(8):
        first = step % 4 * 2
        batch = [*parts[0][first : first + 2], *parts[1][first : first + 2]]
        inputs, targets = (torch.stack(column) for column in zip(*batch, strict=True))
        backward((model(inputs) - targets).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-10, atol=1e-10)


class ReadOnce(IterableDataset[int]):
    def __init__(self) -> None:
        self._iterator = iter(range(COUNT))

    def __iter__(self) -> Iterator[int]:
        return self._iterator


def split_in_init(loader: int) -> None:
    """Split the stream in a `worker_init_fn`, as in torch's documentation."""
    get_worker_info().dataset.count = loader  # type: ignore[union-attr]


UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "no batches": (lambda: DataLoader(Numbers(), batch_size=None), "batch_size=None"),
    "empty": (lambda: DataLoader(Numbers(0)), "gave no samples"),
    "read once": (lambda: DataLoader(ReadOnce()), "gave another sample 0"),
    "cut by loader": (
        lambda: DataLoader(Numbers(), num_workers=1, worker_init_fn=split_in_init),
        "'NoneType' object has no attribute 'dataset'",
    ),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_rejects_unsupported_streams(name: str) -> None:
    make, message = UNSUPPORTED[name]

    def train(config: Mapping[str, Any]) -> None:
        next(iter(distplat.prepare(make())))

    with pytest.raises((SpecError, ValueError, AttributeError), match=message):
        call_on_ranks(train)
