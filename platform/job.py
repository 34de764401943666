"""
The controller's state machine: events in, the run's state and decisions out.

    STARTING --all ranks stepped--> RUNNING --all ranks finished--> SUCCEEDED
        ^                              |
        |        a failure  -----------+
        |                              v
        |                          SETTLING --not to be repaired, or the budget is spent--> FAILED
        |                              |
        +-- `restart`: who was lost is replaced; the attempt's number grows by one

Where the number of ranks is to change all settle, too, though nothing failed: the next attempt
begins with as many as there are to be, and costs no budget. A failure on the way is one; the next
attempt has the new number all the same.

One failure brings others: a rank that raises leaves its peers in a collective that then breaks.
So a failure of the platform waits for a better explanation: until every rank is accounted for
(lost, or stopped and waiting for orders), or no more than `SETTLE_S` where the run will not go on.
A user's error waits for nothing; one before the first step for the other ranks, as long at most, to
be told once with the nodes that have it. The class reads no clock and talks to nobody: `now` comes
in, decisions go out.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import Enum

from distplat.platform.diverged_loops import LoopState, LoopTracker
from distplat.platform.errors import (
    Abandoned,
    ActorLost,
    DeadlineExceeded,
    DistplatError,
    RestartsExhausted,
    SpecError,
    StateLost,
    UserCodeError,
)
from distplat.platform.recovery import (
    COORDINATORS,
    Budget,
    Policy,
    Restart,
    error_priority,
    is_recoverable,
)
from distplat.platform.setup_errors import SetupErrors
from distplat.platform.spec import Failure
from distplat.platform.stop_order import StopOrder

STALL_GRACE = 1.25
"""A stalled rank is given this much more than `step_timeout_s`: its peers' own time-outs inside
the exchange come first and know more."""


class RankProgress:
    """Track the progress count of each rank, and when it last increased."""

    def __init__(self, ranks: Iterable[int], now: float) -> None:
        self._count = dict.fromkeys(ranks, 0)  #: 0: it has just joined
        self._moved_at = dict.fromkeys(self._count, now)

    def join(self, rank: int, now: float) -> None:
        """There is one more."""
        self._count[rank], self._moved_at[rank] = 0, now

    def leave(self, rank: int) -> None:
        """It is no more."""
        self._count.pop(rank, None)
        self._moved_at.pop(rank, None)

    def observe(self, rank: int, count: int, now: float) -> None:
        """A rank tells its beats; it has moved if they are more than before."""
        if count > self._count[rank]:
            self._count[rank], self._moved_at[rank] = count, now

    @property
    def still(self) -> list[int]:
        """Ranks that have not yet moved."""
        return [rank for rank, count in self._count.items() if not count]

    def stalled(self, working: Iterable[int], now: float, limits: Failure) -> tuple[int, ...]:
        """Return the ranks in `working` without progress for longer than their timeout."""
        step_s, start_s = limits.step_timeout_s, max(limits.step_timeout_s, limits.start_timeout_s)
        patience_s = {rank: step_s if self._count[rank] else start_s for rank in working}
        return tuple(
            rank
            for rank, seconds in patience_s.items()
            if now - self._moved_at[rank] > seconds * STALL_GRACE
        )


def unresponsive(role: str, seconds: float, step: int | None) -> ActorLost:
    """Tell of a role that does not answer."""
    cause = f"it has not answered for {seconds:.0f} s (frozen or cut off)"
    return ActorLost(role, step, cause, "`failure.heartbeat_timeout_s` changes this deadline")


def rank_of(role: str) -> int | None:
    """Give the rank of a worker's role; None for servers and their manager."""
    kind, _, number = role.partition("-")
    return int(number) if kind == "worker" and number.isdigit() else None


@dataclass(frozen=True)
class PollAnswered:
    """An answer of a rank. `progress` counts its beats: it grows while the rank is at work."""

    rank: int
    progress: int
    step: int
    """Steps done."""
    finished: bool
    prepared: bool = False
    """It has made its model and data."""
    node: str = ""
    """Where it is, for people to read; empty: not known."""
    loop: LoopState = field(default_factory=LoopState)
    """Where the loop of a train function is."""


@dataclass(frozen=True)
class Failed:
    """A rank or a part of the server group reported an error, or was found dead."""

    role: str
    error: DistplatError
    dead: bool = False
    """Its process is no more; else it waits for orders."""
    preempted: bool = False
    """Its machine was taken away."""
    prepared: bool = True
    """Before, it had made its model and data; of a worker."""
    node: str = ""
    """See `PollAnswered.node`."""
    traceback: str = ""
    """The user's frames; of a train function."""


@dataclass(frozen=True)
class PollUnanswered:
    """A role has not answered for `seconds`."""

    role: str
    seconds: float


@dataclass(frozen=True)
class Joined:
    """A worker was asked for while the run goes on; it is starting."""

    rank: int


@dataclass(frozen=True)
class Left:
    """A worker has finished what it had, and was ended as it was told."""

    rank: int


@dataclass(frozen=True)
class Resize:
    """The run is to have this number of workers; those that join are ready to begin."""

    world: int


@dataclass(frozen=True)
class End:
    """The run is to end before its last step, all ranks after the same one."""

    saves: bool = False
    """With a checkpoint of it: the run was asked to stop."""


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Event = PollAnswered | Failed | PollUnanswered | Joined | Left | Resize | End | Tick


SETTLE_S = 2.0
"""How long a broken peer may take to say why; a death is seen by polling, well within it."""


class Phase(Enum):
    """Where a run stands."""

    STARTING = "starting"
    RUNNING = "running"
    SETTLING = "settling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class JobState:
    """
    State of one run.

    Args:
        world: number of ranks.
        limits: the deadlines of the job.
        now: seconds on any clock that never goes back.
        policy: whether and how a failed run goes on.
        step: of the checkpoint that it begins from; 0: it begins from none.
    """

    def __init__(
        self,
        world: int,
        limits: Failure,
        now: float,
        policy: Policy | None = None,
        *,
        step: int = 0,
    ) -> None:
        self.phase = Phase.STARTING
        self.attempt = 0
        self.error: DistplatError | None = None  #: the best explanation so far
        self.restart: Restart | None = None  #: to be carried out, then `restarted` called
        self.ending = StopOrder.NONE  #: how it is to end before its last step, if it is
        self._world, self._limits = world, limits
        self._members = set(range(world))
        self._policy = policy or Policy()
        self._budget = Budget(self._policy)
        self._steps = dict.fromkeys(range(world), step)
        self._restoring = step > 0  #: a checkpoint, and not all ranks are at work since
        self._begin(now)

    def _begin(self, now: float) -> None:
        self.phase, self.error, self.restart = Phase.STARTING, None, None
        self._started_at = now
        self._failed_at = 0.0
        self._beats = RankProgress(self._members, now)
        self._finished: set[int] = set()
        self._dead: set[str] = set()  #: roles whose process is no more, or will be ended
        self._waiting: set[int] = set()  #: ranks that stopped and wait for orders
        self._preempted = False
        self._state_lost = False
        self._wanted: int | None = None  #: ranks that there are to be in the next attempt
        self._loops = LoopTracker()
        self._setup = SetupErrors()

    @property
    def over(self) -> bool:
        """Whether nothing more can happen."""
        return self.phase in (Phase.SUCCEEDED, Phase.FAILED)

    @property
    def can_recover(self) -> bool:
        """Whether a failure of the kind seen so far can be repaired by this policy."""
        if self._resizing:
            return True
        allowed = self._policy.max_failures or (self._preempted and self._policy.max_preemptions)
        kept = self._policy.allows_restart_from_scratch or not self._servers_lost
        return bool(allowed) and kept and (self.error is None or is_recoverable(self.error))

    @property
    def _resizing(self) -> bool:
        """Whether all stop for no other reason than that there are to be more or fewer."""
        return self._wanted is not None and self.error is None

    @property
    def stop_order(self) -> StopOrder:
        """What all workers are to be told about this attempt."""
        if self.phase is Phase.SETTLING:
            return StopOrder.RESIZE if self._resizing else StopOrder.ABANDON
        return self.ending if self.phase is Phase.RUNNING else StopOrder.NONE

    @property
    def resize_in_progress(self) -> bool:
        """Whether a rank has stopped for a resize."""
        return self._wanted is not None and bool(self._waiting)

    @property
    def _servers_lost(self) -> bool:
        return any(rank_of(role) is None for role in self._dead - COORDINATORS)

    @property
    def steps_done(self) -> int:
        """Steps that every rank has done."""
        return min(self._steps.values())

    @property
    def max_step(self) -> int:
        """Steps that the foremost rank has done: where survivors go on."""
        return max(self._steps.values())

    def handle(self, event: Event, now: float) -> None:
        """Take one event."""
        if self.over or self.restart is not None:
            return
        match event:
            case PollAnswered():
                self._on_answer(event, now)
            case Failed():
                self._take_failure(event, now)
            case PollUnanswered(role=role, seconds=seconds):
                self._miss(role, seconds, now)
            case Joined(rank=rank):
                self._members.add(rank)
                self._steps[rank] = self.steps_done
                self._beats.join(rank, now)
            case Left(rank=rank):
                self._part_with(rank)
            case Resize(world=world):
                self._resize(world, now)
            case End(saves=saves):
                self.ending = max(self.ending, StopOrder.SAVE if saves else StopOrder.END)
            case Tick():
                self._watch(now)

    def restarted(self, now: float, step: int = 0) -> None:
        """Called when `restart` is carried out; `step`: done before, where all was made anew."""
        assert self.restart is not None, "only after a restart was decided"
        self.attempt = self.restart.attempt
        if self.restart.restarts_all:
            self._world = self.restart.world or self._world
            self._members = set(range(self._world))  # made anew as at the start
            self._steps, self._restoring = dict.fromkeys(self._members, step), step > 0
        elif self.restart.world is not None:
            self._world, max_step = self.restart.world, self.max_step
            self._members = set(range(self._world))
            self._steps = {rank: self._steps.get(rank, max_step) for rank in self._members}
        if self.restart.world is not None:  # ranks that have all of the model each
            self._policy = replace(self._policy, holders=())
        self._begin(now)

    def checkpoint_saved(self, step: int) -> None:
        """Called when a checkpoint of a train function has come to the disk."""
        self._budget.checkpoint_saved(step)

    def _resize(self, world: int, now: float) -> None:
        """Stop all workers for a resize; a failure and the end of the run come first."""
        if self.phase is Phase.RUNNING and not self._finished and not self.ending:
            self.phase, self._failed_at, self._wanted = Phase.SETTLING, now, world

    def _part_with(self, rank: int) -> None:
        self._members.discard(rank)
        self._finished.discard(rank)
        self._steps.pop(rank, None)
        self._beats.leave(rank)
        self._end_if_finished()

    def _end_if_finished(self) -> None:
        failed = self.phase is Phase.SETTLING and not self._resizing
        if not failed and self._finished == self._members:
            self.phase = Phase.SUCCEEDED

    def _on_answer(self, answer: PollAnswered, now: float) -> None:
        if answer.rank not in self._members:
            return  # it has left
        self._beats.observe(answer.rank, answer.progress, now)
        self._steps[answer.rank] = max(answer.step, self._steps[answer.rank])
        if answer.prepared:
            self._setup.made(answer.rank, answer.node)
        if answer.finished:
            self._finished.add(answer.rank)
        self._loops.observe(answer.rank, answer.loop)
        if self.phase is Phase.STARTING and not self._beats.still:
            self.phase, self._restoring = Phase.RUNNING, False
        self._end_if_finished()

    def _take_failure(self, failed: Failed, now: float) -> None:
        if failed.dead:
            self._dead.add(failed.role)
        elif (rank := rank_of(failed.role)) is not None:
            self._waiting.add(rank)
            self._loops.end(rank, failed.error, failed.traceback)
            if not failed.prepared and isinstance(failed.error, UserCodeError | SpecError):
                self._setup.failed(rank, failed.node, failed.error)
        if self._resizing and isinstance(failed.error, Abandoned):
            return  # as it was told
        if isinstance(failed.error, ActorLost) and rank_of(failed.error.role) is None:
            self._dead.add(failed.error.role)  # a server, whoever noticed it first
        self._preempted |= failed.preempted
        self._state_lost |= isinstance(failed.error, StateLost)
        self._fail(failed.error, now)

    def _miss(self, role: str, seconds: float, now: float) -> None:
        failed = self.phase is Phase.SETTLING and not self._resizing
        if failed and self.can_recover and seconds > SETTLE_S:
            self._dead.add(role)
        elif seconds > self._limits.heartbeat_timeout_s:
            self._dead.add(role)
            self._fail(unresponsive(role, seconds, self.steps_done or None), now)

    def _fail(self, error: DistplatError, now: float) -> None:
        if self.error is None:
            self.phase, self._failed_at = Phase.SETTLING, now
        if self.error is None or error_priority(error) > error_priority(self.error):
            self.error = error
        if isinstance(self.error, UserCodeError):
            self._give_up(now)

    def _watch(self, now: float) -> None:
        if self.phase is Phase.SETTLING:
            self._settle(now)
        elif self.phase is Phase.STARTING:
            self._watch_start(now)
        else:
            self._watch_steps(now)

    def _settle(self, now: float) -> None:
        waited_s = now - self._failed_at
        if not self.can_recover:
            self._give_up(now)
            return
        known = self._waiting | self._finished | {rank_of(role) for role in self._dead}
        step_s = self._limits.step_timeout_s * STALL_GRACE
        patience_s = step_s if self._policy.survives_worker_loss else SETTLE_S
        if self._resizing and not known >= self._members:
            self._watch_steps(now)  # who evaluates, or makes the last step, is at work
        elif known >= self._members or waited_s >= patience_s:
            self._decide()

    def _give_up(self, now: float) -> None:
        """End, unless there may soon be a better explanation, or more ranks that have this one."""
        assert self.error is not None, "something has failed"
        left = self._members - {rank_of(role) for role in self._dead}
        if self._setup.has(self.error):
            waits = self._setup.waits_for(left)
        else:
            waits = not isinstance(self.error, UserCodeError)
        if not waits or now - self._failed_at >= SETTLE_S:
            error = self._setup.with_ranks(self.error, self._members)
            self.phase, self.error = Phase.FAILED, self._parted() or error

    def _parted(self) -> UserCodeError | None:
        """Say that ranks have left the others in their loops, and none was lost."""
        if self.error is None or self._dead or error_priority(self.error) > 1:
            return None
        return self._loops.divergence_error(self._steps)

    def _decide(self) -> None:
        """Every rank is accounted for: go on, or give up."""
        if self.error is None:
            self.restart = Restart(self.attempt + 1, (), False, 0.0, world=self._wanted)
            return
        if (of_user := self._parted()) is not None:
            self.phase, self.error = Phase.FAILED, of_user
            return
        error = self.error
        answer = self._budget.spend(
            self.max_step,
            str(error),
            self._preempted,
            consequence=isinstance(error, StateLost),
            node=error.dead_node if isinstance(error, ActorLost) else "",
        )
        if isinstance(answer, str):
            self.error = RestartsExhausted(answer, tuple(self._budget.failures))
            self.phase = Phase.FAILED
            return
        ranks = sorted(self._members) if self._wanted is None else [*range(self._wanted)]
        gone = {rank_of(role) for role in self._dead}
        usable = {rank for rank in self._waiting | self._finished if rank not in gone}
        # Who has the checkpoint's model may not have its optimizer, nor servers their part of it.
        kept = self._policy.survives_worker_loss and not self._state_lost and not self._restoring
        everything = self._servers_lost or not self._policy.has_all(usable) or not kept
        renew = tuple(rank for rank in ranks if everything or rank in self._members - usable)
        lost = () if everything else tuple(sorted(self._dead & COORDINATORS))
        self.restart = Restart(self.attempt + 1, renew, everything, answer, lost, self._wanted)

    def _watch_start(self, now: float) -> None:
        limit = self._limits.start_timeout_s
        if now - self._started_at > limit:
            late = tuple(f"worker-{rank}" for rank in self._beats.still)
            self._fail(DeadlineExceeded("start", late, limit, "failure.start_timeout_s"), now)

    def _watch_steps(self, now: float) -> None:
        working = self._members - self._finished - self._waiting - self._loops.returned
        if late := self._beats.stalled(working, now, self._limits):
            self._stall(late, now)

    def _stall(self, ranks: Iterable[int], now: float) -> None:
        """Ranks were waited for too long: they are as good as lost."""
        if (of_user := self._loops.stalled(ranks, self._steps)) is not None:
            self._fail(of_user, now)
            return
        what = f"step {self.steps_done + 1}"
        late = tuple(f"worker-{rank}" for rank in sorted(ranks))
        self._dead.update(late)
        limit = self._limits.step_timeout_s
        self._fail(DeadlineExceeded(what, late, limit, "failure.step_timeout_s"), now)
