"""Streams as training data: what one process makes of them, under any number of readers."""

import random
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from comparison import distance, same_bits
from hybrid_models import whole
from local_run import Attempt, LocalRun, train
from stream_task import BATCH, SAMPLES, Numbered, iterable, job, read, stream, tensors
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset, get_worker_info

from distplat.platform.progress import EvalReport, StepReport
from distplat.platform.stop_order import StopOrder
from distplat.strategies.loop.checks import checked_data
from distplat.strategies.loop.streams import StreamSamples
from distplat.strategies.task import Task

pytestmark = pytest.mark.usefixtures("loader_server")


class Rows(IterableDataset[Any]):
    """The same samples, one after the other."""

    def __iter__(self) -> Iterator[Any]:
        return zip(*tensors(), strict=True)


class Long(Rows):
    """It says how many it has."""

    def __len__(self) -> int:
        return SAMPLES


class Streamed(Numbered):
    def train_data(self) -> Any:
        return Rows()


class Sized(Numbered):
    def train_data(self) -> Any:
        return Long()


class Repeated(Numbered):
    """As many passes as a test makes steps, one after the other."""

    def train_data(self) -> Any:
        inputs, targets = tensors()
        return TensorDataset(inputs.repeat(3, 1)[: 11 * BATCH], targets.repeat(3)[: 11 * BATCH])


WORLDS = [("ring", 1), ("ring", 2), ("ring", 3), ("ps-sync", 1), ("ps-sync", 3), ("ps-async", 1)]


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", [Streamed, Sized])
@pytest.mark.parametrize(("strategy", "workers"), WORLDS)
def test_a_stream_trains_to_the_bits_of_its_numbered_samples(
    strategy: str, workers: int, kind: type[Task]
) -> None:
    """By epochs: a short batch ends each of them, and in it a rank of three has no sample."""
    given = job(strategy, workers, gradient_accumulation=2)
    numbered, streamed = train(given, Numbered), train(given, kind)
    assert same_bits(numbered, streamed)
    steps = [one for one in streamed.reports[0] if isinstance(one, StepReport)]
    assert [one.epoch for one in steps] == [epoch for epoch in range(3) for _ in range(5)]
    assert distance(streamed.parameters(), train(job(), Numbered).parameters()) < 1e-5


@pytest.mark.parametrize(("strategy", "workers"), WORLDS)
def test_by_steps_its_passes_follow_each_other_in_whole_batches(
    strategy: str, workers: int
) -> None:
    given = job(strategy, workers, steps=11, lr_schedule={"name": "cosine"})
    assert same_bits(train(given, Repeated), train(given, Streamed))


def test_by_steps_one_with_a_length_has_epochs() -> None:
    given = job("ring", 2, steps=11)
    assert same_bits(train(given, Numbered), train(given, Sized))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
def test_a_stream_under_hybrid(strategy: str) -> None:
    options = {"pipeline": 2, "data": 2, "cut": "even", "micro_batches": 2}
    given = job({"name": "hybrid", "data_strategy": strategy, **options}, 4)
    numbered, streamed = whole(train(given, Numbered)), whole(train(given, Streamed))
    assert numbered.keys() == streamed.keys()
    assert all(torch.equal(numbered[name], streamed[name]) for name in numbered)


class Noted(Numbered):
    """Notes what is trained on."""

    seen: ClassVar[Counter[int]] = Counter()

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        if torch.is_grad_enabled():
            Noted.seen.update(targets.tolist())
        return nn.functional.cross_entropy(outputs, targets % 3)


class Numbers(IterableDataset[Any]):
    """Samples that are numbers; `count` of them."""

    def __init__(self, count: int = SAMPLES) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.count):
            yield torch.full((5,), float(number)), number


class NotedStream(Noted):
    def train_data(self) -> Any:
        return Numbers()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_asynchronous_workers_take_each_sample_once(workers: int) -> None:
    """Their tasks come in any order, so a worker may have to begin a pass again."""
    Noted.seen.clear()
    train(job("ps-async", workers), NotedStream, most=2)
    assert Noted.seen == dict.fromkeys(range(SAMPLES), 3)


# --- readers ---------------------------------------------------------------------------------


class Drawing(IterableDataset[Any]):
    """Shuffles itself, with the global generators, and draws for each sample."""

    def __iter__(self) -> Iterator[Any]:
        order = [*range(SAMPLES)]
        random.shuffle(order)
        for number in order:
            yield torch.tensor([number, random.random(), np.random.rand(), torch.rand(()).item()])


class Sharing(Drawing):
    """Reads a loader's part by itself, as torch's documentation shows."""

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        for place, sample in enumerate(super().__iter__()):
            if info is None or place % info.num_workers == info.id:
                yield sample


@pytest.mark.parametrize("kind", [Drawing, Sharing])
def test_what_is_read_does_not_depend_on_who_reads(kind: type[Drawing]) -> None:
    alone = read(kind())
    numbers = [
        [int(sample[0]) for batch in alone[e * 5 : e * 5 + 5] for sample in batch] for e in range(3)
    ]
    assert all(sorted(one) == [*range(SAMPLES)] for one in numbers)
    assert len({tuple(one) for one in numbers}) == 3, "each pass is shuffled anew"
    assert len({sample[1] for batch in alone for sample in batch}) == 3 * SAMPLES
    assert read(kind(), world=3) == alone
    assert read(kind(), world=2, parts=3) == alone
    assert read(kind(), world=2, parts=2, data={"num_workers": 2}) == alone


def test_passes_without_a_seam_do_not_depend_on_who_reads() -> None:
    alone = read(Drawing(), steps=10)
    assert [len(one) for one in alone] == [BATCH] * 10
    numbers = [int(sample[0]) for batch in alone for sample in batch]
    assert sorted(numbers[:SAMPLES]) == sorted(numbers[SAMPLES : 2 * SAMPLES]) == [*range(SAMPLES)]
    assert read(Drawing(), world=3, steps=10) == alone
    assert read(Drawing(), world=2, steps=10, data={"num_workers": 2}) == alone


def test_earlier_samples_are_read_again() -> None:
    data = stream(Drawing(), epochs=3)
    found = {n: data[n].tolist() for n in (0, 40, 41, 3, 36, 37, 100)}
    assert len({one[1] for one in found.values()}) == 7
    for number in (37, 100, 0, 41):
        assert data[number].tolist() == found[number]


class Evaluated(Streamed):
    def eval_data(self) -> Any:
        return Rows()


class EvaluatedByNumber(Numbered):
    def eval_data(self) -> Any:
        return TensorDataset(*tensors())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_to_evaluate_on(workers: int) -> None:
    def figures(run: LocalRun) -> list[tuple[int, int, dict[str, float]]]:
        found = [r for reports in run.reports for r in reports if isinstance(r, EvalReport)]
        return [(one.step, one.samples, dict(one.sums)) for one in found]

    runs = [train(job("ring", workers), kind) for kind in (EvaluatedByNumber, Evaluated)]
    assert figures(runs[0]) == figures(runs[1])
    assert len(figures(runs[1])) == 3 * workers * workers


# --- odd streams -----------------------------------------------------------------------------


class Once(IterableDataset[Any]):
    """Keeps its iterator, so a second pass goes on where the first one stood."""

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


class Itself(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return torch.zeros(5), 0


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.zeros(5), 0


class Says(Numbers):
    """Says another length than it has."""

    def __init__(self, count: int, says: int) -> None:
        super().__init__(count)
        self._says = says

    def __len__(self) -> int:
        return self._says


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
ODD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "empty": (lambda: Numbers(0), STEPS, r"train_data\(\) gave no samples"),
    "says 0": (lambda: Says(0, 0), EPOCHS, r"train_data\(\) gave no samples"),
    "read once": (Once, STEPS, "gave another sample 0 when it was read again"),
    "read once, few": (lambda: Once(9), STEPS, "gave no samples when it was read again"),
    "counted once": (Once, EPOCHS, "ended after 0 samples in pass 0"),
    "unseeded": (Unseeded, STEPS, "gave another sample 0 when it was read again"),
    "itself": (Itself, STEPS, "Itself is its own iterator, so it can be read only once"),
    "ends early": (lambda: Says(30, 37), EPOCHS, "ended after 30 samples in pass 0, and 37 were"),
    "goes on": (lambda: Says(40, 37), EPOCHS, "gives more than the 37 samples of its len"),
    "shrinks": (Shrinking, EPOCHS, "ended after 36 samples in pass 0, and 37 were"),
    "raises": (Broken, STEPS, "shard 3 is gone"),
    "no end": (
        Endless,
        {**EPOCHS, "failure": {"start_timeout_s": 0.2}},
        "samples in 0.1 s and has not ended: `epochs` needs their number. Set `steps`",
    ),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("odd", ODD)
def test_a_stream_that_cannot_be_trained_on_is_told(odd: str, workers: int) -> None:
    source, fields, message = ODD[odd]
    task = type("Odd", (Noted,), {"train_data": lambda self: source()})
    with pytest.raises((ValueError, LookupError), match=message):
        train(job("ring", workers, **fields), task)


@pytest.mark.parametrize("count", [1, 5, 8])
def test_a_stream_shorter_than_a_batch(count: int) -> None:
    """By epochs all of it is each step's batch; by steps it is repeated until the batch is full."""
    made = (tensors(count)[0], tensors(count)[1])
    short = type("Short", (Numbered,), {"train_data": lambda self: iterable(*made)})
    numbered = type("Short", (Numbered,), {"train_data": lambda self: TensorDataset(*made)})
    assert same_bits(train(job("ring", 3), short), train(job("ring", 3), numbered))
    assert [len(one) for one in read(Numbers2(count), steps=3)] == [BATCH] * 3


class Numbers2(Numbers):
    def __iter__(self) -> Iterator[Any]:
        return (torch.tensor(float(number)) for number in range(self.count))


def test_a_sampler_beside_a_stream_is_refused() -> None:
    task = type("Both", (Streamed,), {"sampler": lambda self, data, epoch: [0]})
    with pytest.raises(ValueError, match=r"sampler\(\) returns an order of indices"):
        train(job(), task)


def parting(first: int) -> type[Task]:
    """Each rank's data differs from this sample on."""

    class Each(Numbered):
        made = 0

        def __init__(self) -> None:
            Each.made += 1
            self._number = Each.made

        def train_data(self) -> Any:
            inputs, targets = tensors()
            inputs[first:] += self._number
            return iterable(inputs, targets)

    return Each


def test_ranks_that_read_other_streams_are_told() -> None:
    text = r"(?s)has other training samples than worker-.*do not split data by rank"
    with pytest.raises(Exception, match=text):
        train(job("ring", 2), parting(0))


@pytest.mark.parametrize("strategy", ["ring", "ps-sync", "hybrid"])
def test_ranks_whose_streams_part_later_are_told(strategy: str) -> None:
    """The first 16 samples are the same, and the fourth batch begins with another one."""
    options = {"pipeline": 1, "data": 2} if strategy == "hybrid" else {}
    plan = job({"name": strategy, **options}, 2, gradient_accumulation=2)
    with pytest.raises(ValueError, match=r"in step 4 worker-. read another batch of a stream"):
        train(plan, parting(3 * BATCH))


class OneIsSlow(Attempt):
    """Rank 2 makes a step once the others have made it, and the two after it."""

    def __init__(self, run: LocalRun) -> None:
        super().__init__(run)
        self.at, self.moved = [0, 0], threading.Condition()

    def before(self, rank: int, step: int) -> StopOrder:
        with self.moved:
            if rank == 2:
                later = min(step + 3, 11)  # the last
                assert self.moved.wait_for(lambda: min(self.at) >= later, 60)
            else:
                self.at[rank] = step
                self.moved.notify_all()
        return StopOrder.NONE


def test_who_is_behind_reads_no_other_stream() -> None:
    """With backup workers it is told the sum of a later step than that of its batch."""
    strategy = {"name": "ps-sync", "backup_workers": 1}
    run = LocalRun(job(strategy, 3, epochs=None, steps=12), Streamed)
    assert OneIsSlow(run).make()
    run.close()
    assert sum(one.samples == 0 for one in run.reports[2] if isinstance(one, StepReport)) > 3


def test_evaluations_by_epochs_of_what_has_none_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = train(job("ring", 1, steps=5), Evaluated)
    assert "unless `evaluation.every_steps` is set" in caplog.text
    assert [one.step for one in run.reports[0] if isinstance(one, EvalReport)] == [5]


def test_checkpoints_by_epochs_of_what_has_none_are_refused() -> None:
    with pytest.raises(Exception, match="a stream without a length, which has no epochs"):
        train(job(steps=5, checkpoint={"every_epochs": 1}), Streamed)


def test_a_map_style_data_set_that_can_be_gone_through_stays_one() -> None:
    class Both(Dataset[Any]):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            return [0.0, 1.0, 2.0][index]

        def __iter__(self) -> Iterator[Any]:
            return iter([5.0])

    assert not isinstance(checked_data(job(), Numbered(), Both(), "train_data"), StreamSamples)
