"""
The controller's side of checkpoints: collects the ranks' parts, and writes them in a thread.

    polls ──▶ CheckpointAssembly ── all parts of a version ──▶ queue ──▶ thread: disk ──▶ Saved
                                                                 │
                                                                 `- if full: skip the oldest

Training never waits for the disk. Each failed checkpoint logs a warning. `PATIENCE` failures in a
row end the run, because a run that relies on checkpoints must not continue without them. A
checkpoint that is skipped because the disk is slow does not count as failed. Once the disk has made
no progress for `failure.storage_timeout_s`, queued and skipped checkpoints count as failed. A
checkpoint whose parts were lost with a process counts only until the next attempt starts, because
the restart budget already counts that loss.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distplat.actors.actor_group import Launch
from distplat.actors.transport import ActorDied
from distplat.platform.awake_clock import AwakeClock
from distplat.platform.checkpoints import (
    FOLDER,
    Catalogue,
    CheckpointAssembly,
    Delivery,
    FetchArrays,
    StoredCheckpoint,
    read,
)
from distplat.platform.disk import SETTING, OnProgress, with_deadline
from distplat.platform.errors import StorageError
from distplat.platform.evaluations import EARLY_STOP, BestCheckpoint, EarlyStopping
from distplat.platform.progress import (
    Best,
    EarlyStopReached,
    EvalSummary,
    Saved,
    StepSummary,
    Summary,
    reported_metrics,
)
from distplat.platform.resume import NOT_FINITE, joined_facts, state_of
from distplat.platform.shard_map import TABLES
from distplat.platform.spec import Job
from distplat.platform.tensor_file import encode
from distplat.platform.tensor_slices import Bundle, RawTensor, assemble_tensors, group_by_file

logger = logging.getLogger(__name__)

PATIENCE = 3
_DRAIN_S = 30.0
_SILENT_S = 5.0
"""Seconds that a rollback waits for a running checkpoint write before it logs a warning."""
_ONE_CAUSE_S = 10.0
"""Failures within this time that the disk did not cause count as one: if a worker dies, all
checkpoints that wait for its parts fail together, and the run recovers from that by itself."""
_QUEUE = 2
"""Complete checkpoints that may wait for the disk, whatever their size."""
_QUEUE_BYTES = 64 * 2**20
"""Total size up to which more checkpoints may wait."""
_FILES = ("model", "optimizer")
_ROWS = "/rows"
"""Suffix of the tensor with a table's rows."""
_PIECE = 2**20
"""Elements checked for NaN at a time."""


@dataclass(frozen=True)
class FailedCheckpoint:
    """A checkpoint that was due but not written."""

    step: int
    why: str
    at: float
    """Time of the failure in seconds."""
    refused: bool = False
    """Whether the disk caused the failure: it then counts, however soon after another one."""
    lost_in: int | None = None
    """The attempt in which a part was lost with its process; None: another cause."""


def counted_failures(failures: Sequence[FailedCheckpoint], attempt: int) -> list[tuple[int, str]]:
    """
    Return step and cause of the failures that count towards `PATIENCE`.

    Args:
        failures: failures since the last written checkpoint, oldest first.
        attempt: the current attempt.
    """
    counted, last = list[tuple[int, str]](), -math.inf
    for failure in failures:
        if failure.lost_in is not None and failure.lost_in != attempt:
            continue
        if not failure.refused:
            if failure.at - last < _ONE_CAUSE_S:
                continue
            last = failure.at
        counted.append((failure.step, failure.why))
    return counted


def newest_checkpoint(launch: Launch) -> StoredCheckpoint | None:
    """
    Read the checkpoint to resume from; None: the run starts at the first step.

    Raises:
        StorageError: the checkpoint is damaged, or its disk does not respond.
    """
    path, limit_s = launch.resumed, launch.job.failure.storage_timeout_s
    if path is None:
        return None
    return with_deadline(lambda on_progress: read(path, on_progress), path, limit_s)


class Checkpoints:
    """
    All checkpoints of one run.

    Args:
        launch: parameters of the run.
        world: number of ranks.
        fetch: fetches the arrays of a delivery.
        now: clock in seconds; None: an `AwakeClock`.
    """

    def __init__(
        self,
        launch: Launch,
        world: int,
        fetch: FetchArrays,
        now: Callable[[], float] | None = None,
    ) -> None:
        self._launch, self._fetch = launch, fetch
        self._job = launch.job
        self._catalogue = Catalogue(launch.folder / FOLDER, on_progress=self._moved)
        self._collecting = CheckpointAssembly(world)
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Sequence[Delivery], float]] = deque()
        self._writing: int | None = None  #: step of the checkpoint that the thread writes
        self._fetching = False  #: its parts are being fetched, under a deadline of their own
        self._skipped: list[int] = []  #: steps skipped since that write started
        self._moves = self._last_moves = 0  #: progress count of the disk, now and at `_moved_at`
        self._now = now or AwakeClock().now
        self._moved_at = self._now()
        self._warned_skipped = False  #: about skipped checkpoints
        self._warned_late = False  #: about a disk without progress
        self._warned_undeleted = False  #: about old checkpoints that stay
        self._thread: Thread | None = None
        self._disk_lock = threading.Lock()  #: held while checkpoints are read or deleted
        self._best = BestCheckpoint(launch.job.checkpoint.keep_best)
        rule = launch.job.early_stop
        self._stopping = EarlyStopping(rule, launch.evaluated) if rule is not None else None
        self._evaluation_lock = threading.Lock()  #: guards `_best` and `_stopping`
        self._reported_best: int | None = None
        self._reported_stop = False
        self._finished: deque[Saved | Best | EarlyStopReached] = deque()
        self._failures: list[FailedCheckpoint] = []  #: since the last written checkpoint
        self._gave_up_waiting = False  #: `drain` has timed out once
        self._written = 0  #: step of the newest checkpoint that this run wrote
        self._delivered = 0  #: step of the newest checkpoint of which a part was delivered
        self.step = 0  #: step of the newest checkpoint; 0: none

    def begin(self, attempt: int, job: Job) -> None:
        """Start a new attempt; `job` has its number of workers."""
        resized = job.scaling.world != self._job.scaling.world
        self._collecting.begin(attempt, job.scaling.world if resized else None)
        self._job = job

    def take(self, delivery: Delivery) -> None:
        """Add a rank's part; queue the version for writing once it is complete."""
        self._delivered = max(self._delivered, delivery.version)
        if delivery.failure and delivery.attempt == self._collecting.attempt:
            lost_in = delivery.attempt if delivery.lost else None
            self._fail(delivery.version, delivery.failure, lost_in=lost_in)
        parts = self._collecting.add(delivery)
        for version in self._collecting.skipped():
            self._skip(version)
        if not parts:
            return
        with self._changed:
            self._waiting.append((parts, time.monotonic()))
            while self._queue_full():
                self._skip(self._waiting.popleft()[0][0].version)
            if self._thread is None:
                self._thread = Thread(target=self._work, name="checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def started(self, step: int) -> bool:
        """Return whether a checkpoint of this step or a later one exists or has parts."""
        return max(self.step, self._delivered) >= step

    def _queue_full(self) -> bool:
        count, limit = len(self._waiting), self._job.checkpoint.num_to_keep
        size = sum(part.nbytes for parts, _ in self._waiting for part in parts)
        return count > limit or (count > _QUEUE and size > _QUEUE_BYTES)

    def observe(self, summary: Summary) -> None:
        """
        Update the best checkpoint and early stopping from an evaluation.

        In a train function its reports take the place of evaluations. Other events are ignored.
        """
        if isinstance(summary, EvalSummary):
            metrics = summary.metrics
        elif isinstance(summary, StepSummary) and self._job.own_loop:
            metrics = reported_metrics(summary)
        else:
            return
        with self._evaluation_lock:
            if self._stopping is not None and self._stopping.metric in metrics:
                reason = self._stopping.evaluated(summary.step, metrics)
                if reason is not None and not self._reported_stop:
                    self._reported_stop = True
                    self._finished.append(EarlyStopReached(summary.step, reason))
            self._best.evaluated(summary.step, metrics)
            self._report_best()

    def _report_best(self) -> None:
        """Report the best checkpoint if it has changed."""
        step, rule = self._best.step, self._job.checkpoint.keep_best
        if step is not None and rule is not None and step != self._reported_best:
            self._reported_best = step
            path = str(self._catalogue.path(step))
            self._finished.append(Best(step, path, rule.metric, self._best.figure))

    def take_finished(self) -> list[Saved | Best | EarlyStopReached]:
        """
        Return the events since the last call: written and best checkpoints, and early stops.

        Raises:
            StorageError: `PATIENCE` checkpoints in a row have failed.
        """
        failed = counted_failures(list(self._failures), self._collecting.attempt)
        failures = [*failed, *self._overdue()]
        if len(failures) >= PATIENCE:
            step, why = failures[-1]
            text = f"{PATIENCE} checkpoints in a row could not be written to"
            raise StorageError(f"{text} {self._catalogue.folder}: step {step}: {why}")
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def finish(self) -> None:
        """Delete old checkpoints after the run has succeeded and all evaluations are known."""
        if self._job.checkpoint.keep_best is None or not self._written:
            return
        limit, written = self._job.failure.storage_timeout_s, self._written
        try:
            with_deadline(lambda on_progress: self._prune(written), self._catalogue.folder, limit)
        except (OSError, StorageError) as error:
            logger.warning("surplus checkpoints could not be deleted: %s", error)

    def drain(self) -> None:
        """Wait for queued writes, up to a time limit; after one timeout do not wait again."""
        limit_s = min(_DRAIN_S, self._job.failure.storage_timeout_s)
        with self._changed:
            if not self._gave_up_waiting and not self._changed.wait_for(self._idle, limit_s):
                self._gave_up_waiting = True
                logger.warning("a checkpoint is still being written after %g s", limit_s)

    def _idle(self) -> bool:
        return not self._waiting and self._writing is None

    def newest(self) -> StoredCheckpoint | None:
        """
        Read the newest intact checkpoint, of this run or the one it resumed from.

        The run continues from this checkpoint. Later ones are all damaged and are renamed. A
        running write is waited for first, because its checkpoint is newer.

        Raises:
            StorageError: no checkpoint can be read, or the disk does not respond.
        """
        limit = self._job.failure.storage_timeout_s
        self._wait_for_writer(limit)
        saved = with_deadline(self._roll_back, self._catalogue.folder, limit)
        self.step = saved.step if saved is not None else 0
        return saved

    def _wait_for_writer(self, limit_s: float) -> None:
        """Wait for a running write; log a warning if it takes long."""
        soon_s = min(_SILENT_S, limit_s)
        with self._changed:
            if self._changed.wait_for(self._idle, soon_s):
                return
            text = "the rollback waits for a checkpoint that is being written, at most %g s (`%s`)"
            logger.warning(text, limit_s, SETTING)
            if not self._changed.wait_for(self._idle, limit_s - soon_s):
                text = "it is still being written after %g s (`%s`): using an earlier one"
                logger.warning(text, limit_s, SETTING)

    def _roll_back(self, on_progress: OnProgress) -> StoredCheckpoint | None:
        with self._disk_lock:
            saved = self._read(on_progress)
            if saved is not None:
                try:
                    self._catalogue.set_aside(saved.step)
                except OSError as error:
                    logger.warning("damaged checkpoints could not be renamed: %s", error)
                with self._evaluation_lock:
                    self._best.retain(self._catalogue.steps())
                    self._report_best()
        return saved

    def _read(self, on_progress: OnProgress) -> StoredCheckpoint | None:
        """Read the newest intact checkpoint of this run, else the one that it resumed from."""
        resumed = self._launch.resumed
        try:
            saved = self._catalogue.newest(logger.warning, on_progress)
        except StorageError as error:
            if resumed is None:
                raise
            logger.warning("%s; the rollback uses the checkpoint of --resume", error)
            saved = None
        if saved is None and resumed is not None:
            return read(resumed, on_progress)
        if saved is None and self._written:
            missing = self._catalogue.path(self._written)
            raise StorageError(f"{missing} is gone, and there is no other checkpoint")
        return saved

    def _work(self) -> None:
        """Write the waiting checkpoints; the thread ends with them and releases their arrays."""
        while True:
            with self._changed:
                if not self._waiting:
                    self._thread = None
                    return
                parts, start = self._waiting.popleft()
                self._writing, self._skipped = parts[0].version, []
                self._moved()
            self._write(parts, start)
            with self._changed:
                self._writing = None
                self._changed.notify_all()

    def _write(self, parts: Sequence[Delivery], start: float) -> None:
        step = parts[0].version
        try:
            path = self._write_checkpoint(step, parts)
            size = sum(file.stat().st_size for file in path.iterdir())
        except OSError as error:
            why = error.strerror or str(error)
            self._fail(step, why, refused=True)
            logger.warning("no checkpoint of step %d in %s: %s", step, self._catalogue.folder, why)
        except Exception as error:  # for example a lost worker; the next write may succeed
            logger.warning("no checkpoint of step %d: %s", step, error)
            lost_in = parts[0].attempt if isinstance(error, ActorDied) else None
            self._fail(step, str(error) or repr(error), lost_in=lost_in)
        else:
            self._failures.clear()
            self._warned_late = False
            self.step = self._written = step
            self._finished.append(Saved(step, str(path), size, time.monotonic() - start))
            with self._evaluation_lock:
                self._report_best()

    def _write_checkpoint(self, step: int, parts: Sequence[Delivery]) -> Path:
        launch = self._launch
        _check_finite([part.facts[NOT_FINITE] for part in parts if NOT_FINITE in part.facts])
        tensors_by_file = group_by_file(assemble_tensors(self._bundles(parts)))
        _check_finite(_non_finite_tables(tensors_by_file))
        tensors = {name: tensors_by_file.get(name, {}) for name in (*_FILES, *tensors_by_file)}
        files = {f"{name}.safetensors": encode(content) for name, content in tensors.items()}
        facts = joined_facts([part.facts for part in parts])
        facts |= self._early_stop_state(step, facts)
        state = state_of(self._job, launch.run, facts)
        path = self._catalogue.write(step, files, state)
        with self._evaluation_lock:
            self._best.saved(step)
        self._prune(step)
        return path

    def _bundles(self, parts: Sequence[Delivery]) -> list[Bundle]:
        """Fetch the ranks' arrays."""
        self._fetching = True
        try:
            return [
                (self._fetch(ref), entries)
                for part in parts
                for ref, entries in zip(part.refs, part.entries, strict=True)
            ]
        finally:
            self._fetching = False
            self._moved()

    def _moved(self) -> None:
        self._moves += 1

    def _early_stop_state(self, step: int, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the state of `early_stop` at the step of a checkpoint."""
        if self._stopping is None:
            return {}
        job = self._job
        every = 1 if job.own_loop else job.evaluation.period(facts["steps_per_epoch"])
        with self._evaluation_lock:
            return {EARLY_STOP: self._stopping.state_dict(step, every)}

    def _prune(self, written: int) -> None:
        """Delete old checkpoints beyond `num_to_keep`."""
        with self._evaluation_lock:
            protected = self._best.protected
        with self._disk_lock:
            why = self._catalogue.prune(self._job.checkpoint.num_to_keep, written, protected)
            steps = self._catalogue.steps()
        if why and not self._warned_undeleted:
            self._warned_undeleted = True
            logger.warning("old checkpoints could not be deleted and take up space: %s", why)
        with self._evaluation_lock:
            self._best.retain(steps)

    def _fail(
        self, step: int, why: str, *, refused: bool = False, lost_in: int | None = None
    ) -> None:
        self._failures.append(FailedCheckpoint(step, why, time.monotonic(), refused, lost_in))

    def _skip(self, step: int) -> None:
        self._skipped.append(step)
        if not self._warned_skipped:
            self._warned_skipped = True
            text = "checkpoints come faster than they are written: step %d is skipped"
            logger.warning(text, step)

    def _overdue(self) -> list[tuple[int, str]]:
        """Return step and cause of the checkpoints that a hung disk delays."""
        now, limit_s = self._now(), self._job.failure.storage_timeout_s
        with self._changed:
            idle = self._writing is None or self._fetching
            if idle or self._moves != self._last_moves:
                self._last_moves, self._moved_at = self._moves, now
            if idle or now - self._moved_at < limit_s:
                return []
            waiting = [parts[0].version for parts, _ in self._waiting]
            steps = [self._writing, *self._skipped, *waiting]
        if not self._warned_late:  # a hung disk raises no error
            self._warned_late = True
            text = "the disk of %s has accepted no data for %g s (`%s`); the run continues until "
            text += "%d checkpoints have failed"
            logger.warning(text, self._catalogue.folder, limit_s, SETTING, PATIENCE)
        why = f"its disk has accepted no data for {limit_s:g} s (`{SETTING}`)"
        return [(step, why) for step in steps if step is not None]


def _check_finite(names: Sequence[str]) -> None:
    """Raise if a trained tensor is not finite: a run could not continue from it."""
    if names:
        raise ValueError(f"{names[0]!r} holds NaN or infinity; the checkpoints before stay")


def _non_finite_tables(tensors_by_file: Mapping[str, Mapping[str, RawTensor]]) -> list[str]:
    """Return the embedding tables whose rows contain NaN or infinity."""
    return [
        name.removesuffix(_ROWS)
        for file, tensors in tensors_by_file.items()
        for name, tensor in tensors.items()
        if file.startswith(TABLES) and name.endswith(_ROWS)
        if not all(np.isfinite(part).all() for part in _pieces(tensor.data.view(np.float32)))
    ]


def _pieces(values: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Split a vector, so that temporary arrays stay small."""
    return (values[start : start + _PIECE] for start in range(0, len(values), _PIECE))
