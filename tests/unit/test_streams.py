"""Iterable data sets: equal results for any number of ranks and loaders, and their errors."""

import random
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from comparison import distance, same_bits
from hybrid_models import merge_parts
from local_run import Attempt, LocalRun, train
from stream_task import (
    BATCH,
    SAMPLES,
    MapStyleTask,
    iterable_of,
    job,
    open_stream,
    read_steps,
    tensors,
)
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset, get_worker_info

from distplat.platform.progress import EvalReport, StepReport
from distplat.platform.stop_order import StopOrder
from distplat.strategies.loop.checks import checked_data
from distplat.strategies.loop.streams import StreamSamples
from distplat.strategies.task import Task

pytestmark = pytest.mark.usefixtures("loader_server")


class Rows(IterableDataset[Any]):
    """The samples of `tensors` as a stream."""

    def __iter__(self) -> Iterator[Any]:
        return zip(*tensors(), strict=True)


class RowsWithLength(Rows):
    """Stream with a length."""

    def __len__(self) -> int:
        return SAMPLES


class Streamed(MapStyleTask):
    def train_data(self) -> Any:
        return Rows()


class Sized(MapStyleTask):
    def train_data(self) -> Any:
        return RowsWithLength()


class Repeated(MapStyleTask):
    """Map-style data of consecutive passes, 11 batches in total."""

    def train_data(self) -> Any:
        inputs, targets = tensors()
        return TensorDataset(inputs.repeat(3, 1)[: 11 * BATCH], targets.repeat(3)[: 11 * BATCH])


WORLDS = [("ring", 1), ("ring", 2), ("ring", 3), ("ps-sync", 1), ("ps-sync", 3), ("ps-async", 1)]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("task", [Streamed, Sized])
@pytest.mark.parametrize(("strategy", "workers"), WORLDS)
def test_stream_is_bit_identical_to_map_style_dataset(
    strategy: str, workers: int, task: type[Task]
) -> None:
    """Each epoch ends with a short batch, in which one of three ranks has no sample."""
    spec = job(strategy, workers, gradient_accumulation=2)
    numbered, streamed = train(spec, MapStyleTask), train(spec, task)
    assert same_bits(numbered, streamed)
    steps = [report for report in streamed.reports[0] if isinstance(report, StepReport)]
    assert [report.epoch for report in steps] == [epoch for epoch in range(3) for _ in range(5)]
    assert distance(streamed.parameters(), train(job(), MapStyleTask).parameters()) < 1e-5


@pytest.mark.parametrize(("strategy", "workers"), WORLDS)
def test_training_by_steps_has_full_batches_across_passes(strategy: str, workers: int) -> None:
    spec = job(strategy, workers, steps=11, lr_schedule={"name": "cosine"})
    assert same_bits(train(spec, Repeated), train(spec, Streamed))


def test_training_by_steps_has_epochs_if_stream_has_length() -> None:
    spec = job("ring", 2, steps=11)
    assert same_bits(train(spec, MapStyleTask), train(spec, Sized))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_stream_under_hybrid(strategy: str) -> None:
    options = {"pipeline": 2, "data": 2, "cut": "even", "micro_batches": 2}
    spec = job({"name": "hybrid", "data_strategy": strategy, **options}, 4)
    numbered, streamed = merge_parts(train(spec, MapStyleTask)), merge_parts(train(spec, Streamed))
    assert numbered.keys() == streamed.keys()
    assert all(torch.equal(numbered[name], streamed[name]) for name in numbered)


class RecordingTask(MapStyleTask):
    """Record the samples used for training."""

    seen: ClassVar[Counter[int]] = Counter()

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        if torch.is_grad_enabled():
            RecordingTask.seen.update(targets.tolist())
        return nn.functional.cross_entropy(outputs, targets % 3)


class Numbers(IterableDataset[Any]):
    """Stream of `count` numbered samples."""

    def __init__(self, count: int = SAMPLES) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.count):
            yield torch.full((5,), float(number)), number


class RecordingStream(RecordingTask):
    def train_data(self) -> Any:
        return Numbers()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_asynchronous_workers_read_each_sample_once(workers: int) -> None:
    """Tasks arrive in any order, so a worker may have to restart a pass."""
    RecordingTask.seen.clear()
    train(job("ps-async", workers), RecordingStream, lease_size=2)
    assert RecordingTask.seen == dict.fromkeys(range(SAMPLES), 3)


# --- readers ---------------------------------------------------------------------------------


class ShufflingStream(IterableDataset[Any]):
    """Stream that shuffles and draws with the global generators."""

    def __iter__(self) -> Iterator[Any]:
        order = [*range(SAMPLES)]
        random.shuffle(order)
        for number in order:
            yield torch.tensor([number, random.random(), np.random.rand(), torch.rand(()).item()])


class LoaderAwareStream(ShufflingStream):
    """Stream that yields the loader's part, as in the documentation of torch."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        for index, sample in enumerate(super().__iter__()):
            if info is None or index % info.num_workers == info.id:
                yield sample


@pytest.mark.parametrize("dataset", [ShufflingStream, LoaderAwareStream])
def test_samples_do_not_depend_on_ranks_and_loaders(dataset: type[ShufflingStream]) -> None:
    expected = read_steps(dataset())
    numbers = [
        [int(sample[0]) for batch in expected[epoch * 5 : epoch * 5 + 5] for sample in batch]
        for epoch in range(3)
    ]
    assert all(sorted(epoch_numbers) == [*range(SAMPLES)] for epoch_numbers in numbers)
    assert len({tuple(epoch_numbers) for epoch_numbers in numbers}) == 3, (
        "each pass has its own order"
    )
    assert len({sample[1] for batch in expected for sample in batch}) == 3 * SAMPLES
    assert read_steps(dataset(), world=3) == expected
    assert read_steps(dataset(), world=2, parts=3) == expected
    assert read_steps(dataset(), world=2, parts=2, data={"num_workers": 2}) == expected


def test_samples_by_steps_do_not_depend_on_ranks_and_loaders() -> None:
    expected = read_steps(ShufflingStream(), steps=10)
    assert [len(batch) for batch in expected] == [BATCH] * 10
    numbers = [int(sample[0]) for batch in expected for sample in batch]
    assert sorted(numbers[:SAMPLES]) == sorted(numbers[SAMPLES : 2 * SAMPLES]) == [*range(SAMPLES)]
    assert read_steps(ShufflingStream(), world=3, steps=10) == expected
    assert read_steps(ShufflingStream(), world=2, steps=10, data={"num_workers": 2}) == expected


def test_random_access_to_earlier_samples() -> None:
    data = open_stream(ShufflingStream(), epochs=3)
    samples = {n: data[n].tolist() for n in (0, 40, 41, 3, 36, 37, 100)}
    assert len({sample[1] for sample in samples.values()}) == 7
    for number in (37, 100, 0, 41):
        assert data[number].tolist() == samples[number]


class Evaluated(Streamed):
    def eval_data(self) -> Any:
        return Rows()


class EvaluatedByNumber(MapStyleTask):
    def eval_data(self) -> Any:
        return TensorDataset(*tensors())


@pytest.mark.parametrize("workers", [1, 2])
def test_evaluation_on_stream(workers: int) -> None:
    def figures(run: LocalRun) -> list[tuple[int, int, dict[str, float]]]:
        eval_reports = [r for reports in run.reports for r in reports if isinstance(r, EvalReport)]
        return [(report.step, report.samples, dict(report.sums)) for report in eval_reports]

    runs = [train(job("ring", workers), task) for task in (EvaluatedByNumber, Evaluated)]
    assert figures(runs[0]) == figures(runs[1])
    assert len(figures(runs[1])) == 3 * workers * workers


# --- invalid streams -------------------------------------------------------------------------


class ReadOnce(IterableDataset[Any]):
    """Stream with one iterator, so that a second pass continues the first one."""

    def __init__(self, count: int = 100) -> None:
        self._left = iter(range(count))

    def __iter__(self) -> Iterator[Any]:
        for number in self._left:
            yield torch.zeros(5), number


class Unseeded(IterableDataset[Any]):
    def __init__(self) -> None:
        self._rng = np.random.default_rng(3)

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.tensor(self._rng.random(5), dtype=torch.float32), 0


class OwnIterator(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return torch.zeros(5), 0


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.zeros(5), 0


class WrongLength(Numbers):
    """Stream whose length is wrong."""

    def __init__(self, count: int, length: int) -> None:
        super().__init__(count)
        self._length = length

    def __len__(self) -> int:
        return self._length


class Shrinking(Numbers):
    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        self.count -= 1


class Broken(Numbers):
    def __iter__(self) -> Iterator[Any]:
        for sample in super().__iter__():
            if sample[1] == 25:
                raise LookupError("shard 3 is gone")
            yield sample


STEPS, EPOCHS = {"steps": 12}, {"epochs": 3}
INVALID_STREAMS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": (lambda: Numbers(0), STEPS, r"train_data\(\) gave no samples"),
    "length 0": (lambda: WrongLength(0, 0), EPOCHS, r"train_data\(\) gave no samples"),
    "read once": (ReadOnce, STEPS, "gave another sample 0 when it was read again"),
    "read once, few": (lambda: ReadOnce(9), STEPS, "gave no samples when it was read again"),
    "counted once": (ReadOnce, EPOCHS, "ended after 0 samples in pass 0"),
    "unseeded": (Unseeded, STEPS, "gave another sample 0 when it was read again"),
    "itself": (OwnIterator, STEPS, "OwnIterator is its own iterator, so it can be read only once"),
    "ends early": (
        lambda: WrongLength(30, 37),
        EPOCHS,
        "ended after 30 samples in pass 0, and 37 were",
    ),
    "goes on": (lambda: WrongLength(40, 37), EPOCHS, "gives more than the 37 samples of its len"),
    "shrinks": (Shrinking, EPOCHS, "ended after 36 samples in pass 0, and 37 were"),
    "raises": (Broken, STEPS, "shard 3 is gone"),
    "no end": (
        Endless,
        {**EPOCHS, "failure": {"start_timeout_s": 0.2}},
        "samples in 0.1 s and has not ended: `epochs` needs their number. Set `steps`",
    ),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("case", INVALID_STREAMS)
def test_rejects_invalid_streams(case: str, workers: int) -> None:
    source, fields, message = INVALID_STREAMS[case]
    task = type("Odd", (RecordingTask,), {"train_data": lambda self: source()})
    with pytest.raises((ValueError, LookupError), match=message):
        train(job("ring", workers, **fields), task)


@pytest.mark.parametrize("count", [1, 5, 8])
def test_stream_shorter_than_batch(count: int) -> None:
    """By epochs each step's batch is the whole stream; by steps the stream is repeated."""
    columns = (tensors(count)[0], tensors(count)[1])
    short = type("Short", (MapStyleTask,), {"train_data": lambda self: iterable_of(*columns)})
    numbered = type("Short", (MapStyleTask,), {"train_data": lambda self: TensorDataset(*columns)})
    assert same_bits(train(job("ring", 3), short), train(job("ring", 3), numbered))
    assert [len(batch) for batch in read_steps(NumberTensors(count), steps=3)] == [BATCH] * 3


class NumberTensors(Numbers):
    def __iter__(self) -> Iterator[Any]:
        return (torch.tensor(float(number)) for number in range(self.count))


def test_rejects_sampler_for_stream() -> None:
    task = type("Both", (Streamed,), {"sampler": lambda self, data, epoch: [0]})
    with pytest.raises(ValueError, match=r"sampler\(\) returns an order of indices"):
        train(job(), task)


def diverging_data(first: int) -> type[Task]:
    """Return a task whose data differs between ranks from a sample on."""

    class DivergingData(MapStyleTask):
        instances = 0

        def __init__(self) -> None:
            DivergingData.instances += 1
            self._number = DivergingData.instances

        def train_data(self) -> Any:
            inputs, targets = tensors()
            inputs[first:] += self._number
            return iterable_of(inputs, targets)

    return DivergingData


def test_reports_ranks_with_different_streams() -> None:
    text = r"(?s)has other training samples than worker-.*do not split data by rank"
    with pytest.raises(Exception, match=text):
        train(job("ring", 2), diverging_data(0))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "hybrid"])
def test_reports_streams_that_diverge_later(strategy: str) -> None:
    """The streams differ from the first sample of the fourth batch on."""
    options = {"pipeline": 1, "data": 2} if strategy == "hybrid" else {}
    plan = job({"name": strategy, **options}, 2, gradient_accumulation=2)
    with pytest.raises(ValueError, match=r"in step 4 worker-. read another batch of a stream"):
        train(plan, diverging_data(3 * BATCH))


class SlowRank(Attempt):
    """Attempt in which rank 2 is two steps behind the other ranks."""

    def __init__(self, run: LocalRun) -> None:
        super().__init__(run)
        self.steps, self.has_moved = [0, 0], threading.Condition()

    def before(self, rank: int, step: int) -> StopOrder:
        with self.has_moved:
            if rank == 2:
                required_step = min(step + 3, 11)  # 11 is the last step
                assert self.has_moved.wait_for(lambda: min(self.steps) >= required_step, 60)
            else:
                self.steps[rank] = step
                self.has_moved.notify_all()
        return StopOrder.NONE


def test_late_rank_is_not_reported_as_diverged() -> None:
    """With backup workers the late rank receives the sum of a later step."""
    strategy = {"name": "ps-sync", "backup_workers": 1}
    run = LocalRun(job(strategy, 3, epochs=None, steps=12), Streamed)
    assert SlowRank(run).make()
    run.close()
    assert (
        sum(report.samples == 0 for report in run.reports[2] if isinstance(report, StepReport)) > 3
    )


def test_warns_of_evaluation_by_epochs_without_epochs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = train(job("ring", 1, steps=5), Evaluated)
    assert "unless `evaluation.every_steps` is set" in caplog.text
    assert [report.step for report in run.reports[0] if isinstance(report, EvalReport)] == [5]


def test_rejects_checkpoints_by_epochs_without_epochs() -> None:
    with pytest.raises(Exception, match="a stream without a length, which has no epochs"):
        train(job(steps=5, checkpoint={"every_epochs": 1}), Streamed)


def test_iterable_map_style_dataset_is_not_a_stream() -> None:
    class Both(Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return [0.0, 1.0, 2.0][index]

        def __iter__(self) -> Iterator[Any]:
            return iter([5.0])

    assert not isinstance(checked_data(job(), MapStyleTask(), Both(), "train_data"), StreamSamples)
