"""
A stream as a data set of numbered samples: read in order, with what others train on passed over.

    pass 0                  pass 1                        each begins at the stream's start
    | 0 1 2 3 ... 98 99 |   | 100 101 ... 198 199 | ...   number: over all passes
      0 1 2 3 ... 98 99       0   1   ... 98  99          place: in the pass

Every reader (a rank, or each of its loader processes) has the stream for itself and begins at its
start. So all come to the same samples in the same steps, and to the same end, and nobody needs to
be told (docs/decisions/streams.md).
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import pickle
import time
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import cloudpickle
from torch.utils.data import DataLoader, Dataset, IterableDataset

from distplat.platform.sampler import ENDLESS
from distplat.strategies.algorithms.seeds import (
    derive_seed,
    epoch_seed,
    evaluation_data_seed,
    order_seed,
)
from distplat.strategies.loop.sample_hash import fingerprint_of, hash_of
from distplat.strategies.loop.seeding import preserve_rng_state, seed_quickly, seed_sample
from distplat.strategies.torch_compat import without_worker_info

logger = logging.getLogger(__name__)

OVER = object()
"""What stands for a sample where a pass has ended."""
_FIRST = 16
"""Samples at the start whose hashes are compared: between ranks, and from pass to pass."""
_AFTER = 8
"""Samples after a mark whose hashes it has."""
_MARKS = 8
"""Marks that a reader keeps."""


class StreamPosition(NamedTuple):
    """A position from which a stream can be read on; plain values, kept in checkpoints."""

    number: int
    """Of the next sample."""
    turn: int
    """Its pass."""
    place: int
    """In the pass."""
    state: str = ""
    """What the stream's `state_dict` gave, as JSON; empty: samples are counted and passed over."""
    hashes: tuple[str, ...] = ()
    """Of the next samples."""

    def saved(self) -> dict[str, Any]:
        """Give it as a checkpoint has it."""
        return {**self._asdict(), "hashes": [*self.hashes]}

    @classmethod
    def read(cls, saved: Any) -> StreamPosition | None:
        """Take a mark as a checkpoint has it; None: it has none."""
        if not isinstance(saved, Mapping) or saved.keys() != set(cls._fields):
            return None
        numbers = all(isinstance(saved[name], int) for name in ("number", "turn", "place"))
        if not (numbers and isinstance(saved["state"], str)):
            return None
        hashes = saved["hashes"]
        return cls(**{**saved, "hashes": tuple(hashes)}) if isinstance(hashes, list) else None


class StreamItem(NamedTuple):
    """What was read of a stream: a batch, or its samples."""

    batch: Any
    mark: StreamPosition | None = None
    """The position before it, if that was wanted."""
    fingerprint: int = 0
    """Of the first sample of all ranks' batch; 0: this reader has not come by it."""


@dataclass(frozen=True)
class StreamSeeds:
    """What is drawn while a stream is read: a function of the pass, and of the place in it."""

    seed: int
    """Of the job."""
    evaluates: bool = False
    """Draw the same numbers in every pass, as evaluation samples do."""

    def of_samples(self, turn: int) -> int:
        """Give the seed of a pass from which its samples' own are mixed."""
        return evaluation_data_seed(self.seed) if self.evaluates else epoch_seed(self.seed, turn)

    def of_pass(self, turn: int) -> int:
        """Give the seed before `iter()`."""
        return derive_seed(self.of_samples(turn)) if self.evaluates else order_seed(self.seed, turn)


def is_stream(data: object) -> bool:
    """Say whether what a task gave as its data is read from its start, not by number."""
    if isinstance(data, type | str | bytes | Mapping | Set | DataLoader):
        return False
    if isinstance(data, IterableDataset) or is_ray_data(data):
        return True
    if isinstance(data, Iterator) or not isinstance(data, Iterable):
        return False
    return not (hasattr(data, "__getitem__") and hasattr(data, "__len__"))


def is_ray_data(data: object) -> bool:
    """Say whether it is a `ray.data.Dataset`; told by its name, for this package knows no Ray."""
    kind = type(data)
    return kind.__module__.startswith("ray.data.") and hasattr(kind, "iter_rows")


def length_of(data: Any) -> int | None:
    """Give the samples of a data set, or of a pass over a stream; None: it does not say."""
    try:
        return len(data)
    except (TypeError, AttributeError, NotImplementedError, ValueError):
        return None


class _RayRows:
    """The rows of a `ray.data.Dataset`, in an order that is the same each time."""

    def __init__(self, data: Any) -> None:
        data.context.execution_options.preserve_order = True
        data.context.enable_progress_bars = False  # each rank would draw its own
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data.iter_rows())


def rows_of(data: Any) -> Any:
    """Give what can be gone through of a stream: of a `ray.data.Dataset` its rows."""
    return _RayRows(data) if is_ray_data(data) else data


def _copied(source: Any) -> Any:
    """Copy a stream; what Hugging Face's hold of file systems changes while it is copied."""
    try:
        return copy.deepcopy(source)
    except RuntimeError:
        return pickle.loads(cloudpickle.dumps(source))  # noqa: S301  what was pickled here


class StreamSamples(Dataset[Any]):
    """
    The samples of a stream by number, which must be asked for in order to be had quickly.

    Asking for an earlier one begins at the start again, or at a mark.

    Args:
        source: gives its samples each time that it is gone through.
        seeds: of what is drawn meanwhile.
        where: names it in errors.
    """

    def __init__(self, source: Any, seeds: StreamSeeds, where: str) -> None:
        self._source = rows_of(source)
        self._kind, self._seeds, self._where = type(source).__name__, seeds, where
        self._size = length_of(self._source)
        self._stateful = all(hasattr(source, n) for n in ("state_dict", "load_state_dict"))
        self._marks: list[StreamPosition] = []
        self._reader: Any = None  #: the source, or a copy
        self._samples: Iterator[Any] | None = None
        self._ahead: list[Any] = []  #: samples that were read to look at them
        self._turn = self._origin = self._place = 0
        self._looks_at, self._seen = -1, 0  #: a sample's number, and its fingerprint
        self.hashes: list[str] = []  #: of the first samples
        self.fingerprint = 0  #: of the batch that was read last

    def __len__(self) -> int:
        return ENDLESS if self._size is None else self._size

    def __getitem__(self, number: int) -> Any:
        return self.read(number, 1).batch[0]

    def __getstate__(self) -> dict[str, Any]:
        """Go to a loader process, which begins to read by itself."""
        idle: dict[str, Any] = {"_reader": None, "_samples": None, "_ahead": [], "_looks_at": -1}
        return {**self.__dict__, **idle}

    def survey(self, *, counts: bool, limit_s: float) -> None:
        """
        Read the first samples, for their hashes; all of them, to count them.

        Args:
            counts: how many a pass has must be known.
            limit_s: how long it may take to count.

        Raises:
            ValueError: there are none, or too many to count.
        """
        count, until = 0, time.monotonic() + limit_s
        counts &= self._size is None
        with preserve_rng_state(), without_worker_info():
            self._begin(0, 0)
            for count in itertools.count():
                try:
                    sample = self._draw(count)
                except StopIteration:
                    break
                if count < _FIRST:
                    self.hashes.append(hash_of(sample))
                elif not counts:
                    break
                elif time.monotonic() > until:
                    raise self._error(
                        f"gave {count} samples in {limit_s:g} s and goes on: `epochs` needs their "
                        "number. Give `steps` instead, or the data a __len__, or raise "
                        "`failure.start_timeout_s`"
                    )
        self._samples = None
        if not self.hashes:
            raise self._error("gave no samples")
        if counts:
            self._size = count

    def read(
        self, first: int, count: int, *, mark: bool = False, look_at: int | None = None
    ) -> StreamItem:
        """
        Give samples that follow each other. The global generators draw other numbers afterwards.

        Args:
            first: number of the first one.
            count: how many.
            mark: whether to give the position before them, too.
            look_at: a sample at or before `first` whose fingerprint is wanted.

        Raises:
            ValueError: the stream ended elsewhere than before, or gave others than before.
        """
        if look_at is not None and look_at != self._looks_at:
            self._looks_at, self._seen = look_at, 0
        with without_worker_info():
            self._seek(first)
            here = self._mark() if mark else None
            samples, following = [], []
            for _ in range(count):
                samples.append(self._next())
                if here is not None and here.turn == self._turn:
                    following.append(samples[-1])
            if here is not None:
                here = self._hashed(here, following)
        return StreamItem(samples, here, 0 if look_at is None else self._seen)

    def begin_pass(self, turn: int, mark: StreamPosition | None = None) -> StreamPosition:
        """
        Begin one pass, or go on in it at a mark, to be read by `next_of_pass`: numbers are places.

        Returns:
            The position.

        Raises:
            ValueError: other samples follow than when the mark was made.
        """
        with without_worker_info():
            if mark is None:
                self._begin(turn, 0)
                return self.here()
            self._resume_at(mark)
            return mark

    def next_of_pass(self) -> Any:
        """
        Give the next sample of the pass that was begun; `OVER`: there is none.

        Raises:
            ValueError: it has none at all.
        """
        with without_worker_info():
            try:
                sample = self._ahead.pop(0) if self._ahead else self._draw(self._place)
            except StopIteration:
                if not self._place:
                    raise self._empty(self._turn) from None
                return OVER
        self._place += 1
        return sample

    def here(self, *, stateful: bool = True) -> StreamPosition:
        """Give the position, without hashes of what follows, and if it is wanted with the state."""
        if stateful:
            return self._mark()
        return StreamPosition(self._origin + self._place, self._turn, self._place)

    def note(self, read: StreamItem) -> None:
        """Take what came with a batch, perhaps out of a loader process."""
        self.fingerprint = read.fingerprint
        if read.mark is not None:
            self.keep(read.mark)

    def keep(self, mark: StreamPosition) -> None:
        """Note a position from which it can be read on."""
        self._marks = [*self._marks, mark][-_MARKS:]

    def mark_before(self, number: int) -> StreamPosition | None:
        """Give the last position known that is not beyond a sample."""
        earlier = [mark for mark in self._marks if mark.number <= number]
        return max(earlier, key=lambda mark: mark.number, default=None)

    def _seek(self, number: int) -> None:
        turn = None if self._size is None else number // self._size
        here = self._origin + self._place
        if self._samples is None or here > number or turn not in (None, self._turn):
            self._start(number, turn)
        while self._origin + self._place < number:
            self._next()

    def _start(self, number: int, turn: int | None) -> None:
        """Begin a pass, or go on at a mark, before a sample."""
        mark = self.mark_before(number)
        if mark is not None and mark.place and turn in (None, mark.turn):
            self._resume_at(mark)
        elif turn is None:
            self._begin(0, 0)
        else:
            self._begin(turn, turn * len(self))

    def _begin(self, turn: int, origin: int, state: str = "") -> None:
        """Begin a pass at its start, or where a state leads to."""
        self._reader = self._copy()
        self._turn, self._origin, self._place, self._ahead = turn, origin, 0, []
        seed_quickly(self._seeds.of_pass(turn))
        set_epoch = getattr(self._reader, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(turn)
        if state:
            self._reader.load_state_dict(json.loads(state))
        self._samples = iter(self._reader)
        if self._samples is self._reader:
            raise self._error(
                f"{self._kind} is its own iterator, so it can be read only once: __iter__ must "
                "begin anew each time, as a generator function does"
            )

    def _copy(self) -> Any:
        """Give what to read: of a stream with a state a copy, for it goes on where it stood."""
        if self._stateful:
            try:
                return _copied(self._source)
            except Exception as error:
                self._stateful = False
                logger.warning(
                    "%s: %s cannot be copied (%s), so its state_dict() is not used: samples are "
                    "counted and passed over",
                    *(self._where, self._kind, error),
                )
        return self._source

    def _resume_at(self, mark: StreamPosition) -> None:
        """
        Read on at a mark.

        Raises:
            ValueError: other samples follow than when it was made.
        """
        if mark.state and self._stateful:
            self._begin(mark.turn, mark.number - mark.place, mark.state)
            if self._stateful and self._follows(mark):
                return
            logger.warning(
                "%s: load_state_dict() of %s does not lead back to sample %d of pass %d, so "
                "samples are counted and passed over",
                *(self._where, self._kind, mark.place, mark.turn),
            )
        self._begin(mark.turn, mark.number - mark.place)
        try:
            for place in range(mark.place):
                self._draw(place)
        except StopIteration:
            pass  # what follows is looked at
        if not self._follows(mark):
            raise self._error(
                f"gives other samples than before from number {mark.place} of pass {mark.turn} on: "
                "a run that goes on must read what it would have read"
            )

    def _follows(self, mark: StreamPosition) -> bool:
        """Say whether the mark's samples come next."""
        self._place, samples = mark.place, []
        for place in range(mark.place, mark.place + len(mark.hashes)):
            try:
                samples.append(self._draw(place))
            except StopIteration:
                return False
        self._ahead = samples
        return tuple(map(hash_of, samples)) == mark.hashes

    def _mark(self) -> StreamPosition:
        state = ""
        if self._stateful and self._place and not self._ahead:
            state_dict = self._reader.state_dict()
            try:
                state = json.dumps(state_dict)
                if json.loads(state) != state_dict:
                    raise TypeError("it changes on its way through JSON")
            except (TypeError, ValueError) as error:
                self._stateful = False
                logger.warning(
                    "%s: state_dict() of %s is nothing that a checkpoint can keep (%s), so it is "
                    "not used: samples are counted and passed over",
                    *(self._where, self._kind, error),
                )
                state = ""
        return StreamPosition(self._origin + self._place, self._turn, self._place, state)

    def _hashed(self, mark: StreamPosition, following: list[Any]) -> StreamPosition:
        """Give a mark with what its pass has next; a state that nothing follows cannot be tried."""
        while mark.turn == self._turn and len(following) < _AFTER and self._samples is not None:
            place = self._place + len(self._ahead)
            if place == self._size:
                break
            try:
                self._ahead.append(self._draw(place))
            except StopIteration:
                break
            following.append(self._ahead[-1])
        hashes = tuple(hash_of(one) for one in following[:_AFTER])
        return mark._replace(hashes=hashes, state=mark.state if hashes else "")

    def _next(self) -> Any:
        """Give the next sample, of the next pass where this one has ended."""
        try:
            sample = self._ahead.pop(0) if self._ahead else self._draw(self._place)
        except StopIteration:
            self._begin_next_pass()
            return self._next()
        if self._origin + self._place == self._looks_at:
            self._seen = fingerprint_of(sample)
        self._place += 1
        if self._place == self._size:
            self._check_end()
        return sample

    def _draw(self, place: int) -> Any:
        """Read a sample with generators of its own seed; those passed over draw theirs, too."""
        assert self._samples is not None, "a pass was begun"
        seed_sample(self._seeds.of_samples(self._turn), place)
        sample = next(self._samples)
        if self._turn == 0 and place < len(self.hashes) and hash_of(sample) != self.hashes[place]:
            raise self._error(
                f"gave another sample {place} when it was read anew. Every worker reads it, and so "
                "does a run that goes on: __iter__ must begin at the same sample each time. What "
                "it draws must come from random, numpy or torch, whose global generators are "
                "seeded before each pass and each sample, or from one that __iter__ makes itself: "
                "give a library's shuffle a seed that __iter__ draws"
            )
        return sample

    def _begin_next_pass(self) -> None:
        """Begin the next pass, if the stream may end here."""
        if self._size is not None:
            raise self._error(
                f"ended after {self._place} samples in pass {self._turn}, and {self._size} were "
                "expected: by its len(), or as many as it had before. Every epoch must have as "
                "many; without __len__ and with `steps` it is read over and over, whatever it has"
            )
        if not self._place:
            raise self._empty(self._turn)
        self._begin(self._turn + 1, self._origin + self._place)

    def _check_end(self) -> None:
        """See that there is no sample after the last one: nobody would train on it."""
        try:
            self._draw(self._place)
        except StopIteration:
            self._samples = None
            return
        raise self._error(
            f"gives more than the {self._size} samples of its len(), or that it had before: "
            "without __len__ and with `steps` it is read over and over, whatever it has"
        )

    def _empty(self, turn: int) -> ValueError:
        return self._error(
            f"gave no samples when it was begun anew for pass {turn}: __iter__ must begin anew "
            "each time, as a generator function does"
        )

    def _error(self, text: str) -> ValueError:
        return ValueError(f"{self._where} {text}")
