"""
A server's ledger: which pushes it has, and which it must not take (invariants I1, I3, I6).

Servers of parameters and of embedding tables book alike; only how they count differs.

A synchronous server lives through the same three moments for every step. `version` counts the
updates it has applied, so it is also the sequence number of the pushes it waits for:

            push(seq=version)           all ranks staged            commit(seq=version)
    WAITING -----------------> STAGING ------------------> STAGED ---------------------> WAITING
                                                                                version += 1

Ray delivers a call at least once. What may arrive twice is answered as the first time; what would
lose a push or count one twice is refused. The memory is O(ranks), however long the run is.

An asynchronous server applies each push when it comes. Every worker's pushes are numbered for
themselves, and name the task that they are of; task p of step s of N parts is s * N + p:

    worker-0   0  1  2 |3|         push 2 again: the same answer      1: stale
    worker-1   0 |1|

Tasks are leased to whoever asks for them, so two workers may make the same one: one that was taken
for lost, and the one who got its lease. The first push of a task counts: what is pushed again
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
    Numbers from some first one on that are done.

        low = 5   above = {7, 8}        5 is the lowest that is missing; 6 is missing, too
    """

    low: int = 0
    """Everything below is done, and this one is not."""
    above: set[int] = field(default_factory=set)
    """What is done above it."""

    def add(self, number: int) -> bool:
        """Note one as done; False: it was done before."""
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
    """Names one push, once and for all; the server adds its own index."""

    job: str
    attempt: int
    """Generation of the job: grows at each recovery."""
    rank: int
    seq: int
    """Number of this worker's push, from 0; in synchronous strategies the step."""
    task: int | None = None
    """What it is of, where tasks are leased: then pushes are numbered from 0 in each attempt."""


@dataclass(frozen=True)
class PullId:
    """Names one pull: one that comes late, or again, must not write over newer values."""

    attempt: int
    rank: int
    number: int
    """Number of this pull among the worker's in the attempt, from 0."""


@dataclass(frozen=True)
class ServerReply:
    """What a server tells a worker: the answer to a push, a commit or a pull."""

    version: int
    """Updates that the values have behind them that the worker now has."""
    committed: bool = True
    """False: a commit must follow, with the norm over all shards."""
    squared_norm: float | None = None
    """Squared 2-norm of the summed gradient on this server; None: nobody needs it."""
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
    """Steps of which the server has every gradient."""
    total: tuple[float, ...] = ()
    """Head of the step's control record, summed over the ranks; empty: of no step."""
    payload: Any = None
    """How the values travel, where worker and server share no memory."""


class Verdict(Enum):
    """What a server does with a push that it does not refuse."""

    NEW = "stage it"
    REPEAT_STAGED = "it is staged already"
    REPEAT_COMMITTED = "its step is committed already"
    LATE = "its step was made without it: drop it"


class Ledger(ABC):
    """
    Book of one server. Starts unready: without parameters it takes nothing.

    Args:
        job: name of the run.
        attempt: the first one.
        world: workers whose pushes make up a step, or tasks of one.
    """

    asynchronous: ClassVar[bool]

    def __init__(self, job: str, attempt: int, world: int) -> None:
        self.job, self.attempt, self.world = job, attempt, world
        self.version: int | None = None  #: updates applied; None: no parameters yet
        self.dropped: dict[int, int] = {}  #: rank -> its pushes that came too late
        self.left: set[int] = set()  #: ranks whose train function is over: they push no more

    @property
    def updates(self) -> int:
        """Updates applied."""
        return self.version or 0

    @property
    def schedule_step(self) -> int:
        """Step of the learning rate's schedule for the next update: one for each worker's."""
        return self.updates // self.world if self.asynchronous else self.updates

    @property
    def steps(self) -> int:
        """Steps of which every gradient is applied."""
        return self.schedule_step

    @property
    def drops_late(self) -> bool:
        """Whether steps are made without ranks that are late."""
        return False

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether what is staged is to be applied."""

    @abstractmethod
    def restore(self, steps: int) -> None:
        """Open for pushes: the parameters are in place, with `steps` steps behind them."""

    @abstractmethod
    def renew(self, attempt: int, world: int | None = None) -> None:
        """
        Begin a later attempt: pushes of earlier ones are refused.

        Args:
            attempt: its number.
            world: so many ranks from now on; None: as many as before.
        """

    @abstractmethod
    def offer(self, push: PushId) -> Verdict:
        """
        Decide on a push and book it; `NEW` is to be staged.

        Raises:
            NotReadyError: no parameters yet.
            FencedError: another job or attempt, or no sender of this run.
            StaleError: older than the rank's last push.
            GapError: newer than the one expected.
        """

    @abstractmethod
    def commit(self, seq: int) -> bool:
        """
        Book the update of what is staged. False: it is booked already, and must not be made again.

        Args:
            seq: of the push that has completed it.

        Raises:
            NotReadyError: no parameters yet.
            StaleError, GapError: not the step that is staged.
        """

    def passed(self, push: PushId) -> bool:
        """Whether the update is made that a booked push is part of, or was made without it."""
        return True

    def missing(self) -> list[int]:
        """Ranks whose push is waited for."""
        return []


class StepLedger(Ledger):
    """
    Counts steps: one update of all ranks' pushes.

    With `backup` workers a step is complete without so many of the pushes. A worker whose push
    came too late goes on with the newest version, so it may leave steps out.
    """

    asynchronous = False

    def __init__(self, job: str, attempt: int, world: int, backup: int = 0) -> None:
        super().__init__(job, attempt, world)
        self._backup = backup
        self._last: dict[int, tuple[int, Verdict]] = {}  #: rank -> its last push, told again how
        self._staged: set[int] = set()  #: ranks whose push for `version` is here

    @property
    @override
    def drops_late(self) -> bool:
        return self._backup > 0

    @property
    def complete(self) -> bool:
        """Whether as many pushes for the present version are staged as a step needs."""
        return len(self._staged) >= self.world - self._backup

    @override
    def restore(self, steps: int) -> None:
        self.version = steps
        self._staged.clear()

    @override
    def renew(self, attempt: int, world: int | None = None) -> None:
        """All push what is not committed once more."""
        self.attempt = attempt
        self._staged.clear()
        if world is not None and world != self.world:
            self.world = world
            self.dropped = {rank: count for rank, count in self.dropped.items() if rank < world}
            self._last = {rank: last for rank, last in self._last.items() if rank < world}

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
    """Counts tasks: any rank may push, each push is an update, and of a task the first counts."""

    asynchronous = True

    def __init__(self, job: str, attempt: int, world: int) -> None:
        super().__init__(job, attempt, world)
        self.made = IntervalSet()  #: tasks that are in the parameters
        self._next: dict[int, int] = {}  #: rank -> number of the push that is its turn
        self._staged: int | None = None  #: the task whose update is to be made

    @property
    @override
    def steps(self) -> int:
        return self.made.low // self.world

    @property
    @override
    def complete(self) -> bool:
        return self._staged is not None

    @property
    def partial(self) -> bool:
        """Whether some step is made in part."""
        return bool(self.made.low % self.world or self.made.above)

    @override
    def restore(self, steps: int) -> None:
        self.version, self.made = steps * self.world, IntervalSet(steps * self.world)
        self._staged = None

    @override
    def renew(self, attempt: int, world: int | None = None) -> None:
        """Each rank's pushes begin at 0, and what is made stays."""
        self.attempt, self._staged = attempt, None
        self._next.clear()
        if world is not None and world != self.world:
            assert not self.partial, "the parts of a step that is made in part cannot be cut anew"
            steps, self.world = self.steps, world
            self.restore(steps)

    @override
    def offer(self, push: PushId) -> Verdict:
        """A gap is not refused: a backup was not told of a push that was dropped."""
        _ready(self.version)
        _check_sender(push, self.job, self.attempt, push.rank + 1)
        if push.task is None:
            raise FencedError(f"push {push.seq} of rank {push.rank} refused: it is of no task")
        expected = self._next.get(push.rank, 0)
        if push.seq == expected - 1:
            return Verdict.REPEAT_COMMITTED
        if push.seq < expected:
            raise _out_of_turn(push, expected)
        self._next[push.rank] = push.seq + 1
        if push.task in self.made:
            self.dropped[push.rank] = self.dropped.get(push.rank, 0) + 1
            return Verdict.LATE
        self._staged = push.task
        return Verdict.NEW

    @override
    def commit(self, seq: int) -> bool:
        version = _ready(self.version)
        if self._staged is None:
            return False
        self.made.add(self._staged)
        self.version, self._staged = version + 1, None
        return True


class LoopLedger(Ledger):
    """
    Counts the pushes of train functions: each is an update, and each rank's are numbered from 0.

        worker-0   0  1  2 |            with a bound of 2 the answer to push 2 waits for worker-1
        worker-1   |

    A rank whose loop is over is waited for no more.
    """

    asynchronous = True

    def __init__(self, job: str, attempt: int, world: int, bound: int | None) -> None:
        super().__init__(job, attempt, world)
        self._bound = bound
        self._next = dict.fromkeys(range(world), 0)  #: rank -> number of the push that is its turn
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
        """See `Ledger`; such an attempt has servers of its own, so nothing is there yet."""
        self.attempt, self._staged = attempt, False

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
        return self._bound is None or push.seq + 1 - self._slowest <= self._bound

    @override
    def missing(self) -> list[int]:
        least = self._slowest
        return [rank for rank, steps in self._at_work.items() if steps == least]

    @property
    def _at_work(self) -> dict[int, int]:
        return {rank: steps for rank, steps in self._next.items() if rank not in self.left}

    @property
    def _slowest(self) -> int:
        return min(self._at_work.values(), default=self.updates)


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
    kind = GapError if push.seq > expected else StaleError
    return kind(f"push {push.seq} of rank {push.rank} refused: expected {expected}")
