"""Streams that are read on: after a checkpoint, a lost worker, another number of workers."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparison import distance, same_bits
from local_run import Attempt, LocalRun, train
from lost_ranks import Lost
from stream_task import BATCH, SAMPLES, Numbered, iterable, job, stream, tensors
from torch.utils.data import IterableDataset

from distplat.platform.errors import Abandoned, CollectiveError, FencedError
from distplat.platform.stop_order import StopOrder
from distplat.strategies.loop.streams import StreamPosition, StreamSamples
from distplat.strategies.task import Task

pytestmark = pytest.mark.usefixtures("loader_server")

EVERY = {"checkpoint": {"every_steps": 4, "num_to_keep": 9}}


class Counted(IterableDataset[Any]):
    """A stream that knows where it is, and how many samples it was asked for."""

    read = 0

    def __init__(self, count: int = SAMPLES) -> None:
        self.count, self.place = count, 0
        self.columns = tensors(count)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]

    def __iter__(self) -> Iterator[Any]:
        while self.place < self.count:
            self.place += 1
            Counted.read += 1
            yield tuple(column[self.place - 1] for column in self.columns)
        self.place = 0


class Stateful(Numbered):
    def train_data(self) -> Any:
        return Counted()


class Stateless(Numbered):
    def train_data(self) -> Any:
        return iterable(*tensors())


@pytest.mark.sweep(3)
@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 15}], ids=["epochs", "steps"])
@pytest.mark.parametrize("kind", [Stateful, Stateless])
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_run_that_goes_on_reads_what_it_would_have_read(
    strategy: str, kind: type[Task], length: dict[str, int]
) -> None:
    given = job(strategy, 2, **EVERY, **length)
    unfailed = train(given, kind)
    assert sorted(unfailed.checkpoints) == [4, 8, 12, 15]
    for version in (4, 8, 12):
        resumed = train(given, kind, saved=unfailed.checkpoints[version])
        assert same_bits(resumed, unfailed)
    one = train(job(strategy, 1, **EVERY, **length), kind, saved=unfailed.checkpoints[8])
    three = train(job(strategy, 3, **EVERY, **length), kind, saved=one.checkpoints[12])
    assert distance(three.parameters(), unfailed.parameters()) < 1e-5


@pytest.mark.parametrize("loaders", [0, 2])
def test_a_stream_with_a_state_is_not_read_from_its_start(loaders: int) -> None:
    given = job("ring", 1, steps=12, data={"num_workers": loaders}, **EVERY)
    many = type("Many", (Numbered,), {"train_data": lambda self: Counted(1000)})
    saved = train(given, many).checkpoints[8]
    mark = saved.state["stream"]
    assert (mark["number"], mark["turn"], mark["place"]) == (7 * BATCH, 0, 7 * BATCH)
    assert json.loads(mark["state"]) == {"place": 7 * BATCH}
    data = stream(Counted(1000), steps=12)
    data.keep(StreamPosition.read(mark) or pytest.fail("it was not kept"))
    Counted.read = 0
    samples = data.read(8 * BATCH, BATCH).batch
    assert Counted.read == 2 * BATCH
    assert torch.equal(samples[0][0], tensors(1000)[0][8 * BATCH])


def test_a_checkpoint_of_a_later_pass_skips_those_before() -> None:
    given = job("ring", 1, steps=12, **EVERY)
    mark = train(given, Stateless).checkpoints[12].state["stream"]
    assert (mark["number"], mark["turn"], mark["place"]) == (99, 2, 99 - 2 * SAMPLES)
    assert mark["state"] == ""


class Forgets(Counted):
    """As a shuffle buffer that is refilled: its state leads to another sample."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"] + 3


class Locked(Counted):
    def __deepcopy__(self, memo: object) -> Any:
        raise TypeError("cannot pickle '_io.BufferedReader' object")


class OfTensors(Counted):
    def state_dict(self) -> dict[str, Any]:
        return {"place": torch.tensor(self.place)}


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Forgets, "load_state_dict() of Forgets does not restore sample 26 of pass 1"),
        (OfTensors, "state_dict() of OfTensors cannot be saved in a checkpoint"),
    ],
)
def test_a_state_that_is_of_no_use_is_told_and_samples_are_counted(
    kind: type[Counted], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    task = type("Odd", (Numbered,), {"train_data": lambda self: kind()})
    given = job("ring", 2, steps=15, **EVERY)
    unfailed = train(given, task)
    resumed = train(given, task, saved=unfailed.checkpoints[8])
    assert told in caplog.text
    assert same_bits(resumed, unfailed)


@pytest.mark.parametrize("at", [27, 35, 36, 37, 38, 73])
@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 15}], ids=["epochs", "steps"])
def test_a_state_near_the_end_of_a_pass_is_tried_too(at: int, length: dict[str, int]) -> None:
    """Few samples follow it, or none: then it is not kept."""
    whole = stream(Counted(), **length)
    expected = [whole[number][0] for number in range(111)]
    for count in (1, 9) if "steps" in length else (1,):
        writer, reader = stream(Forgets(), **length), stream(Forgets(), **length)
        samples, mark, _ = writer.read(at, count, mark=True)
        assert mark is not None
        reader.keep(mark)
        after = [*samples, *(writer[number] for number in range(at + count, at + count + 20))]
        again = [reader[number] for number in range(at, at + count + 20)]
        for number, (one, other) in enumerate(zip(after, again, strict=True), at):
            assert torch.equal(one[0], expected[number]), number
            assert torch.equal(other[0], expected[number]), number


def test_a_stream_that_cannot_be_copied_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Reopened(Locked):
        def __iter__(self) -> Iterator[Any]:
            self.place = 0
            return super().__iter__()

    task = type("Odd", (Numbered,), {"train_data": lambda self: Reopened()})
    given = job("ring", 2, steps=15, **EVERY)
    unfailed = train(given, task)
    assert "Reopened cannot be copied (cannot pickle" in caplog.text
    assert same_bits(train(given, task, saved=unfailed.checkpoints[8]), unfailed)


@pytest.mark.parametrize("kind", [Stateful, Stateless])
def test_other_samples_than_before_a_checkpoint_are_an_error(kind: type[Task]) -> None:
    """The first samples are the same: a file was added, in the middle."""
    given = job("ring", 1, steps=15, **EVERY)
    saved = train(given, kind).checkpoints[8]

    class Other(Counted):
        def __init__(self) -> None:
            super().__init__()
            self.columns[0][20:] += 1

    task = type("Other", (Numbered,), {"train_data": lambda self: Other()})
    with pytest.raises(ValueError, match="gives other samples than before from number 26 of pass"):
        train(given, task, saved=saved)


class LosesRank1(Attempt):
    """Rank 1 is lost before a step; the others come out when they wait for it."""

    ends = (Lost, Abandoned, FencedError, CollectiveError)
    step = 6

    def before(self, rank: int, step: int) -> StopOrder:
        if (rank, step) == (1, self.step):
            raise Lost
        return StopOrder.NONE

    def stopped(self, rank: int) -> None:
        if rank == 1:
            self.give_up()


@pytest.mark.parametrize("kind", [Stateful, Stateless])
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 15}], ids=["epochs", "steps"])
def test_a_lost_worker_costs_no_sample(
    strategy: str, kind: type[Task], length: dict[str, int]
) -> None:
    given = job(strategy, 2, **length)
    run = LocalRun(given, kind)
    assert not LosesRank1(run).make()
    run.renew(1)
    second = Attempt(run)
    assert second.make()
    assert second.starts == [6, 6]
    run.close()
    assert same_bits(run, train(given, kind))


def test_asynchronous_workers_go_on_with_each_sample_once() -> None:
    given = job("ps-async", 2, steps=12, **EVERY)
    first = train(given, Stateful)
    saved = first.checkpoints[max(first.checkpoints)]
    longer = job("ps-async", 2, steps=20)
    second = train(longer, Stateful, saved=saved)
    made = sorted((r.step, r.rank) for reports in second.reports for r in reports)
    assert made == [(step, part) for step in range(12, 20) for part in range(2)]


def test_a_damaged_position_counts_for_none() -> None:
    good = StreamPosition(3, 0, 3, "", ("a",)).saved()
    assert StreamPosition.read(json.loads(json.dumps(good))) == StreamPosition(3, 0, 3, "", ("a",))
    for bad in (None, 3, {}, {**good, "place": "x"}, {**good, "hashes": None}, {**good, "more": 1}):
        assert StreamPosition.read(bad) is None


def test_a_position_is_no_state_of_numbered_samples() -> None:
    run: LocalRun = train(job("ring", 1, steps=4, **EVERY), Numbered)
    assert "stream" not in run.checkpoints[4].state
    assert isinstance(stream(Counted(), steps=4), StreamSamples)
