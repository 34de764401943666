"""Batches of one worker: torch's DataLoader over the sampler's plan of the whole run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    Subset,
    TensorDataset,
    get_worker_info,
)

from distplat.platform.checkpoints import is_due
from distplat.platform.progress import UNBOUNDED
from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.algorithms.seeds import collate_seed, epoch_seed, evaluation_data_seed
from distplat.strategies.loop.collate import collated, sendable
from distplat.strategies.loop.loaders import ByValue, LoaderContext, importable
from distplat.strategies.loop.seeding import preserve_rng_state, seed_quickly, seed_sample
from distplat.strategies.loop.streams import StreamItem, StreamSamples
from distplat.strategies.loop.task_settings import TaskOrder
from distplat.strategies.task import Task
from distplat.strategies.torch_compat import tree_leaves

SAMPLES = "of the data set: "
"""Begins a note at an error of the user's: the samples that were read, or put together."""
_SHOWN = 8

Collate = Callable[[list[Any]], Any]
"""Makes a batch of samples."""


class SampleRun(NamedTuple):
    """Samples that follow each other in an epoch's order: those of a micro-batch."""

    seed: int
    """Of the epoch; each sample's own is mixed from it and the sample's position."""
    first: int
    """Position of the first sample."""
    ids: list[int]
    """In the data set."""
    marked: bool = False
    """Whether the position of a stream before it is wanted, too."""
    batch: int | None = None
    """In the data set, the first sample of all ranks' batch; None: nobody compares it."""


class FilteredBatch(NamedTuple):
    """A batch of which the task's `collate` was given samples that are None, to leave them out."""

    batch: Any
    samples: int
    """The others."""


def samples_of(batch: Any, given: Sequence[Any]) -> int:
    """
    Say how many samples a batch is of: a `collate` may leave some out.

    It may leave out those that are None, or any others of which the batch has a row for each. It
    may as well put others in their place, or make a batch of nothing but None: then the batch has
    as many as were given.

    Args:
        batch: what `collate` has given.
        given: what it was given.
    """
    known = [one for one in given if one is not None]
    lengths = {len(one) for one in tree_leaves(batch) if isinstance(one, Tensor) and one.dim()}
    if known and len(lengths) == 1 and 0 < min(lengths) < len(known):
        rows = min(lengths)
        return rows if _are_rows(batch, rows, known) else len(known)
    filled = len(given) in lengths and len(known) not in lengths
    return len(given) if filled or not known else len(known)


def _are_rows(batch: Any, rows: int, samples: Sequence[Any]) -> bool:
    """Whether a batch has so many samples: each row is like a field of one, and all are alike."""
    shapes = [[getattr(one, "shape", ()) for one in tree_leaves(sample)] for sample in samples]
    parts = [one for one in tree_leaves(batch) if not isinstance(one, Tensor) or one.dim()]
    if all(getattr(part, "shape", None) in shapes[0] for part in parts):
        return False  # a list of samples, or lists of their fields
    return all(one == shapes[0] for one in shapes) and all(
        isinstance(part, Tensor) and len(part) == rows and part.shape[1:] in shapes[0]
        for part in parts
    )


def unpack_batch(batch: Any, samples: int) -> tuple[Any, int]:
    """
    Give a batch, and the samples whose mean its loss is.

    Args:
        batch: as a loader gave it.
        samples: that were read for it.
    """
    return (batch.batch, batch.samples) if isinstance(batch, FilteredBatch) else (batch, samples)


def sample_runs(
    sampler: Sampler, step: int, rank: int, parts: int, *, marked: bool = False
) -> Iterator[SampleRun]:
    """Give the samples of each micro-batch of a rank's step, and where they are in the epoch."""
    seed = epoch_seed(sampler.seed, sampler.epoch_of(step))
    first = sampler.first_position(step, rank)
    batch = sampler.position(step) if sampler.stream else None
    for ids in sampler.micro_batches(step, rank, parts):
        yield SampleRun(seed, first, ids.tolist(), marked, batch)
        first, marked = first + len(ids), False


def make_sampler(
    job: Job, data: Dataset[Any], replicas: int | None = None, order: TaskOrder | None = None
) -> Sampler:
    """
    Build the run's sampler.

    Args:
        job: the run.
        data: the training samples.
        replicas: copies of the model, which each take a part of the batch; None: one per worker.
        order: the task's own; None: as the job says.

    Raises:
        ValueError: the data set is too small for one batch.
    """
    return Sampler(
        size=len(data) if order is None else order.size,  # type: ignore[arg-type]
        batch=job.global_batch_size,
        world=replicas or job.scaling.world,
        seed=job.seed,
        shuffle=job.data.shuffle,
        drop_last=job.data.drop_last,
        order=order,
        stream=isinstance(data, StreamSamples),
    )


def total_steps(job: Job, sampler: Sampler) -> int:
    """Give the number of updates in the run; `UNBOUNDED` where only its time ends it."""
    if job.steps is not None:
        return job.steps
    return UNBOUNDED if job.epochs is None else job.epochs * sampler.steps_per_epoch


def micro_batches(
    job: Job,
    data: Dataset[Any],
    sampler: Sampler,
    rank: int,
    steps: range,
    parts: int,
    collate: Collate | None = None,
) -> Iterator[Any]:
    """
    Give the collated micro-batches of one rank, in the order in which its steps want them.

    Args:
        job: how the data is loaded.
        data: the training samples.
        sampler: says which are whose.
        rank: number among those that the sampler cuts the batch for.
        steps: in this order.
        parts: micro-batches of a step.
        collate: see `collate_of`.
    """
    every, total = job.checkpoint.period(sampler.steps_per_epoch), total_steps(job, sampler)
    due = (rank == 0 and is_due(step + 1, every, total) for step in steps)
    by_step = (
        sample_runs(sampler, step, rank, parts, marked=marked)
        for step, marked in zip(steps, due, strict=True)
    )
    batches = Loader(job, data, collate).batches(chain.from_iterable(by_step))
    return note_positions(data, batches)


def note_positions(data: Dataset[Any], batches: Iterator[Any]) -> Iterator[Any]:
    """Give batches, and have their stream note what came with them."""
    return _noted(data, batches) if isinstance(data, StreamSamples) else batches


def _noted(stream: StreamSamples, batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, StreamItem):
            stream.note(batch)
            yield batch.batch
        else:
            yield batch


def fingerprint_of_batch(data: Dataset[Any]) -> int:
    """Give the fingerprint of the batch that was read last, of a stream; 0: it has none."""
    return data.fingerprint if isinstance(data, StreamSamples) else 0


def one_batch(data: Dataset[Any], ids: list[int], collate: Collate | None = None) -> Any:
    """Give some samples, collated."""
    batch = Samples(data, collate).__getitems__(SampleRun(0, 0, ids))
    return unpack_batch(batch, len(ids))[0]


class _RunSampler:
    """A torch `batch_sampler` that gives other runs each time that it is gone through."""

    runs: Iterable[SampleRun] = ()

    def __iter__(self) -> Iterator[SampleRun]:
        return iter(self.runs)


class Loader:
    """
    A torch loader of plans, in this process or by processes that leave nothing behind.

    Args:
        job: how the data is loaded.
        data: the samples.
        collate: see `collate_of`.
        persistent: whether there are several plans, one after the other: processes live on.
    """

    def __init__(
        self,
        job: Job,
        data: Dataset[Any],
        collate: Collate | None = None,
        *,
        persistent: bool = False,
    ) -> None:
        count = job.data.num_workers
        self._context = LoaderContext() if count else None
        self._timeout_s = job.failure.start_timeout_s
        self._plan = _RunSampler()
        self._loader = DataLoader(
            Samples(data, collate),
            batch_sampler=self._plan,  # type: ignore[arg-type]
            collate_fn=sendable,  # batches are made where their samples are read
            num_workers=count,
            prefetch_factor=job.data.prefetch_factor if count else None,
            multiprocessing_context=self._context,
            pin_memory=_pins(job),
            persistent_workers=persistent and count > 0,
            generator=torch.Generator(),  # the global one is not to be drawn from
        )

    def batches(self, plan: Iterable[SampleRun]) -> Iterator[Any]:
        """Begin to read; the batches of a plan in order. Those of the one before have been read."""
        self._plan.runs = plan
        batches = iter(self._loader)
        if self._context is not None:
            self._context.open_and_forget(self._timeout_s)
        return batches


def _pins(job: Job) -> bool:
    """Say whether batches are put into page-locked memory."""
    if job.data.pin_memory is not None:
        return job.data.pin_memory
    return job.scaling.use_gpu and job.data.num_workers > 0


class EvalLoader:
    """
    Reads evaluation data, as often as there are evaluations.

    Args:
        job: how the data is loaded.
        task: may make batches.
    """

    def __init__(self, job: Job, task: Task) -> None:
        self._job, self._task = job, task
        self._kept: tuple[Dataset[Any], Loader] | None = None

    def batches(self, data: Dataset[Any], ids: range, size: int) -> Iterator[tuple[Any, int]]:
        """Give the collated batches of some samples, `size` or fewer in each, and the numbers."""
        seed = evaluation_data_seed(self._job.seed)
        groups = [ids[i : i + size] for i in range(0, len(ids), size)]
        plan = [SampleRun(seed, group.start, [*group]) for group in groups]
        return zip(self._planned(data, plan), map(len, groups), strict=True)

    def _planned(self, data: Dataset[Any], plan: Iterable[SampleRun]) -> Iterator[Any]:
        if not self._job.data.persistent_workers:
            return Loader(self._job, data, collate_of(self._task)).batches(plan)
        if self._kept is None or self._kept[0] is not data:
            loader = Loader(self._job, data, collate_of(self._task), persistent=True)
            self._kept = data, loader
        return self._kept[1].batches(plan)


class Samples(Dataset[Any]):
    """
    The user's data, read run by run, each sample with global generators of its own seed.

    Args:
        data: the samples. Its own `__getitems__` is used if it has one; then a whole run has the
            seed of its first sample. A `Subset` is looked through.
        collate: see `collate_of`.
    """

    def __init__(self, data: Dataset[Any], collate: Collate | None = None) -> None:
        self._data: Any = data
        self._collate = collate

    def __getstate__(self) -> dict[str, Any]:
        """Go to a loader process, the classes of a script with it."""
        return {"_data": ByValue(self._data), "_collate": ByValue(self._collate)}

    def __getitems__(self, run: SampleRun) -> Any:
        """Give the batch of a run's samples."""
        draws = may_draw(self._data)
        if not draws and self._collate is None:
            with _naming(run.ids):
                return collated(self._read(self._data, run.ids))
        # In this process dropout goes on as if no data had been read.
        with preserve_rng_state() if get_worker_info() is None else nullcontext():
            with _errors_that_travel():
                if isinstance(self._data, StreamSamples):
                    return self._of_stream(self._data, run)
                with _naming(run.ids):
                    samples = self._read_seeded(run) if draws else self._read(self._data, run.ids)
                    return self._together(samples, run)

    def _of_stream(self, data: StreamSamples, run: SampleRun) -> Any:
        read = data.read(run.ids[0], len(run.ids), mark=run.marked, look_at=run.batch)
        batch = self._together(read.batch, run)
        return batch if run.batch is None else read._replace(batch=batch)

    def _together(self, samples: list[Any], run: SampleRun) -> Any:
        if self._collate is None:
            return collated(samples)
        seed_quickly(collate_seed(run.seed, run.first))
        batch = self._collate(samples)
        kept = samples_of(batch, samples)
        return FilteredBatch(batch, kept) if kept < len(samples) else batch

    def _read(self, data: Any, ids: list[int]) -> list[Any]:
        many = getattr(data, "__getitems__", None)
        if many is not None:
            samples: list[Any] = many(list(ids))
            return samples
        return [data[index] for index in ids]

    def _read_seeded(self, run: SampleRun) -> list[Any]:
        data: Any = self._data
        ids: list[int] = run.ids
        while type(data) is Subset:  # its own __getitems__ would read all samples with one seed
            data, ids = data.dataset, [data.indices[index] for index in ids]
        if hasattr(data, "__getitems__"):
            seed_sample(run.seed, run.first)
            return self._read(data, ids)
        samples = []
        index = 0
        try:
            for position, index in enumerate(ids, run.first):
                seed_sample(run.seed, position)
                samples.append(data[index])
        except Exception as error:
            _name(error, [index])
            raise
        return samples


@contextmanager
def _naming(ids: Sequence[int]) -> Iterator[None]:
    """Have an error say of which samples it is."""
    try:
        yield
    except Exception as error:
        _name(error, ids)
        raise


def _name(error: Exception, ids: Sequence[int]) -> None:
    """Note samples at an error, unless it has a note of fewer."""
    if not any(note.startswith(SAMPLES) for note in getattr(error, "__notes__", ())):
        what = "sample" if len(ids) == 1 else "samples"
        more = ", ..." if len(ids) > _SHOWN else ""
        error.add_note(f"{SAMPLES}{what} {', '.join(map(str, ids[:_SHOWN]))}{more}")


@contextmanager
def _errors_that_travel() -> Iterator[None]:
    """Have the worker understand the errors of a loader process: not of a class of a script."""
    try:
        yield
    except Exception as error:
        if get_worker_info() is None or importable(type(error)):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def collate_of(task: Task) -> Collate | None:
    """Give a task's own `collate`; None: batches are made by torch's rules."""
    return None if type(task).collate is Task.collate else task.collate


def may_draw(data: Any) -> bool:
    """Say whether reading a sample may run code of the user's: seeding costs 7 us a sample."""
    while type(data) is Subset:
        data = data.dataset
    if type(data) is ConcatDataset:
        return any(may_draw(part) for part in data.datasets)
    return type(data) not in (TensorDataset, list, tuple, range)
