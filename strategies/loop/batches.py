"""Batches of a worker: torch's DataLoader over the sampler's plan of the whole run."""

import weakref
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
from typing_extensions import override

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
"""Prefix of the note about sample ids that is added to errors of user code."""
_SHOWN = 8

Collate = Callable[[list[Any]], Any]
"""Combines samples into a batch."""


class SampleRun(NamedTuple):
    """Consecutive samples of an epoch's order that form a micro-batch."""

    seed: int
    """Seed of the epoch; a sample's seed is derived from it and the sample's position."""
    first: int
    """Position of the first sample in the epoch."""
    ids: list[int]
    """Indices in the data set."""
    marked: bool = False
    """Whether to return a stream's position before these samples, too."""
    batch: int | None = None
    """Index of the global batch's first sample, to compare ranks by; None: not compared."""


class FilteredBatch(NamedTuple):
    """A batch from which the task's `collate` dropped samples."""

    batch: Any
    samples: int
    """Number of samples in the batch."""


def count_samples(batch: Any, samples: Sequence[Any]) -> int:
    """
    Return the number of samples in a batch, because a `collate` may drop samples.

    Dropped samples are those that are None, and others if each remaining one has a row in the
    batch. A batch without rows has no samples. A `collate` may also replace samples, or build a
    batch of None only: then all samples count.

    Args:
        batch: return value of `collate`.
        samples: argument of `collate`.
    """
    present = [sample for sample in samples if sample is not None]
    lengths = {len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()}
    if not present and lengths == {0} and all(isinstance(t, Tensor) for t in tree_leaves(batch)):
        return 0
    if present and len(lengths) == 1 and (rows := min(lengths)) < len(present):
        return rows if _are_rows(batch, rows, present) else len(present)
    replaced = len(samples) in lengths and len(present) not in lengths
    return len(samples) if replaced or not present else len(present)


def _are_rows(batch: Any, rows: int, samples: Sequence[Any]) -> bool:
    """Return whether each of a batch's `rows` rows is shaped like a field of the samples."""
    shapes = [[getattr(leaf, "shape", ()) for leaf in tree_leaves(sample)] for sample in samples]
    parts = [leaf for leaf in tree_leaves(batch) if not isinstance(leaf, Tensor) or leaf.dim()]
    if all(getattr(part, "shape", None) in shapes[0] for part in parts):
        return False  # a list of samples, or lists of their fields
    return all(shape == shapes[0] for shape in shapes) and all(
        isinstance(part, Tensor) and len(part) == rows and part.shape[1:] in shapes[0]
        for part in parts
    )


def unpack_batch(batch: Any, samples: int) -> tuple[Any, int]:
    """
    Return a batch, and the number of samples over which its loss is averaged.

    Args:
        batch: output of a loader.
        samples: number of samples that were read for the batch.
    """
    return (batch.batch, batch.samples) if isinstance(batch, FilteredBatch) else (batch, samples)


def sample_runs(
    sampler: Sampler, step: int, rank: int, parts: int, *, marked: bool = False
) -> Iterator[SampleRun]:
    """Yield the samples of each micro-batch of a rank's step, with their positions in the epoch."""
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
        job: the job.
        data: the training data.
        replicas: copies of the model, which each get a part of the batch; None: one per worker.
        order: order of the task's sampler; None: the job's order.

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
    """Return the number of steps of the run; `UNBOUNDED` if only its time limit ends it."""
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
    Return the collated micro-batches of one rank, in the order of its steps.

    Args:
        job: has the settings of the loader.
        data: the training data.
        sampler: assigns samples to ranks.
        rank: rank among those for which the sampler splits the batch.
        steps: steps to read, in this order.
        parts: number of micro-batches per step.
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
    """Return the batches; a stream records the positions that come with its batches."""
    return _recorded(data, batches) if isinstance(data, StreamSamples) else batches


def _recorded(stream: StreamSamples, batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, StreamItem):
            stream.note(batch)
            yield batch.batch
        else:
            yield batch


def fingerprint_of_batch(data: Dataset[Any]) -> int:
    """Return the fingerprint of a stream's last batch; 0: the data is not a stream."""
    return data.fingerprint if isinstance(data, StreamSamples) else 0


def one_batch(data: Dataset[Any], ids: list[int], collate: Collate | None = None) -> Any:
    """Return a batch of some samples."""
    batch = Samples(data, collate).__getitems__(SampleRun(0, 0, ids))
    return unpack_batch(batch, len(ids))[0]


class _RunSampler:
    """A torch `batch_sampler` whose runs can be replaced between iterations."""

    runs: Iterable[SampleRun] = ()

    def __iter__(self) -> Iterator[SampleRun]:
        return iter(self.runs)


class Loader:
    """
    DataLoader of plans, in this process or in loader processes that leave no files or semaphores.

    Args:
        job: has the settings of the loader.
        data: the data set.
        collate: see `collate_of`.
        persistent: keep the loader processes between plans.
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
            collate_fn=sendable,  # `Samples` collates in the process that reads the samples
            num_workers=count,
            prefetch_factor=job.data.prefetch_factor if count else None,
            multiprocessing_context=self._context,
            pin_memory=_pins(job),
            persistent_workers=persistent and count > 0,
            generator=torch.Generator(),  # torch would draw a seed from the global generator
        )
        self._hold: weakref.finalize[[Iterator[Any]], Loader] | None = None

    def batches(self, plan: Iterable[SampleRun]) -> Iterator[Any]:
        """Start reading a plan and return its batches in order; the previous plan is exhausted."""
        self._plan.runs = plan
        batches = iter(self._loader)
        if self._context is None:
            return batches
        self._context.unlink_semaphores(self._timeout_s)
        if self._hold is not None:
            self._hold.detach()
        # An exception's traceback can put this loader into a reference cycle. If torch's iterator
        # were part of the cycle, its queues would be finalized before it: it would wait 5 s for
        # its processes, and kill them.
        self._hold = weakref.finalize(self, _release, batches)
        self._hold.atexit = False
        return self._read(batches)

    def _read(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches; the loader lives as long as the returned iterator."""
        yield from batches


def _release(batches: Iterator[Any]) -> None:
    """Do nothing; `weakref.finalize` drops its reference to the batches after this call."""


def _pins(job: Job) -> bool:
    """Return whether batches are copied to pinned memory."""
    if job.data.pin_memory is not None:
        return job.data.pin_memory
    return job.scaling.use_gpu and job.data.num_workers > 0


class EvalLoader:
    """
    Loader of evaluation data, reused by all evaluations.

    Args:
        job: has the settings of the loader.
        task: the task, whose `collate` is used.
    """

    def __init__(self, job: Job, task: Task) -> None:
        self._job, self._task = job, task
        self._persistent: tuple[Dataset[Any], Loader] | None = None

    def batches(self, data: Dataset[Any], ids: range, size: int) -> Iterator[tuple[Any, int]]:
        """Yield collated batches of at most `size` samples, with their numbers of samples."""
        seed = evaluation_data_seed(self._job.seed)
        groups = [ids[i : i + size] for i in range(0, len(ids), size)]
        plan = [SampleRun(seed, group.start, [*group]) for group in groups]
        return zip(self._batches_of_plan(data, plan), map(len, groups), strict=True)

    def _batches_of_plan(self, data: Dataset[Any], plan: Iterable[SampleRun]) -> Iterator[Any]:
        if not self._job.data.persistent_workers:
            return Loader(self._job, data, collate_of(self._task)).batches(plan)
        if self._persistent is None or self._persistent[0] is not data:
            loader = Loader(self._job, data, collate_of(self._task), persistent=True)
            self._persistent = data, loader
        return self._persistent[1].batches(plan)


class Samples(Dataset[Any]):
    """
    The user's data set, read in runs; the global generators are seeded before each sample.

    Args:
        data: the data set. If it has `__getitems__`, that method reads a run, with the seed of the
            run's first sample. A `Subset` is unwrapped.
        collate: see `collate_of`.
    """

    def __init__(self, data: Dataset[Any], collate: Collate | None = None) -> None:
        self._data: Any = data
        self._collate = collate

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Pickle for a loader process; classes of a script are pickled by value."""
        return {"_data": ByValue(self._data), "_collate": ByValue(self._collate)}

    def __getitems__(self, run: SampleRun) -> Any:
        """Return the batch of a run."""
        uses_random = may_use_random(self._data)
        if not uses_random and self._collate is None:
            with _noting_ids(run.ids):
                return collated(self._read(self._data, run.ids))
        # In the training process, reading data must not affect the random numbers of dropout.
        with preserve_rng_state() if get_worker_info() is None else nullcontext():
            with _picklable_errors():
                if isinstance(self._data, StreamSamples):
                    return self._of_stream(self._data, run)
                with _noting_ids(run.ids):
                    samples = (
                        self._read_seeded(run) if uses_random else self._read(self._data, run.ids)
                    )
                    return self._collated(samples, run)

    def _of_stream(self, data: StreamSamples, run: SampleRun) -> Any:
        read = data.read(run.ids[0], len(run.ids), mark=run.marked, look_at=run.batch)
        batch = self._collated(read.batch, run)
        return batch if run.batch is None else read._replace(batch=batch)

    def _collated(self, samples: list[Any], run: SampleRun) -> Any:
        if self._collate is None:
            return collated(samples)
        seed_quickly(collate_seed(run.seed, run.first))
        batch = self._collate(samples)
        count = count_samples(batch, samples)
        return FilteredBatch(batch, count) if count < len(samples) else batch

    def _read(self, data: Any, ids: list[int]) -> list[Any]:
        get_items = getattr(data, "__getitems__", None)
        if get_items is not None:
            samples: list[Any] = get_items(list(ids))
            return samples
        return [data[index] for index in ids]

    def _read_seeded(self, run: SampleRun) -> list[Any]:
        data: Any = self._data
        ids: list[int] = run.ids
        while type(data) is Subset:  # its __getitems__ would read all samples with one seed
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
            _note_ids(error, [index])
            raise
        return samples


@contextmanager
def _noting_ids(ids: Sequence[int]) -> Iterator[None]:
    """Add a note with the sample ids to an error of the block."""
    try:
        yield
    except Exception as error:
        _note_ids(error, ids)
        raise


def _note_ids(error: Exception, ids: Sequence[int]) -> None:
    """Add a note with sample ids to an error, unless it has a more specific one."""
    if not any(note.startswith(SAMPLES) for note in getattr(error, "__notes__", ())):
        what = "sample" if len(ids) == 1 else "samples"
        more = ", ..." if len(ids) > _SHOWN else ""
        error.add_note(f"{SAMPLES}{what} {', '.join(map(str, ids[:_SHOWN]))}{more}")


@contextmanager
def _picklable_errors() -> Iterator[None]:
    """Replace errors of a loader process whose class the worker cannot import."""
    try:
        yield
    except Exception as error:
        if get_worker_info() is None or importable(type(error)):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def collate_of(task: Task) -> Collate | None:
    """Return the task's `collate`; None: the task uses torch's `default_collate`."""
    return None if type(task).collate is Task.collate else task.collate


def may_use_random(data: Any) -> bool:
    """Return whether reading a sample may draw random numbers; seeding costs 7 us per sample."""
    while type(data) is Subset:
        data = data.dataset
    if type(data) is ConcatDataset:
        return any(may_use_random(part) for part in data.datasets)
    return type(data) not in (TensorDataset, list, tuple, range)
