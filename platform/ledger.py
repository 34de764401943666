"""
The ledgers of a shard: which pushes it has, and which it must not take (invariants I1, I3, I6).

A synchronous shard lives through the same three moments for every step. `version` counts the
updates it has applied, so it is also the sequence number of the pushes it waits for:

            push(seq=version)           all ranks staged            commit(seq=version)
    WAITING -----------------> STAGING ------------------> STAGED ---------------------> WAITING
                                                                                version += 1

Ray delivers a call at least once. What may arrive twice is answered as the first time; what would
lose a push or count one twice is refused. The memory is O(ranks), however long the run is.

An asynchronous shard applies each push when it comes. Every worker's pushes are numbered for
themselves, and name the task that they are of:

    worker-0   0  1  2 |3|         push 2 again: the same answer      1: stale
    worker-1   0 |1|

Tasks are leased to whoever asks for them, so two workers may make the same one: one that was taken
for lost, and the one who got its lease. The first push of a task counts.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any

from distplat.platform.errors import FencedError, GapError, NotReadyError, StaleError
from distplat.platform.interval_set import IntervalSet


@dataclass(frozen=True)
class PushId:
    """Names one push, once and for all; the shard adds its own index."""

    job: str
    attempt: int
    """Generation of the job: grows at each recovery."""
    rank: int
    seq: int
    """Number of this worker's push, from 0; in synchronous strategies the step."""
    task: int | None = None
    """What it is of, where tasks are leased: then pushes are numbered from 0 in each attempt."""


@dataclass(frozen=True)
class Answer:
    """What a shard tells a worker: the answer to a push, a commit or a pull."""

    version: int
    """Updates that the values have behind them that the worker now has."""
    committed: bool = True
    """False: a commit must follow, with the norm over all shards."""
    squared_norm: float | None = None
    """Of the summed gradient on this shard; None: nobody needs it."""
    staleness: int = 0
    """Updates between the worker's pull and its gradient's turn."""
    waiting_s: float = 0.0
    """How long the worker was held up for others."""
    apply_s: float = 0.0
    """What summing and updating took."""
    queue_s: float = 0.0
    """How long the worker's push stood before the update that it is part of began."""
    queue_depth: int = 0
    """Pushes that stood there when it came, itself included."""
    dropped: int = 0
    """The worker's pushes so far that came too late for their step."""
    done: int = 0
    """Steps of which the shard has every gradient."""
    total: tuple[float, ...] = ()
    """Head of the step's control record, summed over the ranks; empty: of no step."""
    payload: Any = None
    """How the values travel, where worker and server share no memory."""


class Verdict(Enum):
    """What a shard does with a push that it does not refuse."""

    NEW = "stage it"
    REPEAT_STAGED = "it is staged already"
    REPEAT_COMMITTED = "its step is committed already"
    LATE = "its step was made without it: drop it"


class Ledger:
    """
    Book of one synchronous shard. Starts unready: without parameters it takes nothing.

    With `backup` workers a step is complete without so many of the pushes. A worker whose push
    came too late goes on with the newest version, so it may leave steps out.
    """

    def __init__(self, job: str, attempt: int, world: int, backup: int = 0) -> None:
        self.job, self.attempt, self.world = job, attempt, world
        self.version: int | None = None  #: updates applied; None: no parameters yet
        self.dropped = [0] * world  #: by rank: pushes that came too late
        self._backup = backup
        self._last: dict[int, tuple[int, Verdict]] = {}  #: rank -> its last push, told again how
        self._staged: set[int] = set()  #: ranks whose push for `version` is here

    def restore(self, version: int) -> None:
        """Parameters of this version are in place; from now on pushes are taken."""
        self.version = version
        self._staged.clear()

    def renew(self, attempt: int, world: int | None = None) -> None:
        """All push what is not committed once more; `world`: so many ranks from now on."""
        self.attempt = attempt
        self._staged.clear()
        if world is not None and world != self.world:
            self.world = world
            self.dropped = (self.dropped + [0] * world)[:world]
            self._last = {rank: last for rank, last in self._last.items() if rank < world}

    def offer(self, push: PushId) -> Verdict:
        """
        Decide on a push and book it.

        Raises:
            NotReadyError: no parameters yet.
            FencedError: another job or attempt, or no rank of this world.
            StaleError: older than the last committed push.
            GapError: newer than the one expected.
        """
        version = _ready(self.version)
        _check_sender(push, self.job, self.attempt, self.world)
        if push.seq == version:
            if push.rank in self._staged:
                return Verdict.REPEAT_STAGED
            self._staged.add(push.rank)
            self._last[push.rank] = push.seq, Verdict.REPEAT_COMMITTED
            return Verdict.NEW
        if self._backup and 0 <= push.seq < version:
            return self._late(push)
        if push.seq == version - 1:
            return Verdict.REPEAT_COMMITTED
        raise _out_of_turn(push, version)

    @property
    def complete(self) -> bool:
        """Whether as many pushes for the present version are staged as a step needs."""
        return len(self._staged) >= self.world - self._backup

    def _late(self, push: PushId) -> Verdict:
        last, verdict = self._last.get(push.rank, (-1, Verdict.LATE))
        if push.seq < last:
            raise _out_of_turn(push, last)
        if push.seq > last:
            self.dropped[push.rank] += 1
            self._last[push.rank] = push.seq, Verdict.LATE
            return Verdict.LATE
        return verdict

    def missing(self) -> list[int]:
        """Ranks whose push for the present version has not come."""
        return [rank for rank in range(self.world) if rank not in self._staged]

    def commit(self, seq: int) -> bool:
        """
        Book the update of step `seq`. False: it is booked already and must not be applied again.

        Raises:
            NotReadyError: no parameters yet.
            StaleError, GapError: not the step that is staged.
        """
        version = _ready(self.version)
        if seq == version - 1:
            return False
        if seq < version:
            raise StaleError(f"commit {seq} refused: version is {version}")
        if seq > version or not self.complete:
            raise GapError(f"commit {seq} refused: version is {version}, missing {self.missing()}")
        self.version = version + 1
        self._staged.clear()
        return True


class TaskLedger:
    """
    Book of an asynchronous shard, or of asynchronous tables: any rank may push, and of each task
    the first gradient counts. Starts unready: without parameters it takes nothing.
    """

    def __init__(self, job: str, attempt: int) -> None:
        self.job, self.attempt = job, attempt
        self.version: int | None = None  #: updates applied; None: no parameters yet
        self.made = IntervalSet()  #: tasks that are in the parameters
        self.dropped: dict[int, int] = {}  #: rank -> its pushes of tasks that were made before
        self._next: dict[int, int] = {}  #: rank -> number of the push that is its turn

    def restore(self, version: int, task: int = 0) -> None:
        """
        Parameters of this version are in place; from now on pushes are taken.

        Args:
            version: updates that they have behind them.
            task: the first one that is not in them.
        """
        self.version, self.made = version, IntervalSet(task)

    def renew(self, attempt: int, world: int | None = None) -> None:
        """Pushes of this attempt are taken from now on, each rank's from 0; what is made, stays."""
        self.attempt = attempt
        self._next.clear()

    def offer(self, push: PushId) -> Verdict:
        """
        Decide on a push and book it; `NEW` is to be applied at once, and counts as a version.

        Raises:
            NotReadyError: no parameters yet.
            FencedError: another job or attempt, or a push of no task.
            StaleError: older than the rank's last push.
        """
        version = _ready(self.version)
        _check_sender(push, self.job, self.attempt, push.rank + 1)
        if push.task is None:
            raise FencedError(f"push {push.seq} of rank {push.rank} refused: it is of no task")
        expected = self._next.get(push.rank, 0)
        if push.seq == expected - 1:
            return Verdict.REPEAT_COMMITTED
        # Not refused is one after a gap: a backup was not told of a push that was dropped.
        if push.seq < expected:
            raise _out_of_turn(push, expected)
        self._next[push.rank] = push.seq + 1
        if not self.made.add(push.task):
            self.dropped[push.rank] = self.dropped.get(push.rank, 0) + 1
            return Verdict.LATE
        self.version = version + 1
        return Verdict.NEW


def _ready(version: int | None) -> int:
    if version is None:
        raise NotReadyError("this shard has no parameters yet; it must be restored first")
    return version


def _check_sender(push: PushId, job: str, attempt: int, world: int) -> None:
    if (push.job, push.attempt) != (job, attempt):
        raise FencedError(
            f"push of job {push.job!r} attempt {push.attempt} refused: "
            f"this shard serves {job!r} attempt {attempt}"
        )
    if not 0 <= push.rank < world:
        raise FencedError(f"push of rank {push.rank} refused: the world has {world}")


def _out_of_turn(push: PushId, expected: int) -> GapError | StaleError:
    kind = GapError if push.seq > expected else StaleError
    return kind(f"push {push.seq} of rank {push.rank} refused: expected {expected}")
