"""Prepared DataLoaders: this rank's part of the data, with a position to resume from."""

from __future__ import annotations

import itertools
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
)
from typing_extensions import override

from distplat.strategies.function.loader_checks import (
    batch_sampler_of,
    find_batch_sampler,
    has_custom_batches,
    loader_error,
)
from distplat.strategies.function.sharded_sampler import (
    LoaderEpoch,
    RankSampler,
    ShardedSampler,
    check_single_pass,
    epoch_state,
    find_rank_sampler,
)
from distplat.strategies.loop.collate import sendable, to_device
from distplat.strategies.loop.loaders import assign_class_ids
from distplat.strategies.loop.streams import length_of

COPIED_ARGUMENTS = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)
"""Arguments that every prepared loader copies from the user's loader."""
_FORWARDED = (*COPIED_ARGUMENTS, "collate_fn", "drop_last")
"""Attributes of the user's loader that a prepared loader forwards."""
_READ_ONLY = ("dataset", "batch_size", "sampler", "drop_last", "persistent_workers")
"""Attributes that cannot be set, as with torch's DataLoader."""


class DataShard(NamedTuple):
    """This rank's part of the data."""

    rank: int
    world: int
    """Number of ranks."""
    seed: int
    """Seed of the order, and of a stream's random numbers."""


class RankBatch(NamedTuple):
    """A batch of this rank, with the facts that the session needs."""

    batch: Any
    samples: int
    unique: int
    """Number of samples that are not repetitions."""
    fingerprint: int = 0
    """Of all ranks' batch of a stream, or of a sampler's order; see `StepControl.batch`."""


OnBatch = Callable[[object, RankBatch | None, float, int], None]
"""Called with a batch (None: the pass has ended), the seconds waited for it, and the epoch."""


@dataclass
class LoaderUse:
    """How a loop has used a prepared loader."""

    passes: int = 0
    """Passes started with gradients enabled, so that evaluations do not count."""
    called_len: bool = False
    """Whether the loop has called `len`."""


class ShardedLoader(ABC):
    """
    Yields a rank's batches, on its device.

    Each pass is a new epoch, unless `set_epoch` sets another one.

    Args:
        loader: the user's loader.
        shard: this rank's part.
        device: device of the batches.
        on_batch: called with each batch.
    """

    counted = "samples"
    """Unit of positions."""

    def __init__(
        self, loader: DataLoader[Any], shard: DataShard, device: torch.device, on_batch: OnBatch
    ) -> None:
        self.dataset: Any = loader.dataset
        """The user's data set, not split."""
        is_custom = has_custom_batches(loader)
        self.batch_size: Any = (
            None if is_custom else getattr(find_batch_sampler(loader), "batch_size", None)
        )
        """Samples of this rank's batch; None: batches have different sizes."""
        self.use = LoaderUse()
        """How the loop has used this loader."""
        self._given = loader
        self._shard, self._device, self._on_batch = shard, device, on_batch
        self._epoch = self._first = 0  #: the next pass, and the number of batches to skip
        self._epoch_is_set = False  #: whether the loop has set the epoch of the next pass
        self._at: tuple[int, int] | None = None  #: epoch and batches of the current pass

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the user's loader, such as `num_workers`."""
        if name in _FORWARDED:
            return getattr(self._given, name)
        raise AttributeError(f"a prepared DataLoader has no {name!r}", name=name, obj=self)

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        """Reject attributes whose change would have no effect on the batches."""
        if name in _READ_ONLY and (name in vars(self) or name in _FORWARDED):
            text = f"the {name} of a prepared DataLoader cannot be set"
            raise ValueError(f"{text}: prepare a DataLoader that has this {name}")
        super().__setattr__(name, value)

    def __len__(self) -> int:
        """
        Return the number of batches in a pass.

        Raises:
            TypeError: The data set is a stream without a length.
        """
        self.use.called_len = True
        return self.batches_of_pass()

    @abstractmethod
    def batches_of_pass(self) -> int:
        """Return the same number as `len`, without recording its use."""

    @abstractmethod
    def _batches(self, epoch: int, first: int) -> Iterator[RankBatch]:
        """Yield this rank's batches of a pass, from batch `first` on."""

    def description(self) -> str:
        """Return the number of samples in a step, for the log."""
        size, world = self.batch_size, self._shard.world
        return f"a batch of {size} samples on each of {world} workers: {size * world} in all"

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, for example after a restart."""
        self._epoch_is_set = True
        if epoch != self._epoch:
            self._epoch, self._first = epoch, 0
        if self._at is not None and self._at[0] != epoch:
            self._at = None  # the loop has left the current pass

    def state_dict(self) -> dict[str, Any]:
        """Return the loop's position in the data, for a checkpoint; valid for all ranks."""
        epoch, batches = self._at or (self._epoch, self._first)
        return {"epoch": epoch, self.counted: batches * self._step_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Resume from a position in the next pass.

        Args:
            state: from `state_dict`, in a run with any number of ranks.

        Raises:
            ValueError: The state is invalid, or this run has no batch that starts at this position.
        """
        fields = state if isinstance(state, Mapping) else {}
        epoch, passed = fields.get("epoch"), fields.get(self.counted)
        if not (isinstance(epoch, int) and isinstance(passed, int)):
            raise ValueError(
                "load_state_dict() of a prepared loader needs the result of its state_dict(), with "
                f"'epoch' and {self.counted!r}; got {_describe(state)}"
            )
        first, rest = divmod(passed, self._step_size)
        if rest:
            where = f"load_state_dict(): {passed} {self.counted} into epoch {epoch}"
            restart = f"or restart the epoch, with set_epoch({epoch})"
            raise ValueError(f"{where} {self._position_error(passed)}, {restart}")
        self._epoch, self._first, self._at, self._epoch_is_set = epoch, first, None, True

    @property
    def _step_size(self) -> int:
        """Samples, or batches, of all ranks in a step."""
        return int(self.batch_size) * self._shard.world

    def _position_error(self, passed: int) -> str:
        """Return why no batch starts at a position."""
        return (
            f"is not the start of a batch of {self.batch_size} on each of {self._shard.world} "
            f"workers: use a batch size b such that {self._shard.world} * b divides {passed}"
        )

    def __iter__(self) -> Iterator[Any]:
        epoch, first = self._epoch, self._first
        self._epoch, self._first, self._epoch_is_set = epoch + 1, 0, False
        self._at = epoch, first
        self.use.passes += torch.is_grad_enabled()
        batches, this_pass = self._batches(epoch, first), object()
        try:
            for number in itertools.count(first + 1):
                start = time.perf_counter()
                rank_batch = next(batches, None)
                if rank_batch is None:
                    break
                batch = to_device(rank_batch.batch, self._device)
                self._at = epoch, number
                self._on_batch(this_pass, rank_batch, time.perf_counter() - start, epoch)
                yield batch
            self._at = None
        finally:
            self._on_batch(this_pass, None, 0.0, epoch)  # also if the loop has left the pass


class MapStyleLoader(ShardedLoader):
    """
    A loader of a map-style data set, split by torch's `DistributedSampler` or in a custom sampler's
    order.

    See `ShardedLoader` for the arguments.

    Raises:
        SpecError: The loader cannot be split; the message suggests a remedy.
    """

    def __init__(
        self, loader: DataLoader[Any], shard: DataShard, device: torch.device, on_batch: OnBatch
    ) -> None:
        super().__init__(loader, shard, device, on_batch)
        self.sampler: DistributedSampler[Any] = self._sampler_of(loader)
        self._size = self._length()
        self._order = SkippingSampler(self.sampler)
        self._sized = SizeRecordingBatches(self._batches_of(loader))
        if loader.batch_sampler is None:  # the data set is indexed with whole batches
            batching: dict[str, Any] = {"batch_size": None, "sampler": self._sized}
        else:
            batching = {"batch_sampler": self._sized}
        copied = {name: getattr(loader, name) for name in COPIED_ARGUMENTS}
        self._loader: DataLoader[Any] = DataLoader(
            loader.dataset, **batching, collate_fn=Collate(loader), **copied
        )
        self._epoch = int(self.sampler.epoch)
        self._remember_epochs()

    def _sampler_of(self, loader: DataLoader[Any]) -> DistributedSampler[Any]:
        """Return the sampler of this rank's samples."""
        return _sampler_of(loader, self._shard)

    def _batches_of(self, loader: DataLoader[Any]) -> Any:
        """Return this rank's batches of a pass, as sample indices."""
        sampler = batch_sampler_of(loader)
        return BatchSampler(self._order, sampler.batch_size, sampler.drop_last)

    @property
    def batch_sampler(self) -> Any:
        """This rank's batch sampler; a loop may call `set_epoch` of its `sampler`."""
        sampler = batch_sampler_of(self._given)
        return ReadOnlyBatchSampler(self.sampler, sampler.batch_size, sampler.drop_last)

    @override
    def batches_of_pass(self) -> int:
        self._follow_epoch()
        if self._epoch_is_set:
            self.sampler.set_epoch(LoaderEpoch(self._epoch))
        count = len(self._loader)
        self._remember_epochs()
        return count

    @override
    def state_dict(self) -> dict[str, Any]:
        """Also contains the number of ranks, if a custom sampler splits by rank itself."""
        state = super().state_dict()
        return state if self._repeats else {**state, "num_replicas": self._shard.world}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        fields = state if isinstance(state, Mapping) else {}
        saved_world, world = fields.get("num_replicas"), self._shard.world
        if not self._repeats and fields.get(self.counted) and saved_world != world:
            raise ValueError(
                f"load_state_dict(): a {type(self._user_sampler).__name__} splits by rank itself, "
                f"differently for {world} workers than for {saved_world or 'the previous number'}: "
                f"restart the epoch, with set_epoch({fields.get('epoch')})"
            )
        super().load_state_dict(state)
        self._remember_epochs()

    @override
    def __iter__(self) -> Iterator[Any]:
        self._follow_epoch()
        return super().__iter__()

    def _follow_epoch(self) -> None:
        """Use the epoch that the loop has set on the user's or the prepared sampler."""
        for sampler, previous in self._sampler_epochs:
            if (state := epoch_state(sampler)) != previous and state is not None:
                self.set_epoch(int(state[1]))
                self._remember_epochs()
                return

    def _remember_epochs(self) -> None:
        """Remember the samplers' epochs, which a sampler may change by itself."""
        self._sampler_epochs = [(s, epoch_state(s)) for s in (self.sampler, self._user_sampler)]

    @property
    def _user_sampler(self) -> Any:
        """The user's own sampler."""
        sampler = self.sampler
        return sampler.wrapped if isinstance(sampler, ShardedSampler | RankSampler) else sampler

    @override
    def _batches(self, epoch: int, first: int) -> Iterator[RankBatch]:
        if (size := self._length()) != self._size:
            text = f"has {size} samples now, and had {self._size} when it was prepared"
            raise loader_error(text, "prepare a loader of the current data, and set_epoch(epoch)")
        self.sampler.set_epoch(LoaderEpoch(epoch))
        self._order.first = first * self._batch_step
        sizes, total = self._sized.begin(), -1
        for number, batch in enumerate(self._loader, first):
            if total < 0:
                self._remember_epochs()
                total = self._unique_samples()
            size, fingerprint = sizes.popleft(), getattr(self.sampler, "fingerprint", 0)
            unique = self._unique(number, size, total) if self._repeats else size
            yield RankBatch(batch, size, unique, fingerprint)
        if total < 0:  # a pass without batches is a pass, too
            self._remember_epochs()

    @property
    def _batch_step(self) -> int:
        """Samples, or batches, of this rank in a step."""
        return self._step_size // self._shard.world

    def _unique(self, number: int, size: int, total: int) -> int:
        """
        Return how many samples of a batch are not repetitions.

        Args:
            number: of the batch in the pass, from 0.
            size: samples of the batch.
            total: samples of the pass that are not repetitions; of batches, their number.
        """
        return max(0, min(size, total - number * self._batch_step))

    @property
    def _repeats(self) -> bool:
        """Whether ranks get parts of one order, whose first samples may be repeated."""
        sampler = self.sampler
        is_distributed = type(sampler).__iter__ is DistributedSampler.__iter__
        return is_distributed or isinstance(sampler, ShardedSampler)

    def _length(self) -> int | None:
        """Return the number of samples; None: a custom sampler determines it."""
        is_custom = isinstance(self.sampler, ShardedSampler | RankSampler)
        return None if is_custom else len(self.dataset)

    def _unique_samples(self) -> int:
        """Return this rank's samples of an epoch, without repetitions, which come last."""
        sampler = self.sampler
        size = _size_of(sampler)
        return min(sampler.num_samples, -(-(size - sampler.rank) // sampler.num_replicas))


class Collate:
    """Builds a batch with the user's collate function, in a form that a loader process can send."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._collate = loader.collate_fn
        if loader.num_workers:
            assign_class_ids(type(loader.dataset), self._collate)

    def __call__(self, samples: Any) -> Any:
        """Build the batch of some samples."""
        return sendable(self._collate(samples))


class ReadOnlyBatchSampler(BatchSampler):
    """
    The batch sampler that a prepared loader exposes; the loader itself uses another object.

    Raises:
        AttributeError: An attribute is set.
    """

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            text = f"the {name} of a prepared DataLoader's batch_sampler cannot be set"
            raise AttributeError(f"{text}: prepare a DataLoader that has this {name}")
        super().__setattr__(name, value)


class SkippingSampler(Sampler[Any]):
    """A sampler's order without its first `first` samples."""

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self._sampler, self.first = sampler, 0

    def __len__(self) -> int:
        return len(self._sampler)

    @override
    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._sampler, self.first, None)


class SizeRecordingBatches(Sampler[Any]):
    """Batches whose sizes are recorded as they are drawn."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self._sizes: deque[int] = deque()

    def begin(self) -> deque[int]:
        """Return the queue to which the sizes of the next pass are appended."""
        self._sizes = deque()
        return self._sizes

    def __len__(self) -> int:
        return len(self._batches)

    @override
    def __iter__(self) -> Iterator[Any]:
        sizes = self._sizes
        for indices in self._batches:
            batch = indices if hasattr(indices, "__len__") else [*indices]
            sizes.append(len(batch))
            yield batch


def _sampler_of(loader: DataLoader[Any], shard: DataShard) -> DistributedSampler[Any]:
    batches = batch_sampler_of(loader)
    user: Any = batches.sampler
    if (rank_sampler := find_rank_sampler(user, shard.rank, shard.world)) is not None:
        return user if isinstance(user, DistributedSampler) else RankSampler(user, rank_sampler)
    is_sequential = type(user) is SequentialSampler
    is_random = type(user) is RandomSampler and not user.replacement
    if not (is_sequential or is_random) or len(user) != len(loader.dataset):  # type: ignore[arg-type]
        check_single_pass(user, length_of(loader.dataset), "samples")
        return ShardedSampler(
            user, shard.rank, shard.world, shard.seed, drop_last=batches.drop_last
        )
    return DistributedSampler(
        loader.dataset,
        shard.world,
        shard.rank,
        shuffle=not is_sequential,
        seed=shard.seed,
        drop_last=batches.drop_last,
    )


def _size_of(sampler: DistributedSampler[Any]) -> int:
    """Return the number of samples, or batches, that a sampler splits between all ranks."""
    return sampler.size if isinstance(sampler, ShardedSampler) else len(sampler.dataset)  # type: ignore[arg-type]


def check_not_empty(loader: MapStyleLoader) -> None:
    """
    Check that a loader with samples yields a batch.

    Raises:
        SpecError: `drop_last` drops all samples; the message suggests a remedy.
    """
    size, world = _size_of(loader.sampler), loader.sampler.num_replicas
    if size and not loader.batches_of_pass():
        text = f"gives no batch: of {size} {loader.counted} each of {world} workers has less than "
        text += f"a batch of {loader.batch_size}" if loader.batch_size is not None else "one"
        hint = "use a smaller batch_size or fewer workers, or do not set drop_last"
        raise loader_error(f"{text}, and drop_last is set", hint)


def _describe(state: Any) -> str:
    """Return the type of an invalid state, and its keys if it is a mapping."""
    if isinstance(state, Mapping):
        return "a mapping of " + (", ".join(sorted(map(str, state))) or "nothing")
    return f"a {type(state).__name__}"
