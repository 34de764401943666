"""
The controller's state machine: takes events, keeps the job's state, and decides on restarts.

    STARTING --all ranks stepped--> RUNNING --all ranks finished--> SUCCEEDED
        ^                              |
        |        a failure  -----------+
        |                              v
        |                          SETTLING --not recoverable, or budget exhausted--> FAILED
        |                              |
        +-- `restart`: lost processes are replaced; the attempt's number grows by one

A resize also goes through SETTLING, although nothing failed: the next attempt starts with the new
number of ranks, and costs no budget. A failure during a resize counts as a failure; the next
attempt has the new number of ranks nevertheless.

One failure causes others: a rank that raises leaves its peers in a collective that then breaks. So
a platform failure is not final until every rank is accounted for (lost, or stopped and waiting for
orders), or until `SETTLE_S` has passed where the job will not restart. A user's error ends the job
at once. A user's error before the first step waits up to `SETTLE_S` for the other ranks, so that
one error can name all nodes that have it.

The classes read no clock and do no I/O: callers pass `now` and carry out the decisions.
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
"""Factor on `step_timeout_s` before a rank counts as stalled: the timeouts of its peers inside the
exchange expire first, and their errors are more precise."""


class RankProgress:
    """Track the progress count of each rank, and when it last increased."""

    def __init__(self, ranks: Iterable[int], now: float) -> None:
        self._count = dict.fromkeys(ranks, 0)  #: 0: no progress yet
        self._moved_at = dict.fromkeys(self._count, now)

    def join(self, rank: int, now: float) -> None:
        """Add a rank."""
        self._count[rank], self._moved_at[rank] = 0, now

    def leave(self, rank: int) -> None:
        """Remove a rank."""
        self._count.pop(rank, None)
        self._moved_at.pop(rank, None)

    def observe(self, rank: int, count: int, now: float) -> None:
        """Record a rank's progress count."""
        if count > self._count[rank]:
            self._count[rank], self._moved_at[rank] = count, now

    @property
    def without_progress(self) -> list[int]:
        """Ranks without any progress yet."""
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


def unresponsive_error(role: str, seconds: float, step: int | None) -> ActorLost:
    """Build the error for a role that does not answer."""
    cause = f"it has not answered for {seconds:.0f} s (frozen or cut off)"
    return ActorLost(role, step, cause, "`failure.heartbeat_timeout_s` changes this deadline")


def rank_of(role: str) -> int | None:
    """Return the rank of a worker's role, or None for servers and coordinators."""
    kind, _, number = role.partition("-")
    return int(number) if kind == "worker" and number.isdigit() else None


@dataclass(frozen=True)
class PollAnswered:
    """A rank's answer to a poll. `progress` is a counter that grows while the rank works."""

    rank: int
    progress: int
    step: int
    """Steps done."""
    finished: bool
    prepared: bool = False
    """Whether the rank has built its model and data."""
    node: str = ""
    """Node of the rank, for messages; empty: unknown."""
    loop: LoopState = field(default_factory=LoopState)
    """State of a train function's loop."""


@dataclass(frozen=True)
class Failed:
    """A worker or a part of the server group reported an error, or was found dead."""

    role: str
    error: DistplatError
    dead: bool = False
    """Whether the process has ended; else it waits for orders."""
    preempted: bool = False
    """Whether its machine was preempted."""
    prepared: bool = True
    """Whether the worker had built its model and data before the failure."""
    node: str = ""
    """See `PollAnswered.node`."""
    traceback: str = ""
    """The user's frames, for a train function."""


@dataclass(frozen=True)
class PollUnanswered:
    """A role has not answered polls for `seconds`."""

    role: str
    seconds: float


@dataclass(frozen=True)
class Joined:
    """A worker was added to the running job; it is starting."""

    rank: int


@dataclass(frozen=True)
class Left:
    """A worker was removed on request, after it finished its tasks."""

    rank: int


@dataclass(frozen=True)
class Resize:
    """Change the number of workers to `world`; new workers are ready to start."""

    world: int


@dataclass(frozen=True)
class End:
    """End the job before its last step, all ranks after the same step."""

    saves: bool = False
    """Whether to save a checkpoint of that step: the job was asked to stop."""


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Event = PollAnswered | Failed | PollUnanswered | Joined | Left | Resize | End | Tick


SETTLE_S = 2.0
"""How long to wait for an error that explains a failure better; polling detects a death well within
this time."""


class Phase(Enum):
    """Phase of a job."""

    STARTING = "starting"
    RUNNING = "running"
    SETTLING = "settling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class JobState:
    """
    State of one job.

    Args:
        world: number of ranks.
        limits: the job's deadlines.
        now: seconds of any monotonic clock.
        policy: which failures the job recovers from.
        step: step of the checkpoint that the job starts from; 0: none.
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
        self.error: DistplatError | None = None  #: the error that explains the failure best
        self.restart: Restart | None = None  #: the caller carries it out, then calls `restarted`
        self.requested_stop = StopOrder.NONE  #: whether to end before the last step, and how
        self._world, self._limits = world, limits
        self._members = set(range(world))
        self._policy = policy or Policy()
        self._budget = Budget(self._policy)
        self._steps = dict.fromkeys(range(world), step)
        self._restoring = step > 0  #: started from a checkpoint, and not all ranks have stepped
        self._start_attempt(now)

    def _start_attempt(self, now: float) -> None:
        self.phase, self.error, self.restart = Phase.STARTING, None, None
        self._started_at = now
        self._failed_at = 0.0
        self._progress = RankProgress(self._members, now)
        self._finished: set[int] = set()
        self._dead: set[str] = set()  #: roles whose process has ended, or will be killed
        self._waiting: set[int] = set()  #: ranks that have stopped and wait for orders
        self._preempted = False
        self._state_lost = False
        self._next_world: int | None = None  #: world of the next attempt
        self._loops = LoopTracker()
        self._setup = SetupErrors()

    @property
    def over(self) -> bool:
        """Whether the job has ended."""
        return self.phase in (Phase.SUCCEEDED, Phase.FAILED)

    @property
    def can_recover(self) -> bool:
        """Whether the policy allows a restart after the failures so far."""
        if self._resizing:
            return True
        if not self._policy.allows_restart_from_scratch and self._servers_lost:
            return False
        allowed = self._policy.max_failures or (self._preempted and self._policy.max_preemptions)
        return bool(allowed) and (self.error is None or is_recoverable(self.error))

    @property
    def _resizing(self) -> bool:
        """Whether ranks stop for a resize only, without a failure."""
        return self._next_world is not None and self.error is None

    @property
    def stop_order(self) -> StopOrder:
        """Stop order for all workers of this attempt."""
        if self.phase is Phase.SETTLING:
            return StopOrder.RESIZE if self._resizing else StopOrder.ABANDON
        return self.requested_stop if self.phase is Phase.RUNNING else StopOrder.NONE

    @property
    def resize_in_progress(self) -> bool:
        """Whether a rank has stopped for a resize."""
        return self._next_world is not None and bool(self._waiting)

    @property
    def _servers_lost(self) -> bool:
        return any(rank_of(role) is None for role in self._dead - COORDINATORS)

    @property
    def steps_done(self) -> int:
        """Steps that every rank has done."""
        return min(self._steps.values())

    @property
    def max_step(self) -> int:
        """Steps of the most advanced rank: survivors continue from here."""
        return max(self._steps.values())

    def handle(self, event: Event, now: float) -> None:
        """Process one event."""
        if self.over or self.restart is not None:
            return
        match event:
            case PollAnswered():
                self._on_answer(event, now)
            case Failed():
                self._on_failure(event, now)
            case PollUnanswered(role=role, seconds=seconds):
                self._on_unanswered(role, seconds, now)
            case Joined(rank=rank):
                self._members.add(rank)
                self._steps[rank] = self.steps_done
                self._progress.join(rank, now)
            case Left(rank=rank):
                self._remove_rank(rank)
            case Resize(world=world):
                self._resize(world, now)
            case End(saves=saves):
                self.requested_stop = max(
                    self.requested_stop, StopOrder.SAVE if saves else StopOrder.END
                )
            case Tick():
                self._on_tick(now)

    def restarted(self, now: float, step: int = 0) -> None:
        """Start the next attempt, once `restart` is carried out; `step`: of a loaded checkpoint."""
        assert self.restart is not None, "only after a restart was decided"
        self.attempt = self.restart.attempt
        if self.restart.restarts_all:
            self._world = self.restart.world or self._world
            self._members = set(range(self._world))  # all ranks are new
            self._steps, self._restoring = dict.fromkeys(self._members, step), step > 0
        elif self.restart.world is not None:
            self._world, max_step = self.restart.world, self.max_step
            self._members = set(range(self._world))
            self._steps = {rank: self._steps.get(rank, max_step) for rank in self._members}
        if self.restart.world is not None:  # after a resize every rank holds the whole model
            self._policy = replace(self._policy, holders=())
        self._start_attempt(now)

    def checkpoint_saved(self, step: int) -> None:
        """Record that a train function's checkpoint was written to disk."""
        self._budget.checkpoint_saved(step)

    def _resize(self, world: int, now: float) -> None:
        """Stop all workers for a resize; a failure and the end of the job take precedence."""
        if self.phase is Phase.RUNNING and not self._finished and not self.requested_stop:
            self.phase, self._failed_at, self._next_world = Phase.SETTLING, now, world

    def _remove_rank(self, rank: int) -> None:
        self._members.discard(rank)
        self._finished.discard(rank)
        self._steps.pop(rank, None)
        self._progress.leave(rank)
        self._succeed_if_finished()

    def _succeed_if_finished(self) -> None:
        failed = self.phase is Phase.SETTLING and not self._resizing
        if not failed and self._finished == self._members:
            self.phase = Phase.SUCCEEDED

    def _on_answer(self, answer: PollAnswered, now: float) -> None:
        if answer.rank not in self._members:
            return  # the rank was removed
        self._progress.observe(answer.rank, answer.progress, now)
        self._steps[answer.rank] = max(answer.step, self._steps[answer.rank])
        if answer.prepared:
            self._setup.setup_done(answer.rank, answer.node)
        if answer.finished:
            self._finished.add(answer.rank)
        self._loops.observe(answer.rank, answer.loop)
        if self.phase is Phase.STARTING and not self._progress.without_progress:
            self.phase, self._restoring = Phase.RUNNING, False
        self._succeed_if_finished()

    def _on_failure(self, failed: Failed, now: float) -> None:
        if failed.dead:
            self._dead.add(failed.role)
        elif (rank := rank_of(failed.role)) is not None:
            self._waiting.add(rank)
            self._loops.end(rank, failed.error, failed.traceback)
            if not failed.prepared and isinstance(failed.error, UserCodeError | SpecError):
                self._setup.failed(rank, failed.node, failed.error)
        if self._resizing and isinstance(failed.error, Abandoned):
            return  # stopped on request
        if isinstance(failed.error, ActorLost) and rank_of(failed.error.role) is None:
            self._dead.add(failed.error.role)  # a server, reported by another role
        self._preempted |= failed.preempted
        self._state_lost |= isinstance(failed.error, StateLost)
        self._fail(failed.error, now)

    def _on_unanswered(self, role: str, seconds: float, now: float) -> None:
        failed = self.phase is Phase.SETTLING and not self._resizing
        if failed and self.can_recover and seconds > SETTLE_S:
            self._dead.add(role)
        elif seconds > self._limits.heartbeat_timeout_s:
            self._dead.add(role)
            self._fail(unresponsive_error(role, seconds, self.steps_done or None), now)

    def _fail(self, error: DistplatError, now: float) -> None:
        if self.error is None:
            self.phase, self._failed_at = Phase.SETTLING, now
        if self.error is None or error_priority(error) > error_priority(self.error):
            self.error = error
        if isinstance(self.error, UserCodeError):
            self._fail_job(now)

    def _on_tick(self, now: float) -> None:
        if self.phase is Phase.SETTLING:
            self._settle(now)
        elif self.phase is Phase.STARTING:
            self._check_start(now)
        else:
            self._check_steps(now)

    def _settle(self, now: float) -> None:
        waited_s = now - self._failed_at
        if not self.can_recover:
            self._fail_job(now)
            return
        accounted_for = self._waiting | self._finished | {rank_of(role) for role in self._dead}
        step_s = self._limits.step_timeout_s * STALL_GRACE
        patience_s = step_s if self._policy.survives_worker_loss else SETTLE_S
        if self._resizing and not accounted_for >= self._members:
            self._check_steps(now)  # ranks may still evaluate or finish their last step
        elif accounted_for >= self._members or waited_s >= patience_s:
            self._restart_or_fail()

    def _fail_job(self, now: float) -> None:
        """Fail the job, unless a better explanation or other ranks with this error may follow."""
        assert self.error is not None, "only after a failure"
        alive = self._members - {rank_of(role) for role in self._dead}
        if self._setup.has(self.error):
            waits = self._setup.waits_for(alive)
        else:
            waits = not isinstance(self.error, UserCodeError)
        if not waits or now - self._failed_at >= SETTLE_S:
            error = self._setup.with_ranks(self.error, self._members)
            self.phase, self.error = Phase.FAILED, self._divergence_error() or error

    def _divergence_error(self) -> UserCodeError | None:
        """Return the user's error if the ranks' loops diverged and no rank was lost, else None."""
        if self.error is None or self._dead or error_priority(self.error) > 1:
            return None
        return self._loops.divergence_error(self._steps)

    def _restart_or_fail(self) -> None:
        """Restart or fail, once every rank is accounted for."""
        if self.error is None:
            self.restart = Restart(self.attempt + 1, (), False, 0.0, world=self._next_world)
            return
        if (divergence := self._divergence_error()) is not None:
            self.phase, self.error = Phase.FAILED, divergence
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
        ranks = sorted(self._members) if self._next_world is None else [*range(self._next_world)]
        dead_ranks = {rank_of(role) for role in self._dead}
        survivors = {rank for rank in self._waiting | self._finished if rank not in dead_ranks}
        # While restoring, a rank may have the model but not yet its optimizer or server state.
        keep_state = self._policy.survives_worker_loss and not (self._state_lost or self._restoring)
        restart_all = self._servers_lost or not self._policy.has_all(survivors) or not keep_state
        replaced = tuple(rank for rank in ranks if restart_all or rank in self._members - survivors)
        lost = () if restart_all else tuple(sorted(self._dead & COORDINATORS))
        self.restart = Restart(
            self.attempt + 1, replaced, restart_all, answer, lost, self._next_world
        )

    def _check_start(self, now: float) -> None:
        limit = self._limits.start_timeout_s
        if now - self._started_at > limit:
            late_roles = tuple(f"worker-{rank}" for rank in self._progress.without_progress)
            self._fail(DeadlineExceeded("start", late_roles, limit, "failure.start_timeout_s"), now)

    def _check_steps(self, now: float) -> None:
        working = self._members - self._finished - self._waiting - self._loops.returned
        if late_roles := self._progress.stalled(working, now, self._limits):
            self._on_stalled(late_roles, now)

    def _on_stalled(self, ranks: Iterable[int], now: float) -> None:
        """Treat ranks without progress as lost."""
        if (divergence := self._loops.stalled(ranks, self._steps)) is not None:
            self._fail(divergence, now)
            return
        what = f"step {self.steps_done + 1}"
        late_roles = tuple(f"worker-{rank}" for rank in sorted(ranks))
        self._dead.update(late_roles)
        limit = self._limits.step_timeout_s
        self._fail(DeadlineExceeded(what, late_roles, limit, "failure.step_timeout_s"), now)
