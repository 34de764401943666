"""
A server's ledger: which pushes were received, and which must be refused (invariants I1, I3, I6).

Servers of parameters and of embedding tables use the same ledgers, one class per kind of counting.

A synchronous server repeats three states for every step. `version` counts applied updates, so it is
also the sequence number of the pushes that the server waits for:

            push(seq=version)           all ranks staged            commit(seq=version)
    WAITING -----------------> STAGING ------------------> STAGED ---------------------> WAITING
                                                                                version += 1

Ray delivers a call at least once. A repeated push gets the answer of the first; a push that would
be lost or counted twice is refused. Memory is O(ranks), independent of the length of the run.

An asynchronous server applies each push when it arrives. Each worker numbers its own pushes, and
each push names the task that its gradient is of; task p of step s of N parts is s * N + p:

    worker-0   0  1  2 |3|         push 2 again: the same answer      1: stale
    worker-1   0 |1|

Tasks are leased to any worker that asks, so two workers may compute the same task: one that was
presumed lost, and one that received its lease. The first push of a task counts; a repeated push
after a failure changes nothing.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from typing_extensions import override

from distplat.platform.errors import FencedError, GapError, NotReadyError, StaleError


@dataclass
class IntervalSet:
    """
    The set of finished numbers, counted up from a first number.

        low = 5   above = {7, 8}        5 is the lowest unfinished number; 6 is unfinished, too
    """

    low: int = 0
    """All numbers below it are finished; this one is not."""
    above: set[int] = field(default_factory=set)
    """Finished numbers above `low`."""

    def add(self, number: int) -> bool:
        """Add a number; False: it was in the set already."""
        if number in self:
            return False
        self.above.add(number)
        while self.low in self.above:
            self.above.remove(self.low)
            self.low += 1
        return True

    def __contains__(self, number: int) -> bool:
        return number < self.low or number in self.above


@dataclass(frozen=True)
class PushId:
    """Unique name of a push; the server adds its own index."""

    job: str
    attempt: int
    """Attempt of the job; grows at each recovery."""
    rank: int
    seq: int
    """Number of the worker's push, from 0; in synchronous strategies the step."""
    task: int | None = None
    """Task of the gradient, where tasks are leased: then `seq` starts at 0 in each attempt."""


@dataclass(frozen=True)
class PullId:
    """Unique name of a pull: a late or repeated pull must not overwrite newer values."""

    attempt: int
    rank: int
    number: int
    """Number of the worker's pull in the attempt, from 0."""


@dataclass(frozen=True)
class ServerReply:
    """A server's answer to a push, a commit or a pull."""

    version: int
    """Version of the values that the worker now has."""
    committed: bool = True
    """False: a commit must follow, with the norm over all shards."""
    squared_norm: float | None = None
    """Squared 2-norm of the summed gradient on this server; None: not needed."""
    staleness: int = 0
    """Updates between the worker's pull and the application of its gradient."""
    waiting_s: float = 0.0
    """Time that the worker waited for other workers."""
    apply_s: float = 0.0
    """Time for the sum and the update."""
    queue_s: float = 0.0
    """Time between the arrival of the push and the start of its update."""
    queue_depth: int = 0
    """Pushes in the queue when this push arrived, including this one."""
    dropped: int = 0
    """The worker's pushes so far that arrived too late for their step."""
    done: int = 0
    """Steps for which the server has every gradient."""
    total: tuple[float, ...] = ()
    """First entries of the step's control record, summed over the ranks; empty: not the answer to a
    step."""
    payload: Any = None
    """The values as they are sent where worker and server share no memory."""


class Verdict(Enum):
    """The server's decision on a push that is not refused."""

    NEW = "stage it"
    REPEAT_STAGED = "staged already"
    REPEAT_COMMITTED = "its step is committed already"
    LATE = "its step was applied without it: drop it"


class Ledger(ABC):
    """
    Record of one server's pushes. A ledger without parameters (`version` None) refuses every push.

    Args:
        job: name of the run.
        attempt: the first attempt.
        world: workers whose pushes make up a step, or tasks of a step.
    """

    asynchronous: ClassVar[bool]

    def __init__(self, job: str, attempt: int, world: int) -> None:
        self.job, self.attempt, self.world = job, attempt, world
        self.version: int | None = None  #: applied updates; None: no parameters yet
        self.dropped: dict[int, int] = {}  #: rank -> number of its late pushes
        self.finished_ranks: set[int] = set()  #: ranks whose train function has returned

    @property
    def updates(self) -> int:
        """Number of applied updates."""
        return self.version or 0

    @property
    def schedule_step(self) -> int:
        """Step of the learning rate schedule; `world` asynchronous updates make one step."""
        return self.updates // self.world if self.asynchronous else self.updates

    @property
    def steps(self) -> int:
        """Steps of which every gradient is applied."""
        return self.schedule_step

    @property
    def drops_late(self) -> bool:
        """Whether steps are applied without the pushes of late ranks."""
        return False

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether the staged pushes are ready to be applied."""

    @abstractmethod
    def restore(self, steps: int) -> None:
        """Accept pushes: the parameters are in place, after `steps` steps."""

    @abstractmethod
    def renew(self, attempt: int, world: int | None = None) -> None:
        """
        Start a later attempt: pushes of earlier attempts are refused.

        Args:
            attempt: the new attempt.
            world: number of ranks from now on; None: unchanged.
        """

    @abstractmethod
    def unstage(self) -> None:
        """Forget the pushes that are staged and not applied: they will be pushed again."""

    @abstractmethod
    def offer(self, push: PushId) -> Verdict:
        """
        Decide on a push and record it; the caller stages a `NEW` push.

        Raises:
            NotReadyError: no parameters yet.
            FencedError: the push is of another job, attempt or world.
            StaleError: older than the rank's last push.
            GapError: newer than the expected push.
        """

    @abstractmethod
    def commit(self, seq: int) -> bool:
        """
        Record the update of the staged pushes. False: it was already recorded; do not apply it
        again.

        Args:
            seq: of the push that completed the update.

        Raises:
            NotReadyError: no parameters yet.
            StaleError, GapError: another step is staged.
        """

    def passed(self, push: PushId) -> bool:
        """Return whether the update of a recorded push is done, with or without the push."""
        return True

    def missing(self) -> list[int]:
        """Return the ranks whose push is missing."""
        return []


class StepLedger(Ledger):
    """
    Counts steps: one update applies the pushes of all ranks.

    With `backup` workers, a step is complete without that many pushes. A worker whose push came too
    late continues with the newest version, so it may skip steps.
    """

    asynchronous = False

    def __init__(self, job: str, attempt: int, world: int, backup: int = 0) -> None:
        super().__init__(job, attempt, world)
        self._backup = backup
        self._last: dict[int, tuple[int, Verdict]] = {}  #: rank -> last push, answer to a repeat
        self._staged: set[int] = set()  #: ranks whose push for `version` has arrived

    @property
    @override
    def drops_late(self) -> bool:
        return self._backup > 0

    @property
    @override
    def complete(self) -> bool:
        """Whether enough pushes for the present version are staged."""
        return len(self._staged) >= self.world - self._backup

    @override
    def restore(self, steps: int) -> None:
        self.version = steps
        self._staged.clear()

    @override
    def renew(self, attempt: int, world: int | None = None) -> None:
        """Start a later attempt: all ranks push uncommitted gradients again."""
        self.attempt = attempt
        self.unstage()
        if world is not None and world != self.world:
            self.world = world
            self.dropped = {rank: count for rank, count in self.dropped.items() if rank < world}
            self._last = {rank: last for rank, last in self._last.items() if rank < world}

    @override
    def unstage(self) -> None:
        self._staged.clear()

    @override
    def offer(self, push: PushId) -> Verdict:
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

    def _late(self, push: PushId) -> Verdict:
        last, verdict = self._last.get(push.rank, (-1, Verdict.LATE))
        if push.seq < last:
            raise _out_of_turn(push, last)
        if push.seq > last:
            self.dropped[push.rank] = self.dropped.get(push.rank, 0) + 1
            self._last[push.rank] = push.seq, Verdict.LATE
            return Verdict.LATE
        return verdict

    @override
    def missing(self) -> list[int]:
        return [rank for rank in range(self.world) if rank not in self._staged]

    @override
    def commit(self, seq: int) -> bool:
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

    @override
    def passed(self, push: PushId) -> bool:
        return self.updates > push.seq


class TaskLedger(Ledger):
    """Counts tasks: any rank may push, a push is an update, and a task's first push counts."""

    asynchronous = True

    def __init__(self, job: str, attempt: int, world: int) -> None:
        super().__init__(job, attempt, world)
        self.applied = IntervalSet()  #: tasks whose gradients are applied
        self._next: dict[int, int] = {}  #: rank -> number of its next push
        self._staged: int | None = None  #: the task of the staged push

    @property
    @override
    def steps(self) -> int:
        return self.applied.low // self.world

    @property
    @override
    def complete(self) -> bool:
        return self._staged is not None

    @property
    def partial(self) -> bool:
        """Whether a step is applied in part."""
        return bool(self.applied.low % self.world or self.applied.above)

    @override
    def restore(self, steps: int) -> None:
        self.version, self.applied = steps * self.world, IntervalSet(steps * self.world)
        self._staged = None

    @override
    def renew(self, attempt: int, world: int | None = None) -> None:
        """Start a later attempt: ranks number pushes from 0; applied tasks stay applied."""
        self.attempt, self._staged = attempt, None
        self._next.clear()
        if world is not None and world != self.world:
            assert not self.partial, "a step that is applied in part cannot be split differently"
            steps, self.world = self.steps, world
            self.restore(steps)

    @override
    def unstage(self) -> None:
        self._staged = None

    @override
    def offer(self, push: PushId) -> Verdict:
        """See `Ledger.offer`. A gap is accepted: a backup does not receive dropped pushes."""
        _ready(self.version)
        _check_sender(push, self.job, self.attempt, push.rank + 1)
        if push.task is None:
            raise FencedError(f"push {push.seq} of rank {push.rank} refused: it names no task")
        expected = self._next.get(push.rank, 0)
        if push.seq == expected - 1:
            return Verdict.REPEAT_COMMITTED
        if push.seq < expected:
            raise _out_of_turn(push, expected)
        self._next[push.rank] = push.seq + 1
        if push.task in self.applied:
            self.dropped[push.rank] = self.dropped.get(push.rank, 0) + 1
            return Verdict.LATE
        self._staged = push.task
        return Verdict.NEW

    @override
    def commit(self, seq: int) -> bool:
        version = _ready(self.version)
        if self._staged is None:
            return False
        self.applied.add(self._staged)
        self.version, self._staged = version + 1, None
        return True


class LoopLedger(Ledger):
    """
    Counts pushes of train functions: a push is an update, and each rank numbers its own from 0.

        worker-0   0  1  2 |            with a bound of 2 the answer to push 2 waits for worker-1
        worker-1   |

    Ranks whose train function has returned are not waited for.
    """

    asynchronous = True

    def __init__(self, job: str, attempt: int, world: int, bound: int | None) -> None:
        super().__init__(job, attempt, world)
        self._bound = bound
        self._next = dict.fromkeys(range(world), 0)  #: rank -> number of its next push
        self._staged = False

    @property
    @override
    def complete(self) -> bool:
        return self._staged

    @override
    def restore(self, steps: int) -> None:
        self.version, self._staged = steps * self.world, False

    @override
    def renew(self, attempt: int, world: int | None = None) -> None:
        """Start an attempt. It has new servers, so there is nothing to keep."""
        self.attempt, self._staged = attempt, False

    @override
    def unstage(self) -> None:
        self._staged = False

    @override
    def offer(self, push: PushId) -> Verdict:
        _ready(self.version)
        _check_sender(push, self.job, self.attempt, self.world)
        expected = self._next[push.rank]
        if push.seq == expected - 1:
            return Verdict.REPEAT_COMMITTED
        if push.seq != expected:
            raise _out_of_turn(push, expected)
        self._next[push.rank] = push.seq + 1
        self._staged = True
        return Verdict.NEW

    @override
    def commit(self, seq: int) -> bool:
        version = _ready(self.version)
        if not self._staged:
            return False
        self.version, self._staged = version + 1, False
        return True

    @override
    def passed(self, push: PushId) -> bool:
        return self._bound is None or push.seq + 1 - self._min_steps <= self._bound

    @override
    def missing(self) -> list[int]:
        minimum = self._min_steps
        return [rank for rank, steps in self._active_steps.items() if steps == minimum]

    @property
    def _active_steps(self) -> dict[int, int]:
        return {r: steps for r, steps in self._next.items() if r not in self.finished_ranks}

    @property
    def _min_steps(self) -> int:
        return min(self._active_steps.values(), default=self.updates)


def _ready(version: int | None) -> int:
    if version is None:
        raise NotReadyError("this server has no parameters yet; it must be restored first")
    return version


def _check_sender(push: PushId, job: str, attempt: int, world: int) -> None:
    if (push.job, push.attempt) != (job, attempt):
        raise FencedError(
            f"push of job {push.job!r} attempt {push.attempt} refused: "
            f"this server serves {job!r} attempt {attempt}"
        )
    if not 0 <= push.rank < world:
        raise FencedError(f"push of rank {push.rank} refused: the world has {world}")


def _out_of_turn(push: PushId, expected: int) -> GapError | StaleError:
    cls = GapError if push.seq > expected else StaleError
    return cls(f"push {push.seq} of rank {push.rank} refused: expected {expected}")
