"""Batches of one worker: torch's DataLoader over the sampler's plan, collated and on the device."""

import copy
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    get_worker_info,
)

from distplat.platform.sampler import Sampler
from distplat.platform.spec import Job
from distplat.strategies.algorithms.seeds import epoch_seed, evaluation_data_seed
from distplat.strategies.compat import COLLATE_RULES, collate_by
from distplat.strategies.loop.loaders import ByValue, LoaderContext, all_importable, importable
from distplat.strategies.loop.seeding import generators_kept, seed_sample


class Run(NamedTuple):
    """Samples that follow each other in an epoch's order: those of a micro-batch."""

    seed: int
    """Of the epoch; each sample's own is mixed from it and the sample's place."""
    first: int
    """Place of the first sample."""
    ids: list[int]
    """In the data set."""


class _Plan:
    """The samples of every micro-batch of one rank, in order: a torch `batch_sampler`."""

    def __init__(self, sampler: Sampler, rank: int, parts: int, steps: range) -> None:
        self._sampler, self._rank, self._parts, self._steps = sampler, rank, parts, steps

    def __iter__(self) -> Iterator[Run]:
        for step in self._steps:
            yield from runs(self._sampler, step, self._rank, self._parts)


def runs(sampler: Sampler, step: int, rank: int, parts: int) -> Iterator[Run]:
    """Give the samples of each micro-batch of a rank's step, and where they are in the epoch."""
    seed = epoch_seed(sampler.seed, sampler.epoch_of(step))
    first = sampler.first_place(step, rank)
    for ids in sampler.micro_batches(step, rank, parts):
        yield Run(seed, first, ids.tolist())
        first += len(ids)


def make_sampler(job: Job, data: Dataset[Any], replicas: int | None = None) -> Sampler:
    """
    Build the run's sampler.

    Args:
        job: the run.
        data: the training samples.
        replicas: copies of the model, which each take a part of the batch; None: one per worker.

    Raises:
        ValueError: the data set has no length, or is too small for one batch.
    """
    try:
        size = len(data)  # type: ignore[arg-type]
    except TypeError:
        size = -1
    if size < 0 or isinstance(data, IterableDataset):
        raise ValueError(
            f"{type(data).__name__} has no length: train_data must be a map-style data set"
        )
    return Sampler(
        size=size,
        batch=job.global_batch_size,
        world=replicas or job.scaling.world,
        seed=job.seed,
        shuffle=job.data.shuffle,
        drop_last=job.data.drop_last,
    )


def total_steps(job: Job, sampler: Sampler) -> int:
    """Give the number of updates in the run."""
    return job.steps if job.steps is not None else (job.epochs or 0) * sampler.steps_per_epoch


def micro_batches(
    job: Job, data: Dataset[Any], sampler: Sampler, rank: int, steps: range, parts: int
) -> Iterator[Any]:
    """
    Give the collated micro-batches of one rank, in the order in which its steps want them.

    Args:
        job: how the data is loaded.
        data: the training samples.
        sampler: says which are whose.
        rank: place among those that the sampler cuts the batch for.
        steps: in this order.
        parts: micro-batches of a step.
    """
    return iter(Loader(job, data, _Plan(sampler, rank, parts, steps)))


def eval_batches(job: Job, data: Dataset[Any], ids: range, size: int) -> Iterator[tuple[Any, int]]:
    """Give the collated batches of some samples, `size` or fewer in each, and the numbers."""
    seed = evaluation_data_seed(job.seed)
    groups = [ids[i : i + size] for i in range(0, len(ids), size)]
    plan = [Run(seed, group.start, [*group]) for group in groups]
    return zip(Loader(job, data, plan), map(len, groups), strict=True)


def one_batch(data: Dataset[Any], ids: list[int]) -> Any:
    """Give some samples, collated."""
    return collated(Samples(data).__getitems__(Run(0, 0, ids)))


class Loader:
    """
    A torch loader of a plan: in this process, or by processes that leave nothing behind.

    Args:
        job: how the data is loaded.
        data: the samples.
        plan: a torch `batch_sampler` that gives runs.
        persistent: whether it is to be gone through more than once.
    """

    def __init__(
        self, job: Job, data: Dataset[Any], plan: Iterable[Run], *, persistent: bool = False
    ) -> None:
        count = job.data.num_loaders
        self._context = LoaderContext() if count else None
        self._timeout_s = job.failure.start_timeout_s
        self._loader = DataLoader(
            Samples(data),
            batch_sampler=plan,  # type: ignore[arg-type]
            collate_fn=collated,
            num_workers=count,
            prefetch_factor=job.data.prefetch_factor if count else None,
            multiprocessing_context=self._context,
            pin_memory=job.scaling.use_gpu and count > 0,
            persistent_workers=persistent and count > 0,
            generator=torch.Generator(),  # the global one is not to be drawn from
        )

    def __iter__(self) -> Iterator[Any]:
        """Begin to read; the batches in order."""
        batches = iter(self._loader)
        if self._context is not None:
            self._context.open_and_forget(self._timeout_s)
        return batches


class Samples(Dataset[Any]):
    """
    The user's data, read run by run, each sample with global generators of its own seed.

    Args:
        data: the samples. Its own `__getitems__` is used if it has one; then a whole run has the
            seed of its first sample. A `Subset` is looked through.
    """

    def __init__(self, data: Dataset[Any]) -> None:
        self._data = data

    def __getstate__(self) -> dict[str, Any]:
        """Go to a loader process, the classes of a script with it."""
        return {"_data": ByValue(self._data)}

    def __getitems__(self, run: Run) -> list[Any]:
        """Give the samples of a run."""
        if not may_draw(self._data):
            return self._read(run)
        if get_worker_info() is None:
            with generators_kept():  # dropout goes on as if no data had been read
                return self._read_seeded(run)
        return self._read_seeded(run)

    def _read(self, run: Run) -> list[Any]:
        data: Any = self._data
        many = getattr(data, "__getitems__", None)
        if many is not None:
            found: list[Any] = many(list(run.ids))
            return found
        return [data[index] for index in run.ids]

    def _read_seeded(self, run: Run) -> list[Any]:
        data: Any = self._data
        ids: list[int] = run.ids
        while type(data) is Subset:  # its own __getitems__ would read all samples with one seed
            data, ids = data.dataset, [data.indices[index] for index in ids]
        many = getattr(data, "__getitems__", None)
        try:
            if many is not None:
                seed_sample(run.seed, run.first)
                found: list[Any] = many(ids)
                return found
            samples = []
            for place, index in enumerate(ids, run.first):
                seed_sample(run.seed, place)
                samples.append(data[index])
            return samples
        except Exception as error:
            if get_worker_info() is None or importable(type(error)):
                raise
            # The worker could not read an exception whose class a script has.
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def may_draw(data: Any) -> bool:
    """Say whether reading a sample may run code of the user's: seeding costs 7 us a sample."""
    while type(data) is Subset:
        data = data.dataset
    if type(data) is ConcatDataset:
        return any(may_draw(part) for part in data.datasets)
    return type(data) not in (TensorDataset, list, tuple, range)


_Rules = dict[type | tuple[type, ...], Callable[..., Any]]


class _Dataclass(ABC):  # noqa: B024  it is only asked for its subclasses
    """What torch's rules do not know; a mapping or a tuple that is one is the other to them."""

    @classmethod
    def __subclasshook__(cls, kind: type) -> bool:
        return hasattr(kind, "__dataclass_fields__") and not issubclass(kind, Mapping | tuple)


def _by_field(batch: list[Any], *, collate_fn_map: _Rules | None = None) -> Any:
    together = {}
    for field in fields(batch[0]):
        values = [getattr(one, field.name, None) for one in batch]
        if any(value is not None for value in values):  # an optional field that nobody has set
            together[field.name] = collate_by(collate_fn_map or {}, values)
    return with_fields(batch[0], together)


_RULES: _Rules = {**COLLATE_RULES, _Dataclass: _by_field}


def collated(samples: list[Any]) -> Any:
    """
    Give the batch of some samples, in a loader process in a form that reaches the worker.

    Raises:
        TypeError: a sample holds what cannot be put together, None for one.
    """
    batch = collate_by(_RULES, samples)
    if get_worker_info() is None or all_importable(batch):
        return batch
    return ByValue(batch)


def to_device(batch: Any, device: torch.device) -> tuple[Any, Any]:
    """
    Take a collated (inputs, targets) apart and move its tensors to a device.

    Raises:
        ValueError: it is no pair.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise ValueError("a sample of train_data must be a pair (inputs, targets)")
    return moved(batch[0], device), moved(batch[1], device)


def moved(value: Any, device: torch.device) -> Any:
    """
    Move tensors to a device: alone, in containers, in dataclasses, in what has a method `to`.

    What holds nothing that moves is given back as it is, so on the CPU every type is kept. A
    container that cannot be made again with other contents becomes a plain dict or list.
    """
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return _mapping(value, {key: moved(item, device) for key, item in value.items()})
    if callable(getattr(value, "to", None)):  # before tuples: a PackedSequence is one
        return value.to(device)
    if isinstance(value, list | tuple):
        return _sequence(value, [moved(item, device) for item in value])
    if is_dataclass(value) and not isinstance(value, type):
        return _dataclass(value, device)
    return value


def _mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    if all(items[key] is item for key, item in value.items()):
        return value
    if type(value) is dict:
        return items
    if isinstance(value, MutableMapping):
        clone = copy.copy(value)  # it may have more than items: a default, an encoding
        clone.update(items)
        return clone
    try:
        return type(value)(items)  # type: ignore[call-arg]
    except TypeError:
        return items


def _sequence(value: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value
    if hasattr(value, "_make"):  # a namedtuple takes its items one by one
        return value._make(items)
    try:
        return type(value)(items)
    except TypeError:
        return items


def _dataclass(value: Any, device: torch.device) -> Any:
    there = [field.name for field in fields(value) if hasattr(value, field.name)]
    items = {name: moved(getattr(value, name), device) for name in there}
    if all(getattr(value, name) is item for name, item in items.items()):
        return value
    return with_fields(value, items)


def with_fields(value: Any, items: Mapping[str, Any]) -> Any:
    """Give a copy of a dataclass with other values; its `__init__` may not take them all."""
    clone = copy.copy(value)
    for name, item in items.items():
        object.__setattr__(clone, name, item)  # it may be frozen
    return clone
