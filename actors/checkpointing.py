"""
The controller's side of checkpoints: collects the ranks' parts, and writes them in a thread.

    polls ──▶ Collecting ── a version's parts ──▶ the newest ones wait ──▶ thread: disk ──▶ Saved
                                                        │
                                                        `- the oldest is skipped

Training never waits for the disk. A checkpoint that was due and failed is warned of, whatever the
cause; `PATIENCE` in a row end the run, for a run that trusts in checkpoints must not go on without.
One that is skipped because a disk is slow is no failure. Once that disk has taken nothing for
`failure.storage_timeout_s`, what waits for it and what is skipped counts as failed. One whose parts
went with a lost process counts until the next attempt begins: the restart budget counts losses.
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
"""How long a rollback waits for a checkpoint that is being written before it says so."""
_ONE_CAUSE_S = 10.0
"""Checkpoints that fail within so long, though the disk takes them, count as one: where a worker
dies all those that wait for its parts fail together, and the run recovers from that by itself."""
_QUEUE = 2
"""Complete checkpoints that may wait for the disk, however large."""
_QUEUE_BYTES = 64 * 2**20
"""Bytes of those that may wait beyond these."""
_FILES = ("model", "optimizer")
_ROWS = "/rows"
"""Ends the names of a table's rows, behind its name."""
_PIECE = 2**20
"""Elements that are looked at at a time."""


@dataclass(frozen=True)
class FailedCheckpoint:
    """A checkpoint that was due and did not come."""

    step: int
    why: str
    at: float
    """When it failed, in seconds."""
    refused: bool = False
    """By the disk: it counts, however soon after another one."""
    lost_in: int | None = None
    """The attempt in which a process was lost, and a part with it; None: it had another cause."""


def counting(failures: Sequence[FailedCheckpoint], attempt: int) -> list[tuple[int, str]]:
    """
    Give the steps of those that count towards `PATIENCE`, and why they failed.

    Args:
        failures: since the last checkpoint that came, oldest first.
        attempt: the one last begun.
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
    Read what a run begins from; None: it begins with the first step.

    Raises:
        StorageError: it is damaged now, or its disk does not answer.
    """
    where, limit_s = launch.resumed, launch.job.failure.storage_timeout_s
    if where is None:
        return None
    return with_deadline(lambda on_progress: read(where, on_progress), where, limit_s)


class Checkpoints:
    """
    All checkpoints of one run.

    Args:
        launch: the run; `launch.resumed` is what it began from.
        world: number of ranks.
        fetch: fetches arrays that a delivery names.
        now: gives seconds, to who calls `take_finished`; None: those that this process is awake.
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
        self._writing: int | None = None  #: step of the one that the thread is at
        self._fetching = False  #: its parts are on their way, which has a deadline of its own
        self._behind: list[int] = []  #: steps of those that were skipped since it was begun
        self._moves = self._moves_seen = 0  #: what the disk has done, now and when it last grew
        self._now = now or AwakeClock().now
        self._moved_at = self._now()
        self._warned_skipped = False  #: it was said that some are
        self._warned_late = False  #: and that the disk takes nothing
        self._warned_of_undeleted = False  #: and that some stay
        self._thread: Thread | None = None
        self._pruning = threading.Lock()  #: held while one is read, and while some are deleted
        self._best = BestCheckpoint(launch.job.checkpoint.keep_best)
        rule = launch.job.early_stop
        self._stopping = EarlyStopping(rule, launch.evaluated) if rule is not None else None
        self._evaluating = threading.Lock()  #: held while these two are used
        self._reported_best: int | None = None
        self._reported_stop = False
        self._finished: deque[Saved | Best | EarlyStopReached] = deque()
        self._failures: list[FailedCheckpoint] = []  #: since the last one that came
        self._gave_up_waiting = False  #: the end of the run waits for the writer no more
        self._written = 0  #: step of the newest one that this run wrote
        self._given = 0  #: step of the newest one of which a part came
        self.step = 0  #: of the newest one; 0: there is none

    def begin(self, attempt: int, job: Job) -> None:
        """Called when another attempt begins; `job`: with the number of workers that it has."""
        resized = job.scaling.world != self._job.scaling.world
        self._collecting.begin(attempt, job.scaling.world if resized else None)
        self._job = job

    def take(self, delivery: Delivery) -> None:
        """Take a rank's part; hand the version to the thread when it is complete."""
        self._given = max(self._given, delivery.version)
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
            while self._too_many():
                self._skip(self._waiting.popleft()[0][0].version)
            if self._thread is None:
                self._thread = Thread(target=self._work, name="checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def began(self, step: int) -> bool:
        """Say whether there is a checkpoint of this step or a later one, or a rank gave a part."""
        return max(self.step, self._given) >= step

    def _too_many(self) -> bool:
        count, most = len(self._waiting), self._job.checkpoint.num_to_keep
        size = sum(part.nbytes for parts, _ in self._waiting for part in parts)
        return count > most or (count > _QUEUE and size > _QUEUE_BYTES)

    def observe(self, summary: Summary) -> None:
        """
        Called with each event: evaluations say which checkpoint is the best, and those
        before a checkpoint are what `early_stop` goes on with.

        Of a train function its reports do.
        """
        if isinstance(summary, EvalSummary):
            metrics = summary.metrics
        elif isinstance(summary, StepSummary) and self._job.own_loop:
            metrics = reported_metrics(summary)
        else:
            return
        with self._evaluating:
            if self._stopping is not None and self._stopping.metric in metrics:
                reason = self._stopping.evaluated(summary.step, metrics)
                if reason is not None and not self._reported_stop:
                    self._reported_stop = True
                    self._finished.append(EarlyStopReached(summary.step, reason))
            self._best.evaluated(summary.step, metrics)
            self._report_best()

    def _report_best(self) -> None:
        """Tell which checkpoint is the best, if that is another one than before."""
        step, rule = self._best.step, self._job.checkpoint.keep_best
        if step is not None and rule is not None and step != self._reported_best:
            self._reported_best = step
            path = str(self._catalogue.path(step))
            self._finished.append(Best(step, path, rule.metric, self._best.figure))

    def take_finished(self) -> list[Saved | Best | EarlyStopReached]:
        """
        Give what came to the disk since the last call, which is the best, and an early stop.

        Raises:
            StorageError: checkpoints fail again and again.
        """
        failed = counting(list(self._failures), self._collecting.attempt)
        failures = [*failed, *self._overdue()]
        if len(failures) >= PATIENCE:
            step, why = failures[-1]
            text = f"{PATIENCE} checkpoints in a row could not be written to"
            raise StorageError(f"{text} {self._catalogue.folder}: step {step}: {why}")
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def settle(self) -> None:
        """Called when the run has ended well: all evaluations are known, all parts are written."""
        if self._job.checkpoint.keep_best is None or not self._written:
            return
        limit, written = self._job.failure.storage_timeout_s, self._written
        try:
            with_deadline(lambda on_progress: self._prune(written), self._catalogue.folder, limit)
        except (OSError, StorageError) as error:
            logger.warning("checkpoints that are too many could not be deleted: %s", error)

    def drain(self) -> None:
        """Wait until all that is complete is on the disk, within reason; in vain only once."""
        limit_s = min(_DRAIN_S, self._job.failure.storage_timeout_s)
        with self._changed:
            if not self._gave_up_waiting and not self._changed.wait_for(self._idle, limit_s):
                self._gave_up_waiting = True
                logger.warning("a checkpoint is still being written after %g s", limit_s)

    def _idle(self) -> bool:
        return not self._waiting and self._writing is None

    def newest(self) -> StoredCheckpoint | None:
        """
        Read the newest checkpoint that is whole, of this run or what it began from.

        The run goes on from it: later ones, all of them damaged, are set aside. One that is being
        written is newer work, and waited for.

        Raises:
            StorageError: there were some, and none can be read now, or the disk does not answer.
        """
        limit = self._job.failure.storage_timeout_s
        self._wait_for_writer(limit)
        saved = with_deadline(self._roll_back, self._catalogue.folder, limit)
        self.step = saved.step if saved is not None else 0
        return saved

    def _wait_for_writer(self, limit_s: float) -> None:
        """Wait for what is being written, and say so where it takes long."""
        soon_s = min(_SILENT_S, limit_s)
        with self._changed:
            if self._changed.wait_for(self._idle, soon_s):
                return
            text = "going back waits for a checkpoint that is being written, %g s at most (`%s`)"
            logger.warning(text, limit_s, SETTING)
            if not self._changed.wait_for(self._idle, limit_s - soon_s):
                text = "it is still being written after %g s (`%s`): taking one from before"
                logger.warning(text, limit_s, SETTING)

    def _roll_back(self, on_progress: OnProgress) -> StoredCheckpoint | None:
        with self._pruning:
            saved = self._read(on_progress)
            if saved is not None:
                try:
                    self._catalogue.set_aside(saved.step)
                except OSError as error:
                    logger.warning("damaged checkpoints could not be renamed: %s", error)
                with self._evaluating:
                    self._best.retain(self._catalogue.steps())
                    self._report_best()
        return saved

    def _read(self, on_progress: OnProgress) -> StoredCheckpoint | None:
        """Read the newest whole one: of this run, else what it began from."""
        began_from = self._launch.resumed
        try:
            saved = self._catalogue.newest(logger.warning, on_progress)
        except StorageError as error:
            if began_from is None:
                raise
            logger.warning("%s; taking what the run was resumed from", error)
            saved = None
        if saved is None and began_from is not None:
            return read(began_from, on_progress)
        if saved is None and self._written:
            gone = self._catalogue.path(self._written)
            raise StorageError(f"{gone} is gone, and there is no other checkpoint")
        return saved

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                parts, began = self._waiting.popleft()
                self._writing, self._behind = parts[0].version, []
                self._moved()
            self._write(parts, began)
            with self._changed:
                self._writing = None
                self._changed.notify_all()

    def _write(self, parts: Sequence[Delivery], began: float) -> None:
        step = parts[0].version
        try:
            path = self._write_checkpoint(step, parts)
            size = sum(file.stat().st_size for file in path.iterdir())
        except OSError as error:
            why = error.strerror or str(error)
            self._fail(step, why, refused=True)
            logger.warning("no checkpoint of step %d in %s: %s", step, self._catalogue.folder, why)
        except Exception as error:  # the parts' owner is lost, for example: the next may be better
            logger.warning("no checkpoint of step %d: %s", step, error)
            lost_in = parts[0].attempt if isinstance(error, ActorDied) else None
            self._fail(step, str(error) or repr(error), lost_in=lost_in)
        else:
            self._failures.clear()
            self._warned_late = False
            self.step = self._written = step
            self._finished.append(Saved(step, str(path), size, time.monotonic() - began))
            with self._evaluating:
                self._report_best()

    def _write_checkpoint(self, step: int, parts: Sequence[Delivery]) -> Path:
        launch = self._launch
        _refuse([part.facts[NOT_FINITE] for part in parts if NOT_FINITE in part.facts])
        tensors_by_file = group_by_file(assemble_tensors(self._bundles(parts)))
        _refuse(_tables_not_finite(tensors_by_file))
        tensors = {name: tensors_by_file.get(name, {}) for name in (*_FILES, *tensors_by_file)}
        files = {f"{name}.safetensors": encode(held) for name, held in tensors.items()}
        facts = joined_facts([part.facts for part in parts])
        facts |= self._evaluated(step, facts)
        state = state_of(self._job, launch.run, facts)
        path = self._catalogue.write(step, files, state)
        with self._evaluating:
            self._best.saved(step)
        self._prune(step)
        return path

    def _bundles(self, parts: Sequence[Delivery]) -> list[Bundle]:
        """Bring what the ranks gave."""
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

    def _evaluated(self, step: int, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Give what evaluations had come to by the step of a checkpoint."""
        if self._stopping is None:
            return {}
        job = self._job
        every = 1 if job.own_loop else job.evaluation.period(facts["steps_per_epoch"])
        with self._evaluating:
            return {EARLY_STOP: self._stopping.state_dict(step, every)}

    def _prune(self, written: int) -> None:
        """Delete those that are too many."""
        with self._evaluating:
            protected = self._best.protected
        with self._pruning:
            why = self._catalogue.prune(self._job.checkpoint.num_to_keep, written, protected)
            left = self._catalogue.steps()
        if why and not self._warned_of_undeleted:
            self._warned_of_undeleted = True
            logger.warning("old checkpoints could not be deleted, and take room: %s", why)
        with self._evaluating:
            self._best.retain(left)

    def _fail(
        self, step: int, why: str, *, refused: bool = False, lost_in: int | None = None
    ) -> None:
        self._failures.append(FailedCheckpoint(step, why, time.monotonic(), refused, lost_in))

    def _skip(self, step: int) -> None:
        self._behind.append(step)
        if not self._warned_skipped:
            self._warned_skipped = True
            text = "checkpoints come faster than they are written: step %d is skipped"
            logger.warning(text, step)

    def _overdue(self) -> list[tuple[int, str]]:
        """Give the steps whose checkpoints do not come because the disk hangs, and what to say."""
        now, limit_s = self._now(), self._job.failure.storage_timeout_s
        with self._changed:
            idle = self._writing is None or self._fetching
            if idle or self._moves != self._moves_seen:
                self._moves_seen, self._moved_at = self._moves, now
            if idle or now - self._moved_at < limit_s:
                return []
            waiting = [parts[0].version for parts, _ in self._waiting]
            steps = [self._writing, *self._behind, *waiting]
        if not self._warned_late:  # a disk that hangs does not say so itself
            self._warned_late = True
            text = "the disk of %s has taken nothing for %g s (`%s`); the run goes on until "
            text += "%d checkpoints do not come"
            logger.warning(text, self._catalogue.folder, limit_s, SETTING, PATIENCE)
        why = f"its disk has taken nothing for {limit_s:g} s (`{SETTING}`)"
        return [(step, why) for step in steps if step is not None]


def _refuse(names: Sequence[str]) -> None:
    """Raise if something that was trained is not finite: a run could not go on from it."""
    if names:
        raise ValueError(f"{names[0]!r} holds NaN or infinity; the checkpoints before stay")


def _tables_not_finite(tensors_by_file: Mapping[str, Mapping[str, RawTensor]]) -> list[str]:
    """Give the embedding tables whose rows hold NaN or infinity."""
    return [
        name.removesuffix(_ROWS)
        for file, tensors in tensors_by_file.items()
        for name, tensor in tensors.items()
        if file.startswith(TABLES) and name.endswith(_ROWS)
        if not all(np.isfinite(part).all() for part in _pieces(tensor.data.view(np.float32)))
    ]


def _pieces(values: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Cut a vector, so that what is asked of all elements takes little memory."""
    return (values[at : at + _PIECE] for at in range(0, len(values), _PIECE))
