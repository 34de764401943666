"""Position in a stream after a checkpoint, a lost worker, or a change of the world."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from comparison import distance, same_bits
from local_run import Attempt, LocalRun, train
from lost_ranks import RankDied
from stream_task import BATCH, SAMPLES, MapStyleTask, iterable_of, job, open_stream, tensors
from torch.utils.data import IterableDataset

from distplat.platform.errors import Abandoned, CollectiveError, FencedError
from distplat.platform.stop_order import StopOrder
from distplat.strategies.loop.streams import StreamPosition, StreamSamples
from distplat.strategies.task import Task

pytestmark = pytest.mark.usefixtures("loader_server")

CHECKPOINTS = {"checkpoint": {"every_steps": 4, "num_to_keep": 9}}


class CountedStream(IterableDataset[Any]):
    """Stream with a state; count all samples that are read."""

    read = 0

    def __init__(self, count: int = SAMPLES) -> None:
        self.count, self.position = count, 0
        self.columns = tensors(count)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def __iter__(self) -> Iterator[Any]:
        while self.position < self.count:
            self.position += 1
            CountedStream.read += 1
            yield tuple(column[self.position - 1] for column in self.columns)
        self.position = 0


class Stateful(MapStyleTask):
    def train_data(self) -> Any:
        return CountedStream()


class Stateless(MapStyleTask):
    def train_data(self) -> Any:
        return iterable_of(*tensors())


@pytest.mark.sweep(3)
@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 15}], ids=["epochs", "steps"])
@pytest.mark.parametrize("task", [Stateful, Stateless])
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_resumed_run_reads_the_remaining_samples(
    strategy: str, task: type[Task], length: dict[str, int]
) -> None:
    spec = job(strategy, 2, **CHECKPOINTS, **length)
    unfailed = train(spec, task)
    assert sorted(unfailed.checkpoints) == [4, 8, 12, 15]
    for version in (4, 8, 12):
        resumed = train(spec, task, saved=unfailed.checkpoints[version])
        assert same_bits(resumed, unfailed)
    one_worker = train(
        job(strategy, 1, **CHECKPOINTS, **length), task, saved=unfailed.checkpoints[8]
    )
    three_workers = train(
        job(strategy, 3, **CHECKPOINTS, **length), task, saved=one_worker.checkpoints[12]
    )
    assert distance(three_workers.parameters(), unfailed.parameters()) < 1e-5


@pytest.mark.parametrize("loaders", [0, 2])
def test_resumes_stateful_stream_from_its_state(loaders: int) -> None:
    spec = job("ring", 1, steps=12, data={"num_workers": loaders}, **CHECKPOINTS)
    task = type("LongStream", (MapStyleTask,), {"train_data": lambda self: CountedStream(1000)})
    saved = train(spec, task).checkpoints[8]
    position = saved.state["stream"]
    assert (position["number"], position["turn"], position["place"]) == (7 * BATCH, 0, 7 * BATCH)
    assert json.loads(position["state"]) == {"position": 7 * BATCH}
    data = open_stream(CountedStream(1000), steps=12)
    data.keep(StreamPosition.read(position) or pytest.fail("the position was not saved"))
    CountedStream.read = 0
    samples = data.read(8 * BATCH, BATCH).batch
    assert CountedStream.read == 2 * BATCH
    assert torch.equal(samples[0][0], tensors(1000)[0][8 * BATCH])


def test_position_counts_passes() -> None:
    spec = job("ring", 1, steps=12, **CHECKPOINTS)
    position = train(spec, Stateless).checkpoints[12].state["stream"]
    assert (position["number"], position["turn"], position["place"]) == (99, 2, 99 - 2 * SAMPLES)
    assert position["state"] == ""


@pytest.mark.sweep(2)
@pytest.mark.parametrize("task", [Stateful, Stateless])
@pytest.mark.parametrize(("strategy", "workers"), [("ring", 2), ("ps-async", 1)])
def test_positions_may_be_a_few_samples_apart(
    strategy: str, workers: int, task: type[Task]
) -> None:
    """The samples after a position were read ahead for the position before it."""
    fields = {"checkpoint": {"every_steps": 1, "num_to_keep": 99}, "global_batch_size": 2}
    spec = job(strategy, workers, steps=12, **fields)
    unfailed = train(spec, task)
    saved = unfailed.checkpoints
    assert strategy == "ps-async" or len(saved) == 12  # ps-async may skip a checkpoint
    for version in sorted(saved)[:-1]:
        assert same_bits(train(spec, task, saved=saved[version]), unfailed)


class InaccurateState(CountedStream):
    """Stream whose state leads to another sample, like a refilled shuffle buffer."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"] + 3


class Uncopyable(CountedStream):
    def __deepcopy__(self, memo: object) -> Any:
        raise TypeError("cannot pickle '_io.BufferedReader' object")


class TensorState(CountedStream):
    def state_dict(self) -> dict[str, Any]:
        return {"position": torch.tensor(self.position)}


@pytest.mark.parametrize(
    ("dataset", "warning"),
    [
        (
            InaccurateState,
            "load_state_dict() of InaccurateState does not restore sample 26 of pass 1",
        ),
        (TensorState, "state_dict() of TensorState cannot be saved in a checkpoint"),
    ],
)
def test_warns_of_unusable_state_and_counts_samples(
    dataset: type[CountedStream], warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    task = type("Odd", (MapStyleTask,), {"train_data": lambda self: dataset()})
    spec = job("ring", 2, steps=15, **CHECKPOINTS)
    unfailed = train(spec, task)
    resumed = train(spec, task, saved=unfailed.checkpoints[8])
    assert warning in caplog.text
    assert same_bits(resumed, unfailed)


@pytest.mark.parametrize("at", [27, 35, 36, 37, 38, 73])
@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 15}], ids=["epochs", "steps"])
def test_state_near_end_of_pass(at: int, length: dict[str, int]) -> None:
    """A state is not saved if few samples follow it in the pass."""
    uninterrupted = open_stream(CountedStream(), **length)
    expected = [uninterrupted[number][0] for number in range(111)]
    for count in (1, 9) if "steps" in length else (1,):
        writer, reader = (
            open_stream(InaccurateState(), **length),
            open_stream(InaccurateState(), **length),
        )
        samples, position, _ = writer.read(at, count, mark=True)
        assert position is not None
        reader.keep(position)
        written = [*samples, *(writer[number] for number in range(at + count, at + count + 20))]
        restored = [reader[number] for number in range(at, at + count + 20)]
        for number, (written_sample, restored_sample) in enumerate(
            zip(written, restored, strict=True), at
        ):
            assert torch.equal(written_sample[0], expected[number]), number
            assert torch.equal(restored_sample[0], expected[number]), number


def test_uncopyable_stream_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Reopened(Uncopyable):
        def __iter__(self) -> Iterator[Any]:
            self.position = 0
            return super().__iter__()

    task = type("Odd", (MapStyleTask,), {"train_data": lambda self: Reopened()})
    spec = job("ring", 2, steps=15, **CHECKPOINTS)
    unfailed = train(spec, task)
    assert "Reopened cannot be copied (cannot pickle" in caplog.text
    assert same_bits(train(spec, task, saved=unfailed.checkpoints[8]), unfailed)


@pytest.mark.parametrize("task_type", [Stateful, Stateless])
def test_rejects_stream_with_changed_samples(task_type: type[Task]) -> None:
    """The first samples are equal: example of a file added in the middle."""
    spec = job("ring", 1, steps=15, **CHECKPOINTS)
    saved = train(spec, task_type).checkpoints[8]

    class Other(CountedStream):
        def __init__(self) -> None:
            super().__init__()
            self.columns[0][20:] += 1

    task = type("Other", (MapStyleTask,), {"train_data": lambda self: Other()})
    with pytest.raises(ValueError, match="gives other samples than before from number 26 of pass"):
        train(spec, task, saved=saved)


class LosesRank1(Attempt):
    """Attempt that loses rank 1 before a step; the other ranks fail while they wait for it."""

    ends = (RankDied, Abandoned, FencedError, CollectiveError)
    step = 6

    def before(self, rank: int, step: int) -> StopOrder:
        if (rank, step) == (1, self.step):
            raise RankDied
        return StopOrder.NONE

    def stopped(self, rank: int) -> None:
        if rank == 1:
            self.give_up()


@pytest.mark.sweep(2)
@pytest.mark.parametrize("task", [Stateful, Stateless])
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 15}], ids=["epochs", "steps"])
def test_lost_worker_loses_no_sample(
    strategy: str, task: type[Task], length: dict[str, int]
) -> None:
    spec = job(strategy, 2, **length)
    run = LocalRun(spec, task)
    assert not LosesRank1(run).make()
    run.renew(1)
    second = Attempt(run)
    assert second.make()
    assert second.starts == [6, 6]
    run.close()
    assert same_bits(run, train(spec, task))


def test_resumed_asynchronous_workers_read_each_sample_once() -> None:
    spec = job("ps-async", 2, steps=12, **CHECKPOINTS)
    first = train(spec, Stateful)
    saved = first.checkpoints[max(first.checkpoints)]
    longer = job("ps-async", 2, steps=20)
    second = train(longer, Stateful, saved=saved)
    tasks = sorted((r.step, r.rank) for reports in second.reports for r in reports)
    assert tasks == [(step, part) for step in range(12, 20) for part in range(2)]


def test_damaged_position_is_ignored() -> None:
    good = StreamPosition(3, 0, 3, "", ("a",)).saved()
    assert StreamPosition.read(json.loads(json.dumps(good))) == StreamPosition(3, 0, 3, "", ("a",))
    for bad in (None, 3, {}, {**good, "place": "x"}, {**good, "hashes": None}, {**good, "more": 1}):
        assert StreamPosition.read(bad) is None


def test_map_style_dataset_has_no_position() -> None:
    run: LocalRun = train(job("ring", 1, steps=4, **CHECKPOINTS), MapStyleTask)
    assert "stream" not in run.checkpoints[4].state
    assert isinstance(open_stream(CountedStream(), steps=4), StreamSamples)
