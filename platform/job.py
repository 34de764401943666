"""
The controller's brain: what the state of a run makes of each piece of news.

    STARTING --all ranks stepped--> RUNNING --all ranks finished--> SUCCEEDED
        ^                              |
        |        a failure  -----------+
        |                              v
        |                          SETTLING --not to be repaired, or the budget is spent--> FAILED
        |                              |
        +-- `restart`: who was lost is replaced; the attempt's number grows by one

One failure brings others: a rank that raises leaves its peers in a collective that then breaks.
So a failure of the platform waits for a better explanation: until every rank is accounted for
(lost, or stopped and waiting for orders), or no more than `SETTLE_S` where the run will not go on.
A user's error waits for nothing. The class reads no clock and talks to nobody: `now` comes in,
decisions go out.
"""

from enum import Enum

from distplat.platform.blame import repairable, weight
from distplat.platform.errors import (
    ActorLost,
    DeadlineExceeded,
    DistplatError,
    RestartsExhausted,
    StateLost,
    UserCodeError,
)
from distplat.platform.job_events import Event, Failed, Heard, Joined, Left, Tick, Unanswered
from distplat.platform.recovery import COORDINATORS, Budget, Policy, Restart
from distplat.platform.spec import Failure

SETTLE_S = 2.0
"""How long a broken peer may take to say why; a death is seen by polling, well within it."""
STALL_GRACE = 1.25
"""A stalled rank is given this much more than `step_timeout_s`: its peers' own time-outs inside
the exchange come first and know more."""


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
    """

    def __init__(self, world: int, limits: Failure, now: float, policy: Policy | None = None):
        self.phase = Phase.STARTING
        self.attempt = 0
        self.error: DistplatError | None = None  #: the best explanation so far
        self.restart: Restart | None = None  #: to be carried out, then `restarted` called
        self._world, self._limits = world, limits
        self._members = set(range(world))
        self._policy = policy or Policy()
        self._budget = Budget(self._policy)
        self._steps = dict.fromkeys(range(world), 0)
        self._begin(now)

    def _begin(self, now: float) -> None:
        self.phase, self.error, self.restart = Phase.STARTING, None, None
        self._started_at = now
        self._failed_at = 0.0
        self._progress = dict.fromkeys(self._members, 0)
        self._moved_at = dict.fromkeys(self._members, now)  #: when `progress` last grew
        self._finished: set[int] = set()
        self._gone: set[str] = set()  #: roles whose process is no more, or will be ended
        self._waiting: set[int] = set()  #: ranks that stopped and wait for orders
        self._preempted = False
        self._state_lost = False

    @property
    def over(self) -> bool:
        """Whether nothing more can happen."""
        return self.phase in (Phase.SUCCEEDED, Phase.FAILED)

    @property
    def may_go_on(self) -> bool:
        """Whether a failure of the kind seen so far can be repaired by this policy."""
        allowed = self._policy.max_failures > 0 or (
            self._preempted and self._policy.max_preemptions > 0
        )
        kept = self._policy.begin_anew or not self._servers_lost
        return allowed and kept and (self.error is None or repairable(self.error))

    @property
    def _servers_lost(self) -> bool:
        return any(_rank_of(role) is None for role in self._gone - COORDINATORS)

    @property
    def steps_done(self) -> int:
        """Steps that every rank has done."""
        return min(self._steps.values())

    @property
    def furthest(self) -> int:
        """Steps that the foremost rank has done: where survivors go on."""
        return max(self._steps.values())

    def handle(self, event: Event, now: float) -> None:
        """Take one piece of news."""
        if self.over or self.restart is not None:
            return
        match event:
            case Heard():
                self._hear(event, now)
            case Failed():
                self._take_failure(event, now)
            case Unanswered(role=role, seconds=seconds):
                self._miss(role, seconds, now)
            case Joined(rank=rank):
                self._members.add(rank)
                self._steps[rank] = self.steps_done
                self._progress[rank], self._moved_at[rank] = 0, now
            case Left(rank=rank):
                self._part_with(rank)
            case Tick():
                self._watch(now)

    def restarted(self, now: float, step: int = 0) -> None:
        """
        Be told that `restart` was carried out: the next attempt begins.

        Args:
            now: seconds.
            step: steps that all have behind them, where everything was made anew.
        """
        assert self.restart is not None, "only after a restart was decided"
        self.attempt = self.restart.attempt
        if self.restart.everything:
            self._members = set(range(self._world))  # made anew as at the start
            self._steps = dict.fromkeys(self._members, step)
        self._begin(now)

    def _part_with(self, rank: int) -> None:
        self._members.discard(rank)
        self._finished.discard(rank)
        for figures in (self._steps, self._progress, self._moved_at):
            figures.pop(rank, None)
        self._end_if_finished()

    def _end_if_finished(self) -> None:
        if self.phase is not Phase.SETTLING and self._finished == self._members:
            self.phase = Phase.SUCCEEDED

    def _hear(self, heard: Heard, now: float) -> None:
        if heard.rank not in self._members:
            return  # it has left
        if heard.progress > self._progress[heard.rank]:
            self._progress[heard.rank] = heard.progress
            self._moved_at[heard.rank] = now
        self._steps[heard.rank] = max(heard.step, self._steps[heard.rank])
        if heard.finished:
            self._finished.add(heard.rank)
        if self.phase is Phase.STARTING and all(self._progress.values()):
            self.phase = Phase.RUNNING
        self._end_if_finished()

    def _take_failure(self, failed: Failed, now: float) -> None:
        if failed.gone:
            self._gone.add(failed.role)
        elif (rank := _rank_of(failed.role)) is not None:
            self._waiting.add(rank)
        if isinstance(failed.error, ActorLost) and _rank_of(failed.error.role) is None:
            self._gone.add(failed.error.role)  # a server, whoever noticed it first
        self._preempted |= failed.preempted
        self._state_lost |= isinstance(failed.error, StateLost)
        self._fail(failed.error, now)

    def _miss(self, role: str, seconds: float, now: float) -> None:
        if self.phase is Phase.SETTLING and self.may_go_on and seconds > SETTLE_S:
            self._gone.add(role)
        elif seconds > self._limits.heartbeat_timeout_s:
            self._gone.add(role)
            self._fail(_frozen(role, seconds, self.steps_done or None), now)

    def _fail(self, error: DistplatError, now: float) -> None:
        if self.error is None or weight(error) > weight(self.error):
            self.error = error
        if self.phase is not Phase.SETTLING:
            self.phase, self._failed_at = Phase.SETTLING, now
        if isinstance(self.error, UserCodeError):
            self.phase = Phase.FAILED

    def _watch(self, now: float) -> None:
        if self.phase is Phase.SETTLING:
            self._settle(now - self._failed_at)
        elif self.phase is Phase.STARTING:
            self._watch_start(now)
        elif self.phase is Phase.RUNNING:
            self._watch_steps(now)

    def _settle(self, waited_s: float) -> None:
        if not self.may_go_on:
            if waited_s >= SETTLE_S:
                self.phase = Phase.FAILED
            return
        known = (
            self._waiting | self._finished | {r for r in map(_rank_of, self._gone) if r is not None}
        )
        patience_s = self._limits.step_timeout_s * STALL_GRACE
        if not self._policy.survivors_go_on:
            patience_s = SETTLE_S
        if known >= self._members or waited_s >= patience_s:
            self._decide()

    def _decide(self) -> None:
        """Every rank is accounted for: go on, or give up."""
        assert self.error is not None, "a run settles only after a failure"
        answer = self._budget.spend(self.furthest, str(self.error), self._preempted)
        if isinstance(answer, str):
            self.error = RestartsExhausted(answer, tuple(self._budget.setbacks))
            self.phase = Phase.FAILED
            return
        ranks = sorted(self._members)
        gone = {_rank_of(role) for role in self._gone}
        usable = {rank for rank in self._waiting | self._finished if rank not in gone}
        kept = self._policy.survivors_go_on and not self._state_lost
        everything = self._servers_lost or not self._policy.has_all(usable) or not kept
        replace = tuple(r for r in ranks if everything or r not in usable)
        lost = () if everything else tuple(sorted(self._gone & COORDINATORS))
        self.restart = Restart(self.attempt + 1, replace, everything, answer, lost)

    def _watch_start(self, now: float) -> None:
        limit = self._limits.start_timeout_s
        if now - self._started_at > limit:
            late = tuple(f"worker-{r}" for r, done in self._progress.items() if not done)
            self._fail(DeadlineExceeded("start", late, limit, "failure.start_timeout_s"), now)

    def _watch_steps(self, now: float) -> None:
        limit = self._limits.step_timeout_s
        start = max(limit, self._limits.start_timeout_s)
        working = [r for r in self._steps if r not in self._finished]
        quiet = {r: now - self._moved_at[r] for r in working}
        patience = {r: limit if self._progress[r] else start for r in working}  # it has just joined
        stalled = [r for r in working if quiet[r] > patience[r] * STALL_GRACE]
        if stalled:
            late = tuple(f"worker-{r}" for r in stalled)
            self._gone.update(late)
            what = f"step {self.steps_done}"
            self._fail(DeadlineExceeded(what, late, limit, "failure.step_timeout_s"), now)


def _rank_of(role: str) -> int | None:
    """Give the rank of a worker's role; None for servers and their manager."""
    kind, _, number = role.partition("-")
    return int(number) if kind == "worker" and number.isdigit() else None


def _frozen(role: str, seconds: float, step: int | None) -> ActorLost:
    cause = f"it has not answered for {seconds:.0f} s (frozen or cut off)"
    return ActorLost(role, step, cause, "`failure.heartbeat_timeout_s` changes this deadline")
