"""
A stream as a map-style data set: read in order, with samples of other ranks skipped.

    pass 0                  pass 1                        each starts at the stream's start
    | 0 1 2 3 ... 98 99 |   | 100 101 ... 198 199 | ...   number: over all passes
      0 1 2 3 ... 98 99       0   1   ... 98  99          place: in the pass

Every reader (a rank, or each of its loader processes) reads a copy of the whole stream from its
start. So all readers see the same samples in the same steps and the same end, without communication
(docs/decisions/streams.md).
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
from typing_extensions import override

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
"""Returned instead of a sample at the end of a pass."""
_FIRST = 16
"""Number of first samples whose hashes are compared, between ranks and between passes."""
_AFTER = 8
"""Number of samples after a mark whose hashes the mark has."""
_MARKS = 8
"""Number of marks that a reader keeps."""


class StreamPosition(NamedTuple):
    """A position at which reading of a stream can resume; plain values, saved in checkpoints."""

    number: int
    """Number of the next sample."""
    turn: int
    """Pass of the next sample."""
    place: int
    """Index of the next sample in its pass."""
    state: str = ""
    """The stream's `state_dict` as JSON; empty: resuming skips the samples before."""
    hashes: tuple[str, ...] = ()
    """Hashes of the next samples."""

    def saved(self) -> dict[str, Any]:
        """Convert the position to a dictionary for a checkpoint."""
        return {**self._asdict(), "hashes": [*self.hashes]}

    @classmethod
    def read(cls, saved: Any) -> StreamPosition | None:
        """Load a position from a checkpoint; None: the checkpoint has none."""
        if not isinstance(saved, Mapping) or saved.keys() != set(cls._fields):
            return None
        numbers = all(isinstance(saved[name], int) for name in ("number", "turn", "place"))
        if not (numbers and isinstance(saved["state"], str)):
            return None
        hashes = saved["hashes"]
        return cls(**{**saved, "hashes": tuple(hashes)}) if isinstance(hashes, list) else None


class StreamItem(NamedTuple):
    """A batch of a stream, or its samples."""

    batch: Any
    mark: StreamPosition | None = None
    """The position before the batch, if requested."""
    fingerprint: int = 0
    """Fingerprint of the first sample of the global batch; 0: this reader did not read it."""


@dataclass(frozen=True)
class StreamSeeds:
    """Seeds while a stream is read: functions of the pass, and of the place in it."""

    seed: int
    """Seed of the job."""
    evaluates: bool = False
    """Whether every pass has the same seeds, as evaluations need."""

    def of_samples(self, turn: int) -> int:
        """Return the seed of a pass from which its samples' seeds are derived."""
        return evaluation_data_seed(self.seed) if self.evaluates else epoch_seed(self.seed, turn)

    def of_pass(self, turn: int) -> int:
        """Return the seed set before `iter()`."""
        return derive_seed(self.of_samples(turn)) if self.evaluates else order_seed(self.seed, turn)


def is_stream(data: object) -> bool:
    """Return whether a task's data is iterable-style: read from its start, without indices."""
    if isinstance(data, type | str | bytes | Mapping | Set | DataLoader):
        return False
    if isinstance(data, IterableDataset) or is_ray_data(data):
        return True
    if isinstance(data, Iterator) or not isinstance(data, Iterable):
        return False
    return not (hasattr(data, "__getitem__") and hasattr(data, "__len__"))


def is_ray_data(data: object) -> bool:
    """Return whether data is a `ray.data.Dataset`, by its class name: Ray is not imported."""
    cls = type(data)
    return cls.__module__.startswith("ray.data.") and hasattr(cls, "iter_rows")


def length_of(data: Any) -> int | None:
    """Return the number of samples of a data set or of a stream's pass; None: it has no length."""
    try:
        return len(data)
    except (TypeError, AttributeError, NotImplementedError, ValueError):
        return None


class _RayRows:
    """The rows of a `ray.data.Dataset`, in the same order in each iteration."""

    def __init__(self, data: Any) -> None:
        data.context.execution_options.preserve_order = True
        data.context.enable_progress_bars = False  # one per rank would be shown
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data.iter_rows())


def rows_of(data: Any) -> Any:
    """Return an iterable of a stream's samples: for a `ray.data.Dataset`, of its rows."""
    return _RayRows(data) if is_ray_data(data) else data


def _copied(source: Any) -> Any:
    """Copy a stream; deepcopy may fail for Hugging Face streams, whose file systems change."""
    try:
        return copy.deepcopy(source)
    except RuntimeError:
        return pickle.loads(cloudpickle.dumps(source))  # noqa: S301  pickled in this line


class StreamSamples(Dataset[Any]):
    """
    The samples of a stream by number; fast only for accesses in increasing order.

    Access to an earlier sample restarts the stream at its start, or at a mark.

    Args:
        source: an iterable that yields the same samples in each iteration.
        seeds: seeds of the random numbers drawn while the stream is read.
        where: name of the stream in errors.
    """

    def __init__(self, source: Any, seeds: StreamSeeds, where: str) -> None:
        self._source = rows_of(source)
        self._kind, self._seeds, self._where = type(source).__name__, seeds, where
        self._size = length_of(self._source)
        self._stateful = all(hasattr(source, n) for n in ("state_dict", "load_state_dict"))
        self._marks: list[StreamPosition] = []
        self._reader: Any = None  #: the source, or a copy
        self._samples: Iterator[Any] | None = None
        self._ahead: list[Any] = []  #: samples read ahead for their hashes
        self._turn = self._origin = self._place = 0
        self._looks_at, self._seen = -1, 0  #: a sample's number, and its fingerprint
        self.hashes: list[str] = []  #: hashes of the first samples
        self.fingerprint = 0  #: fingerprint of the last batch

    def __len__(self) -> int:
        return ENDLESS if self._size is None else self._size

    @override
    def __getitem__(self, number: int) -> Any:
        return self.read(number, 1).batch[0]

    @override
    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a loader process, which reads the stream from its start."""
        idle: dict[str, Any] = {"_reader": None, "_samples": None, "_ahead": [], "_looks_at": -1}
        return {**self.__dict__, **idle}

    def survey(self, *, counts: bool, limit_s: float) -> None:
        """
        Read the first samples to hash them, or all samples to count them.

        Args:
            counts: whether the number of samples in a pass is needed.
            limit_s: time limit of counting.

        Raises:
            ValueError: the stream is empty, or has too many samples to count.
        """
        count, deadline = 0, time.monotonic() + limit_s
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
                elif time.monotonic() > deadline:
                    raise self._error(
                        f"gave {count} samples in {limit_s:g} s and has not ended: `epochs` needs "
                        "their number. Set `steps` instead, or give the data a __len__, or raise "
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
        Read consecutive samples. Changes the state of the global generators.

        Args:
            first: number of the first sample.
            count: number of samples.
            mark: whether to return the position before the samples, too.
            look_at: number of a sample at or before `first` to fingerprint.

        Raises:
            ValueError: the stream has another length or other samples than before.
        """
        if look_at is not None and look_at != self._looks_at:
            self._looks_at, self._seen = look_at, 0
        with without_worker_info():
            self._seek(first)
            position = self._mark() if mark else None
            samples, following = [], []
            for _ in range(count):
                samples.append(self._next())
                if position is not None and position.turn == self._turn:
                    following.append(samples[-1])
            if position is not None:
                position = self._with_hashes(position, following)
        return StreamItem(samples, position, 0 if look_at is None else self._seen)

    def begin_pass(self, turn: int, mark: StreamPosition | None = None) -> StreamPosition:
        """
        Start a pass, or resume it at a mark, for `next_of_pass`; numbers start at the pass's start.

        Returns:
            The position.

        Raises:
            ValueError: the samples after the mark have changed.
        """
        with without_worker_info():
            if mark is None:
                self._begin(turn, 0)
                return self.here()
            self._resume_at(mark)
            return mark

    def next_of_pass(self) -> Any:
        """
        Return the next sample of the current pass; `OVER`: the pass has ended.

        Raises:
            ValueError: the pass has no samples.
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
        """Return the position without hashes; if `stateful`, with the stream's `state_dict`."""
        if stateful:
            return self._mark()
        return StreamPosition(self._origin + self._place, self._turn, self._place)

    def note(self, item: StreamItem) -> None:
        """Record the fingerprint and mark of a batch, which a loader process may have read."""
        self.fingerprint = item.fingerprint
        if item.mark is not None:
            self.keep(item.mark)

    def keep(self, mark: StreamPosition) -> None:
        """Store a position at which reading can resume."""
        self._marks = [*self._marks, mark][-_MARKS:]

    def mark_before(self, number: int) -> StreamPosition | None:
        """Return the last stored mark at or before a sample."""
        earlier = [mark for mark in self._marks if mark.number <= number]
        return max(earlier, key=lambda mark: mark.number, default=None)

    def _seek(self, number: int) -> None:
        turn = None if self._size is None else number // self._size
        current = self._origin + self._place
        if self._samples is None or current > number or turn not in (None, self._turn):
            self._start(number, turn)
        while self._origin + self._place < number:
            self._next()

    def _start(self, number: int, turn: int | None) -> None:
        """Start a pass, or resume at a mark, at or before a sample."""
        mark = self.mark_before(number)
        if mark is not None and mark.place and turn in (None, mark.turn):
            self._resume_at(mark)
        elif turn is None:
            self._begin(0, 0)
        else:
            self._begin(turn, turn * len(self))

    def _begin(self, turn: int, origin: int, state: str = "") -> None:
        """Start a pass at its start, or at a saved state."""
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
                "return a new iterator each time, as a generator function does"
            )

    def _copy(self) -> Any:
        """Return the stream; a copy if it is stateful, as it would resume where it stopped."""
        if self._stateful:
            try:
                return _copied(self._source)
            except Exception as error:
                self._stateful = False
                logger.warning(
                    "%s: %s cannot be copied (%s), so its state_dict() is not used: resuming "
                    "reads and skips the samples before",
                    *(self._where, self._kind, error),
                )
        return self._source

    def _resume_at(self, mark: StreamPosition) -> None:
        """
        Resume at a mark.

        Raises:
            ValueError: the samples after the mark have changed.
        """
        if mark.state and self._stateful:
            self._begin(mark.turn, mark.number - mark.place, mark.state)
            if self._stateful and self._follows(mark):
                return
            logger.warning(
                "%s: load_state_dict() of %s does not restore sample %d of pass %d, so resuming "
                "reads and skips the samples before",
                *(self._where, self._kind, mark.place, mark.turn),
            )
        self._begin(mark.turn, mark.number - mark.place)
        try:
            for place in range(mark.place):
                self._draw(place)
        except StopIteration:
            pass  # `_follows` detects the missing samples
        if not self._follows(mark):
            raise self._error(
                f"gives other samples than before from number {mark.place} of pass {mark.turn} on: "
                "a resumed run must read the same samples as an uninterrupted one"
            )

    def _follows(self, mark: StreamPosition) -> bool:
        """Return whether the next samples have the mark's hashes."""
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
                    raise TypeError("JSON changes its values")
            except (TypeError, ValueError) as error:
                self._stateful = False
                logger.warning(
                    "%s: state_dict() of %s cannot be saved in a checkpoint (%s), so it is not "
                    "used: resuming reads and skips the samples before",
                    *(self._where, self._kind, error),
                )
                state = ""
        return StreamPosition(self._origin + self._place, self._turn, self._place, state)

    def _with_hashes(self, mark: StreamPosition, following: list[Any]) -> StreamPosition:
        """Return a mark with hashes of the next samples; without any, a state is unverifiable."""
        following = [*following, *self._ahead]  # read ahead for an earlier mark of this pass
        while mark.turn == self._turn and len(following) < _AFTER and self._samples is not None:
            place = self._place + len(self._ahead)
            if place == self._size:
                break
            try:
                self._ahead.append(self._draw(place))
            except StopIteration:
                break
            following.append(self._ahead[-1])
        hashes = tuple(hash_of(sample) for sample in following[:_AFTER])
        return mark._replace(hashes=hashes, state=mark.state if hashes else "")

    def _next(self) -> Any:
        """Return the next sample; at the end of the pass, the first one of the next pass."""
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
        """Seed the global generators for a sample, skipped or not, and read it."""
        assert self._samples is not None, "no pass was started"
        seed_sample(self._seeds.of_samples(self._turn), place)
        sample = next(self._samples)
        if self._turn == 0 and place < len(self.hashes) and hash_of(sample) != self.hashes[place]:
            raise self._error(
                f"gave another sample {place} when it was read again. Every worker and every "
                "resumed run reads the stream: __iter__ must start at the same sample each time. "
                "Draw random numbers from random, numpy or torch, whose global generators are "
                "seeded before each pass and each sample, or from a generator created in __iter__: "
                "give a library's shuffle a seed that __iter__ draws"
            )
        return sample

    def _begin_next_pass(self) -> None:
        """Start the next pass, if the current one may end here."""
        if self._size is not None:
            raise self._error(
                f"ended after {self._place} samples in pass {self._turn}, and {self._size} were "
                "expected, by its len() or by the first count. Every epoch must have the same "
                "number; without __len__ and with `steps`, passes may have any length"
            )
        if not self._place:
            raise self._empty(self._turn)
        self._begin(self._turn + 1, self._origin + self._place)

    def _check_end(self) -> None:
        """Check that no sample follows the last one: it would never be trained on."""
        try:
            self._draw(self._place)
        except StopIteration:
            self._samples = None
            return
        raise self._error(
            f"gives more than the {self._size} samples of its len() or of the first count: "
            "without __len__ and with `steps`, passes may have any length"
        )

    def _empty(self, turn: int) -> ValueError:
        return self._error(
            f"gave no samples when it was read again, in pass {turn}: __iter__ must return a new "
            "iterator each time, as a generator function does"
        )

    def _error(self, text: str) -> ValueError:
        return ValueError(f"{self._where} {text}")
