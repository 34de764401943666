"""What `prepare` makes of a DataLoader: this rank's part of the data, and a place to go on from."""

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

from distplat.strategies.function.dealt_sampler import (
    DealtSampler,
    OwnEpoch,
    RankSampler,
    check_ends,
    dealer_in,
    shown_epoch,
)
from distplat.strategies.function.loader_kinds import (
    batches_in,
    batches_of,
    is_batched_otherwise,
    refused,
)
from distplat.strategies.loop.collate import sendable, to_device
from distplat.strategies.loop.loaders import known_alike
from distplat.strategies.loop.streams import length_of

KEPT = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
)
"""What a prepared loader has of the user's, whatever its data."""
_SHOWN = (*KEPT, "collate_fn", "drop_last")
"""What it tells of the user's, as it would itself."""
_FIXED = ("dataset", "batch_size", "sampler", "drop_last", "persistent_workers")
"""What torch's DataLoader refuses to have set as well."""


class DataShard(NamedTuple):
    """Which part of the data is this rank's."""

    rank: int
    world: int
    """Ranks."""
    seed: int
    """Of the order, and of what a stream draws."""


class RankBatch(NamedTuple):
    """A batch of this rank, and what the session is told of it."""

    batch: Any
    samples: int
    own: int
    """How many of the samples are no repetition."""
    fingerprint: int = 0
    """Of all ranks' batch of a stream, or of a sampler's order; see `StepControl.batch`."""


Read = Callable[[object, RankBatch | None, float, int], None]
"""Told of each batch of a pass, the seconds waited for it, and the epoch; None: it is over."""


@dataclass
class LoaderUse:
    """What a loop has done with a prepared loader."""

    passes: int = 0
    """Begun with gradients: an evaluation trains on none."""
    asked: bool = False
    """It knows the length: it has called `len`."""


class ShardedLoader(ABC):
    """
    Gives a rank's batches, on its device.

    Each pass over it is another epoch, unless `set_epoch` says which.

    Args:
        loader: the user's.
        cut: this rank's part.
        device: where batches go.
        read: told of each batch.
    """

    counted = "samples"
    """What a position counts."""

    def __init__(
        self, loader: DataLoader[Any], cut: DataShard, device: torch.device, read: Read
    ) -> None:
        self.dataset: Any = loader.dataset
        """The user's, whole."""
        whole = not is_batched_otherwise(loader)
        self.batch_size: Any = getattr(batches_in(loader), "batch_size", None) if whole else None
        """Samples of this rank's batch; None: batches are of several sizes."""
        self.use = LoaderUse()
        """By the loop."""
        self._given = loader
        self._cut, self._device, self._read = cut, device, read
        self._epoch = self._first = 0  #: the next pass, and its batches that are passed over
        self._said = False  #: whether the loop has said which pass is the next one
        self._at: tuple[int, int] | None = None  #: epoch and batches of a pass under way

    def __getattr__(self, name: str) -> Any:
        """Give what the user's loader says of itself, such as `num_workers`."""
        if name in _SHOWN:
            return getattr(self._given, name)
        raise AttributeError(f"a prepared DataLoader has no {name!r}", name=name, obj=self)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what would change no batch, but the position in the data, for one."""
        if name in _FIXED and (name in vars(self) or name in _SHOWN):
            text = f"the {name} of a prepared DataLoader cannot be set"
            raise ValueError(f"{text}: prepare a DataLoader that has this {name}")
        super().__setattr__(name, value)

    def __len__(self) -> int:
        """
        Give the batches of a pass.

        Raises:
            TypeError: it is a stream without a length.
        """
        self.use.asked = True
        return self.batches_of_pass()

    @abstractmethod
    def batches_of_pass(self) -> int:
        """Give what `len` gives."""

    @abstractmethod
    def _batches(self, epoch: int, first: int) -> Iterator[RankBatch]:
        """Give this rank's batches of a pass, from one on."""

    def described(self) -> str:
        """Say what a step has, for the log."""
        size, world = self.batch_size, self._cut.world
        return f"a batch of {size} samples on each of {world} workers: {size * world} in all"

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is: after a restart, for example."""
        self._said = True
        if epoch != self._epoch:
            self._epoch, self._first = epoch, 0
        if self._at is not None and self._at[0] != epoch:
            self._at = None  # of a pass that the loop has left

    def state_dict(self) -> dict[str, Any]:
        """Give the place of the loop in the data, for a checkpoint; good for all ranks."""
        epoch, batches = self._at or (self._epoch, self._first)
        return {"epoch": epoch, self.counted: batches * self._of_a_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Have the next pass go on where a state was taken.

        Args:
            state: as `state_dict` gave it, in a run with any number of ranks.

        Raises:
            ValueError: it is no such state, or a batch of this run would not begin there.
        """
        given = state if isinstance(state, Mapping) else {}
        epoch, passed = given.get("epoch"), given.get(self.counted)
        if not (isinstance(epoch, int) and isinstance(passed, int)):
            raise ValueError(
                "load_state_dict() of a prepared loader takes what its state_dict() gave, with "
                f"'epoch' and {self.counted!r}; got {_named(state)}"
            )
        first, rest = divmod(passed, self._of_a_step)
        if rest:
            where = f"load_state_dict(): {passed} {self.counted} into epoch {epoch}"
            anew = f"or begin the epoch anew, with set_epoch({epoch})"
            raise ValueError(f"{where} {self._parts(passed)}, {anew}")
        self._epoch, self._first, self._at, self._said = epoch, first, None, True

    @property
    def _of_a_step(self) -> int:
        """What all ranks' batches that come together have of what is counted."""
        return int(self.batch_size) * self._cut.world

    def _parts(self, passed: int) -> str:
        """Say which parts of an epoch have no border at a position."""
        return (
            f"no batch begins, of {self.batch_size} on each of {self._cut.world} workers: take a "
            f"batch size of which that many are a part of {passed}"
        )

    def __iter__(self) -> Iterator[Any]:
        epoch, first = self._epoch, self._first
        self._epoch, self._first, self._said = epoch + 1, 0, False
        self._at = epoch, first
        self.use.passes += torch.is_grad_enabled()
        batches, this_pass = self._batches(epoch, first), object()
        try:
            for number in itertools.count(first + 1):
                began = time.perf_counter()
                rank_batch = next(batches, None)
                if rank_batch is None:
                    break
                batch = to_device(rank_batch.batch, self._device)
                self._at = epoch, number
                self._read(this_pass, rank_batch, time.perf_counter() - began, epoch)
                yield batch
            self._at = None
        finally:
            self._read(this_pass, None, 0.0, epoch)  # the loop may have left it


class NumberedLoader(ShardedLoader):
    """
    Of a map-style data set, by torch's `DistributedSampler`, or in the order of another sampler.

    Args:
        loader: the user's.
        cut: see `ShardedLoader`.
        device: see there.
        read: see there.

    Raises:
        SpecError: a loader that cannot be cut into parts; says what to do.
    """

    def __init__(
        self, loader: DataLoader[Any], cut: DataShard, device: torch.device, read: Read
    ) -> None:
        super().__init__(loader, cut, device, read)
        self.sampler: DistributedSampler[Any] = self._sampler_of(loader)
        self._size = self._length()
        self._order = RestOfOrder(self.sampler)
        self._sized = SizedBatches(self._batches_of(loader))
        whole = loader.batch_sampler is None  # the data set is asked for whole batches
        how = {"batch_size": None, "sampler": self._sized}
        kept = {name: getattr(loader, name) for name in KEPT}
        self._loader: DataLoader[Any] = DataLoader(
            loader.dataset,
            **(how if whole else {"batch_sampler": self._sized}),
            collate_fn=Collate(loader),
            **kept,
        )
        self._epoch = int(self.sampler.epoch)
        self._note()

    def _sampler_of(self, loader: DataLoader[Any]) -> DistributedSampler[Any]:
        """Give what deals out the samples."""
        return _sampler_of(loader, self._cut)

    def _batches_of(self, loader: DataLoader[Any]) -> Any:
        """Give this rank's batches of a pass, as numbers of samples."""
        batches = batches_of(loader)
        return BatchSampler(self._order, batches.batch_size, batches.drop_last)

    @property
    def batch_sampler(self) -> Any:
        """Of this rank; a loop may tell its `sampler` the epoch."""
        given = batches_of(self._given)
        return RankBatches(self.sampler, given.batch_size, given.drop_last)

    @override
    def batches_of_pass(self) -> int:
        self._hear()
        if self._said:
            self.sampler.set_epoch(OwnEpoch(self._epoch))
        count = len(self._loader)
        self._note()
        return count

    @override
    def state_dict(self) -> dict[str, Any]:
        """With the number of ranks, of a sampler that deals out by rules of its own."""
        state = super().state_dict()
        return state if self._repeats else {**state, "num_replicas": self._cut.world}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        given = state if isinstance(state, Mapping) else {}
        before, world = given.get("num_replicas"), self._cut.world
        if not self._repeats and given.get(self.counted) and before != world:
            raise ValueError(
                f"load_state_dict(): a {type(self._given_sampler).__name__} deals out by rank "
                f"itself, and other parts to {world} workers than to {before or 'those before'}: "
                f"begin the epoch anew, with set_epoch({given.get('epoch')})"
            )
        super().load_state_dict(state)
        self._note()

    @override
    def __iter__(self) -> Iterator[Any]:
        self._hear()
        return super().__iter__()

    def _hear(self) -> None:
        """Obey the epoch that the loop has told a sampler since, its own or the prepared one."""
        for one, before in self._noted:
            if (shown := shown_epoch(one)) != before and shown is not None:
                self.set_epoch(int(shown[1]))
                self._note()
                return

    def _note(self) -> None:
        """Note what samplers show that the loop has not told them; one may count its passes."""
        self._noted = [(one, shown_epoch(one)) for one in (self.sampler, self._given_sampler)]

    @property
    def _given_sampler(self) -> Any:
        """The user's own."""
        one = self.sampler
        return one.given if isinstance(one, DealtSampler | RankSampler) else one

    @override
    def _batches(self, epoch: int, first: int) -> Iterator[RankBatch]:
        if (size := self._length()) != self._size:
            text = f"has {size} samples now, and had {self._size} when it was prepared"
            raise refused(text, "prepare a loader of the data as it is now, and set_epoch(epoch)")
        self.sampler.set_epoch(OwnEpoch(epoch))
        self._order.first = first * self._of_batch
        sizes, whole = self._sized.begin(), -1
        for number, batch in enumerate(self._loader, first):
            if whole < 0:
                self._note()
                whole = self._own_samples()
            size, alike = sizes.popleft(), getattr(self.sampler, "fingerprint", 0)
            own = self._own(number, size, whole) if self._repeats else size
            yield RankBatch(batch, size, own, alike)
        if whole < 0:  # a pass without a batch counts as well
            self._note()

    @property
    def _of_batch(self) -> int:
        """What a batch of this rank has of what is counted."""
        return self._of_a_step // self._cut.world

    def _own(self, number: int, size: int, whole: int) -> int:
        """Count the samples of a batch that are no repetition, of so many in the whole pass."""
        return max(0, min(size, whole - number * self._of_batch))

    @property
    def _repeats(self) -> bool:
        """Whether ranks get parts of one order, whose first samples may come once more."""
        sampler = self.sampler
        as_torch = type(sampler).__iter__ is DistributedSampler.__iter__
        return as_torch or isinstance(sampler, DealtSampler)

    def _length(self) -> int | None:
        """Count the samples; None: another sampler says itself what there is."""
        own = isinstance(self.sampler, DealtSampler | RankSampler)
        return None if own else len(self.dataset)

    def _own_samples(self) -> int:
        """Count this rank's samples of an epoch; those behind them are others' once more."""
        sampler = self.sampler
        size = _size_of(sampler)
        return min(sampler.num_samples, -(-(size - sampler.rank) // sampler.num_replicas))


class Collate:
    """Makes a batch by the user's function, in a form that a loader process can send."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._collate = loader.collate_fn
        if loader.num_workers:
            known_alike(type(loader.dataset), self._collate)

    def __call__(self, samples: Any) -> Any:
        """Make the batch of some samples."""
        return sendable(self._collate(samples))


class RankBatches(BatchSampler):
    """
    What a prepared loader shows of its batches; what it reads is made of another object.

    Raises:
        AttributeError: it is to be changed.
    """

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            text = f"the {name} of a prepared DataLoader's batch_sampler cannot be set"
            raise AttributeError(f"{text}: prepare a DataLoader that has this {name}")
        super().__setattr__(name, value)


class RestOfOrder(Sampler[Any]):
    """A sampler's order without the first samples."""

    def __init__(self, sampler: DistributedSampler[Any]) -> None:
        self._sampler, self.first = sampler, 0

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self._sampler, self.first, None)


class SizedBatches(Sampler[Any]):
    """Batches, of which it is noted how many samples each one has."""

    def __init__(self, batches: Any) -> None:
        self._batches = batches
        self._sizes: deque[int] = deque()

    def begin(self) -> deque[int]:
        """Give what the sizes of the next pass come into, as batches are drawn."""
        self._sizes = deque()
        return self._sizes

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        sizes = self._sizes
        for one in self._batches:
            batch = one if hasattr(one, "__len__") else [*one]
            sizes.append(len(batch))
            yield batch


def _sampler_of(loader: DataLoader[Any], cut: DataShard) -> DistributedSampler[Any]:
    batches = batches_of(loader)
    given: Any = batches.sampler
    if (dealer := dealer_in(given, cut.rank, cut.world)) is not None:
        return given if isinstance(given, DistributedSampler) else RankSampler(given, dealer)
    plain = type(given) is SequentialSampler
    shuffled = type(given) is RandomSampler and not given.replacement
    if not (plain or shuffled) or len(given) != len(loader.dataset):  # type: ignore[arg-type]
        check_ends(given, length_of(loader.dataset), "samples")
        return DealtSampler(given, cut.rank, cut.world, cut.seed, drop_last=batches.drop_last)
    return DistributedSampler(
        loader.dataset,
        cut.world,
        cut.rank,
        shuffle=not plain,
        seed=cut.seed,
        drop_last=batches.drop_last,
    )


def _size_of(sampler: DistributedSampler[Any]) -> int:
    """Count what a sampler deals out to all ranks."""
    return sampler.size if isinstance(sampler, DealtSampler) else len(sampler.dataset)  # type: ignore[arg-type]


def check_whole(loader: NumberedLoader) -> None:
    """
    See that a loader of some samples gives a batch at all.

    Raises:
        SpecError: it leaves all of them out; says what to do.
    """
    size, world = _size_of(loader.sampler), loader.sampler.num_replicas
    if size and not loader.batches_of_pass():
        text = f"gives no batch: of {size} {loader.counted} each of {world} workers has less than "
        text += f"a batch of {loader.batch_size}" if loader.batch_size is not None else "one"
        hint = "take a smaller batch_size or fewer workers, or leave drop_last out"
        raise refused(f"{text}, and drop_last is set", hint)


def _named(state: Any) -> str:
    """Name what is no state."""
    if isinstance(state, Mapping):
        return "a mapping of " + (", ".join(sorted(map(str, state))) or "nothing")
    return f"a {type(state).__name__}"
